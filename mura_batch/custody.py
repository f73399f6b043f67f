"""Where a claimed file lies; every move is a rename that a restart can repeat.

A claim begins as an intent on disk, ``work/<claim>/claim.json``, written whole before the first
file moves. Then each file is renamed to ``work/<claim>/files/<name>``, and the record is sealed
with the content hashes. Cut off anywhere in between, :meth:`Custody.pending` finishes the claim
from its intent. A finished claim moves as one folder:

    inbox/<name> → work/<claim>/ → archive/<study>/<claim>/
                                 → quarantine/<study>/<claim>/ with reason.json

A power cut must not undo what a later step builds on, so these are fsynced in between: the intent,
its name and its folder's name before the first file moves; the folders that files were moved into
before the record is sealed; the folder a claim was moved into before the database says that it is
there. The inbox is not: a move out of it that the disk forgets is found by the next scan.

With ``archive = "leave"`` nothing moves and ``work/`` stays empty; the database is the ledger.
"""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mura_batch.atomic import sync_folder, write_atomic
from mura_batch.config import Settings
from mura_batch.errors import Misconfigured, Transient
from mura_batch.moves import (
    CARRIED,
    MAX_BYTES,
    digest,
    files_below,
    move,
    relocate,
    remove_if_there,
    same_content,
    settle_into,
)
from mura_batch.reasons import REASON_FILE, Reason, explain, told
from mura_batch.study import Kind, SourceFile, masked

log = logging.getLogger(__name__)

SettledBy = Literal["quiet", "ready", "cap"]
READY = ".ready"
UNFINISHED = (".*", "*.part", "*.tmp", "*~")
_RECORD = "claim.json"
_GONE = ".gone"


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of the inbox as one look at it found it (``lstat``; links are not followed).

    Attributes:
        name: path relative to the inbox, ``/``-separated, surrogateescape for odd bytes.
        problem: ``symbolic_link``, ``not_a_file``, ``unreadable``, ``too_large``, or empty.
    """

    name: str
    size: int
    mtime_ns: int
    inode: int
    problem: str = ""

    def describes(self, status: os.stat_result) -> bool:
        """Whether ``status`` is of this very file, unchanged."""
        return (
            status.st_mtime_ns == self.mtime_ns
            and status.st_size == self.size
            and status.st_ino == self.inode
        )

    def like(self, status: os.stat_result) -> bool:
        """Whether ``status`` is of the same sort of file, changed or not."""
        if self.problem == "symbolic_link":
            return stat.S_ISLNK(status.st_mode)
        return stat.S_ISREG(status.st_mode) == (self.problem != "not_a_file")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A unit of the inbox that is complete: one study, as far as the inbox can tell.

    Attributes:
        key: StudyInstanceUID, folder or file name relative to the inbox, by ``kind``.
        settled_by: unchanged for long enough, a ``.ready`` marker, or the hard cap.
    """

    kind: Kind
    key: str
    files: tuple[FoundFile, ...]
    settled_by: SettledBy


@dataclass(frozen=True, slots=True)
class Claim:
    """Files that are ours now.

    Attributes:
        id: unique, and sortable by the time of the claim.
        received_at: aware UTC.
        files: hashed, each with the path where it lies now.
        fingerprints: of the same files in the same order.
    """

    id: str
    kind: Kind
    key: str
    settled_by: SettledBy
    received_at: datetime
    files: tuple[SourceFile, ...]
    fingerprints: tuple[FoundFile, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    """``claim.json``: an intent while ``hashes`` is None, sealed with them afterwards."""

    id: str
    received_at: datetime
    candidate: Candidate
    hashes: tuple[str, ...] | None = None

    def to_json(self) -> bytes:
        files = [_fields(file) for file in self.candidate.files]
        candidate = _fields(self.candidate) | {"files": files}
        received_at = self.received_at.isoformat()
        fields = _fields(self) | {"received_at": received_at, "candidate": candidate}
        return json.dumps(fields).encode("ascii")

    @classmethod
    def from_json(cls, text: bytes) -> _Record:
        fields = json.loads(text)
        given = fields["candidate"]
        files = tuple(FoundFile(**file) for file in given["files"])
        candidate = Candidate(Kind(given["kind"]), given["key"], files, given["settled_by"])
        hashes = fields["hashes"]
        return cls(
            fields["id"],
            datetime.fromisoformat(fields["received_at"]),
            candidate,
            None if hashes is None else tuple(hashes),
        )


def _fields(record: Any) -> dict[str, Any]:
    """Return a record's fields as they are: ``dataclasses.asdict`` copies all below them too."""
    return {name: getattr(record, name) for name in record.__slots__}


def ignored_names(globs: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the bare file names that ``globs`` name, in any case."""
    return re.compile("|".join(map(fnmatch.translate, globs)) or r"(?!)", re.IGNORECASE)


class Custody:
    """Moves the files of one site: inbox → work → archive or quarantine.

    One process at a time; its threads may move different claims at once. Every method can be
    repeated after a crash.

    Args:
        go_on: asked before each file that a claim moves or reads; where it says no, a restart
            finishes the claim.
    """

    def __init__(self, settings: Settings, *, go_on: Callable[[], bool] = lambda: True) -> None:
        self._go_on = go_on
        self._inbox = os.fspath(settings.inbox_dir)
        self._work = os.fspath(settings.work)
        self._archive = os.fspath(settings.archive_dir)
        self._quarantine = os.fspath(settings.quarantine)
        self._leave = settings.archive == "leave"
        self._ignored = ignored_names((*UNFINISHED, *settings.ignore))
        self._cut_off: list[str] = []  # claims in work that this process could not finish

    def claim(self, candidate: Candidate) -> Claim | None:
        """Take a unit's files out of the inbox (``leave``: hash them where they are).

        A file that vanished or changed since the scan stays in the inbox, to settle again;
        a unit that is taken because of the cap is taken as it is now. None when no file is
        left. Folders of the inbox that this empties are removed with their ``.ready``.

        Raises:
            Transient: nothing could be moved (permissions, full disk), or what was moved could
                not be read (a failing disk, a lost share): see :meth:`cut_off`.
        """
        now = datetime.now(UTC)
        claim_id = f"{now:%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"
        files = tuple(f for f in candidate.files if self._takeable(f, candidate.settled_by))
        if not files:
            return None
        record = _Record(claim_id, now, dataclasses.replace(candidate, files=files))
        folder = f"{self._work}/{claim_id}"
        try:
            if self._leave:
                return self._claim_in_place(record)
            os.makedirs(folder)
            self._write(record)
            sync_folder(self._work)
            return self._finish(record)
        except OSError as exc:
            with suppress(OSError):
                self._drop_unless_holding(folder)
            if os.path.isdir(folder):
                self._cut_off.append(folder)
            raise Transient(
                f"a study cannot be taken: {exc.strerror}; check the disks and the permissions"
                " of the inbox and of the home folder"
            ) from exc

    def cut_off(self) -> list[Claim]:
        """Return the claims whose files were moved but could not be read then, as far as they can
        be read now.
        """
        waiting, self._cut_off = self._cut_off, []
        claims = []
        for folder in waiting:
            if (claim := self._resume(folder)) is not None:
                claims.append(claim)
            elif os.path.isdir(folder):
                self._cut_off.append(folder)
        return claims

    @property
    def held_up(self) -> int:
        """How many claims :meth:`cut_off` waits for."""
        return len(self._cut_off)

    def pending(self) -> list[Claim]:
        """Return every claim in work, oldest first; finishes what a crash cut off.

        For the start of the program, when nothing else moves. Sealed claims keep the hashes
        they were sealed with, others are hashed now.
        """
        if not os.path.isdir(self._work):
            return []
        claims = []
        for name in sorted(os.listdir(self._work)):
            folder = f"{self._work}/{name}"
            if name.endswith(_GONE):
                shutil.rmtree(folder, ignore_errors=True)  # deleted by intent, cut off
            elif (claim := self._resume(folder)) is not None:
                claims.append(claim)
        return claims

    def to_archive(self, study_id: str, claim_id: str) -> None:
        """Move a whole claim, from work or back from quarantine, to the archive.

        Views that were put in quarantine one by one stay there.

        Raises:
            Transient: the archive does not take it (full disk, permissions, lost share).
        """
        work, archive, quarantine = self._folders(study_id, claim_id)
        with _transient("moved to the archive"):
            if os.path.isdir(work):
                relocate(work, archive, last=REASON_FILE)
            elif told(quarantine).get("whole"):
                relocate(quarantine, archive, last=REASON_FILE)
            remove_if_there(f"{archive}/{REASON_FILE}")
        with suppress(OSError):
            os.rmdir(os.path.dirname(quarantine))  # of a study that has nothing more in there

    def to_quarantine(
        self, study_id: str, claim_id: str, reason: Reason, *, sources: Iterable[str] = ()
    ) -> None:
        """Move a whole claim, from work or from the archive, to quarantine with its reason.

        ``sources`` are names of files that lie in the inbox and stay there (``leave``): the
        reason names them, label suffixes masked.

        Raises:
            Transient: the quarantine does not take it (full disk, permissions, lost share).
        """
        work, archive, quarantine = self._folders(study_id, claim_id)
        note: dict[str, object] = {"study": study_id, "claim": claim_id, "whole": True}
        note |= dataclasses.asdict(reason)
        if names := [masked(name) for name in sources]:
            note["sources"] = names
        source = next((place for place in (work, archive) if os.path.isdir(place)), None)
        with _transient("moved to quarantine"):
            if source is None or os.path.isdir(quarantine):
                explain(quarantine, note)
                if source is not None:
                    remove_if_there(f"{source}/{REASON_FILE}")
            else:
                explain(source, note)
            if source is not None:
                relocate(source, quarantine, last=REASON_FILE)
        with suppress(OSError):
            os.rmdir(os.path.dirname(archive))

    def quarantine_file(self, study_id: str, claim_id: str, name: str, reason: Reason) -> None:
        """Put one file of a claim in quarantine; the rest of the claim stays where it is.

        Raises:
            Transient: the quarantine does not take it (full disk, permissions, lost share).
        """
        work, archive, quarantine = self._folders(study_id, claim_id)
        name_id = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
        entry = {"file": masked(name), "id": name_id, **dataclasses.asdict(reason)}
        with _transient("moved to quarantine"):
            explain(quarantine, {"study": study_id, "claim": claim_id}, entry)
            for place in (work, archive):
                source = f"{place}/files/{name}"
                if os.path.lexists(source):
                    settle_into(source, f"{quarantine}/files/{name}", f"{quarantine}/{CARRIED}")
                    sync_folder(os.path.dirname(source))
            self._drop_unless_holding(work)

    def reopen(self, study_id: str, claim_id: str) -> None:
        """Take a claim that lies in quarantine as a whole back to work, its reason dropped.

        Raises:
            Transient: it cannot be moved (full disk, permissions, lost share).
        """
        work, _, quarantine = self._folders(study_id, claim_id)
        with _transient("taken out of quarantine"):
            if told(quarantine).get("whole"):
                relocate(quarantine, work, last=REASON_FILE)
            remove_if_there(f"{work}/{REASON_FILE}")
        with suppress(OSError):
            os.rmdir(os.path.dirname(quarantine))

    def discard(self, claim_id: str) -> None:
        """Delete a claim's files from work (``archive = "delete"``, after the commit).

        Raises:
            Transient: they cannot be deleted (permissions, lost share).
        """
        folder = f"{self._work}/{claim_id}"
        gone = f"{self._work}/.{claim_id}{_GONE}"
        with _transient("deleted"):
            if os.path.isdir(folder):
                os.rename(folder, gone)
                sync_folder(self._work)
            if os.path.isdir(gone):
                shutil.rmtree(gone)

    def absolve(self, study_id: str, claim_id: str) -> None:
        """Take back the reason why a claim whose files stay in the inbox was refused.

        Raises:
            Transient: the quarantine cannot be changed (permissions, lost share).
        """
        _, _, quarantine = self._folders(study_id, claim_id)
        if told(quarantine).get("whole"):
            with _transient("taken out of quarantine"):
                os.unlink(f"{quarantine}/{REASON_FILE}")
            for folder in (quarantine, os.path.dirname(quarantine)):
                with suppress(OSError):
                    os.rmdir(folder)

    def locate(self, place: str, study_id: str, claim_id: str, name: str) -> Path:
        """Return where a file lies: in ``place`` (work, archive, quarantine, inbox, or outside
        the site, where ``name`` is its path), or in another one where a crash came between a
        move and its record.

        Raises:
            Misconfigured: the file was deleted after its result (``archive = "delete"``).
        """
        work, archive, quarantine = (
            f"{folder}/files/{name}" for folder in self._folders(study_id, claim_id)
        )
        places = {
            "work": work,
            "archive": archive,
            "quarantine": quarantine,
            "inbox": f"{self._inbox}/{name}",
            "outside": name,
        }
        if place not in places:
            raise Misconfigured(
                'the source files were deleted after their result (archive = "delete"):'
                " drop the study in again"
            )
        stated = places[place]
        found = filter(os.path.lexists, (stated, work, archive, quarantine))
        return Path(next(found, stated))

    def _folders(self, study_id: str, claim_id: str) -> tuple[str, str, str]:
        return (
            f"{self._work}/{claim_id}",
            f"{self._archive}/{study_id}/{claim_id}",
            f"{self._quarantine}/{study_id}/{claim_id}",
        )

    def _takeable(self, found: FoundFile, settled_by: SettledBy) -> bool:
        try:
            status = os.lstat(f"{self._inbox}/{found.name}")
        except OSError:
            return False
        return found.like(status) if settled_by == "cap" else found.describes(status)

    def _claim_in_place(self, record: _Record) -> Claim | None:
        held = self._held(self._inbox, record.candidate.files)
        settled_by = record.candidate.settled_by
        held = [(found, file) for found, file in held if self._takeable(found, settled_by)]
        return _as_claim(record, held) if held else None

    def _finish(self, record: _Record) -> Claim | None:
        """Move what is still to move, remove emptied folders, hash, seal.

        Raises:
            OSError: why the last file was refused, when no file could be moved; or the program
                is told to stop.
        """
        folder = f"{self._work}/{record.id}"
        refused: OSError | None = None
        for found in record.candidate.files:
            self._stop_if_told()
            try:
                self._take(found, folder, record.candidate.settled_by)
            except OSError as exc:
                refused = exc
                log.warning("claim %s leaves a file in the inbox: %s", record.id, exc.strerror)
        self._remove_emptied(found.name for found in record.candidate.files)
        held = self._held(f"{folder}/files", record.candidate.files)
        if held:
            self._seal(record, held)
            return _as_claim(record, held)
        self._drop_unless_holding(folder)
        if refused is not None:
            raise refused
        return None

    def _seal(self, record: _Record, held: Sequence[_Holding]) -> None:
        """Make the moves durable and close the record: a restart takes no more files into it.

        A full disk does not undo the claim: a restart then finishes it once more.
        """
        files = tuple(found for found, _ in held)
        sealed = dataclasses.replace(
            record,
            candidate=dataclasses.replace(record.candidate, files=files),
            hashes=tuple(file.sha256 for _, file in held),
        )
        root = f"{self._work}/{record.id}/files"
        try:
            for place in {os.path.dirname(file.path) for _, file in held} | {root}:
                sync_folder(place)
            self._write(sealed)
        except OSError as exc:
            log.warning("claim %s is not sealed: %s", record.id, exc.strerror)

    def _write(self, record: _Record) -> None:
        content = record.to_json()
        write_atomic(f"{self._work}/{record.id}/{_RECORD}", lambda stream: stream.write(content))

    def _take(self, found: FoundFile, folder: str, settled_by: SettledBy) -> None:
        """Move one file into the claim, or finish having moved it."""
        source, target = f"{self._inbox}/{found.name}", f"{folder}/files/{found.name}"
        if os.path.lexists(target):
            # Another file of that name may have come since. One that is still the very same
            # was copied from another file system, and the copy was cut off before the unlink.
            if self._takeable(found, "quiet") and same_content(source, target):
                os.unlink(source)
            return
        if not self._takeable(found, settled_by):
            return
        place = os.path.dirname(target)
        if not os.path.isdir(place):
            os.makedirs(place)
        with suppress(FileNotFoundError):
            if found.size > MAX_BYTES and os.lstat(source).st_dev != os.stat(place).st_dev:
                raise OSError(errno.EFBIG, "too large to be copied from another file system")
            move(source, target, f"{folder}/{CARRIED}", lambda: self._takeable(found, settled_by))

    def _stop_if_told(self) -> None:
        if not self._go_on():
            raise InterruptedError(errno.ECANCELED, "the program is told to stop")

    def _held(self, root: str, files: Iterable[FoundFile]) -> list[_Holding]:
        """Hash those of ``files`` that lie below ``root``; sizes and problems as they are now."""
        held = []
        for found in files:
            self._stop_if_told()
            path = f"{root}/{found.name}"
            with suppress(FileNotFoundError):
                status = os.lstat(path)
                sha256, problem = digest(path, found.name, status)
                now = dataclasses.replace(
                    found, size=status.st_size, mtime_ns=status.st_mtime_ns, problem=problem
                )
                file = SourceFile(Path(path), found.name, sha256, status.st_size, problem)
                held.append((now, file))
        return held

    def _resume(self, folder: str) -> Claim | None:
        """Return the claim in ``folder``, finished if it was cut off; None if it holds nothing."""
        try:
            for partial in Path(folder).glob("*.tmp"):
                partial.unlink()
            record = _Record.from_json(Path(folder, _RECORD).read_bytes())
            if record.hashes is None:
                return self._finish(record)
        except FileNotFoundError:
            self._drop_unless_holding(folder)
            return None
        except OSError as exc:
            log.warning("claim %s stays cut off: %s", os.path.basename(folder), exc.strerror)
            return None
        except (ValueError, KeyError, TypeError):
            name = os.path.basename(folder)
            log.warning("claim %s has no readable record; its files are kept", name)
            return None
        kept = [
            (f, SourceFile(path, f.name, sha256, f.size, f.problem))
            for f, sha256 in zip(record.candidate.files, record.hashes, strict=True)
            if os.path.lexists(path := Path(folder, "files", f.name))
        ]
        return _as_claim(record, kept) if kept else None

    def _drop_unless_holding(self, folder: str) -> None:
        """Remove a claim's folder when no source file lies in it."""
        if os.path.isdir(folder) and next(files_below(f"{folder}/files"), None) is None:
            shutil.rmtree(folder)

    def _remove_emptied(self, names: Iterable[str]) -> None:
        """Remove the inbox folders of ``names`` that hold nothing more, and their parents."""
        folders = {name.rpartition("/")[0] for name in names}
        for relative in sorted(folders, key=lambda folder: -folder.count("/")):
            rest = relative
            while rest and self._remove_folder(f"{self._inbox}/{rest}"):
                rest = rest.rpartition("/")[0]

    def _remove_folder(self, folder: str) -> bool:
        """Remove ``folder`` if it is empty but for its marker; whether it is gone."""
        marker = f"{folder}/{READY}"
        try:
            if os.path.lexists(marker) and all(map(self._ignored.match, os.listdir(folder))):
                os.unlink(marker)
            os.rmdir(folder)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


_Holding = tuple[FoundFile, SourceFile]


def _as_claim(record: _Record, held: Sequence[_Holding]) -> Claim:
    return Claim(
        record.id,
        record.candidate.kind,
        record.candidate.key,
        record.candidate.settled_by,
        record.received_at,
        files=tuple(file for _, file in held),
        fingerprints=tuple(found for found, _ in held),
    )


@contextmanager
def _transient(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise Transient(
            f"a study's files cannot be {what}: {exc.strerror}; check the free disk and the"
            " permissions of the home folder"
        ) from exc
