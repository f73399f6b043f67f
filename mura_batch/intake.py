"""Which study a claim belongs to: one that is stored, or a new one.

DICOM files belong to their Study Instance UID. Others belong to the study that has exactly their
contents; else a folder's to the study of the same (masked) path whose last arrival is recent or
that shares a content; else they make a new study.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import CompoundSelect, Connection, and_, func, insert, select, union, update

from mura_batch.lookup import AMONG, among
from mura_batch.reader import clean
from mura_batch.records import ClaimedFile, ClaimRecord, Json, Place, Recorded, State, Work
from mura_batch.schema import files, readings, studies
from mura_batch.study import Kind, content_digest, masked
from mura_batch.worklist import asked_of, log, log_all, queue

Fingerprint = tuple[int, str, str]  # size, mtime_ns, inode
Ledger = dict[bytes, Fingerprint]  # of the files that were left in the inbox, by raw name
_TRACES: CompoundSelect[str | None] = (
    union(  # of claims (see `_Arrival`), wherever they may be stored
        select(files.c.claim).where(files.c.claim.in_(AMONG)),
        select(studies.c.id).where(studies.c.id.in_(AMONG)),
        select(studies.c.digest).where(studies.c.digest.in_(AMONG)),
        select(studies.c.study_uid).where(studies.c.study_uid.in_(AMONG)),
        select(studies.c.key).where(studies.c.kind == Kind.FOLDER, studies.c.key.in_(AMONG)),
    )
)
_NEW_STUDIES = insert(studies)
_NEW_FILES = insert(files)
_FIRST_READINGS = insert(readings)
_ID_DIGITS = 12


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A claim, and what its study can be known by.

    Attributes:
        uid: Study Instance UID that groups DICOM claims; a header that fails later changes nothing.
        folder: what makes two folders one: the masked path in the inbox; outside the site, the
            whole path. None where the claim is no folder.
        digest: content digest of its files.
        whole: what a new study's id begins.
    """

    claim: ClaimRecord
    uid: str | None
    folder: str | None
    digest: str
    whole: str

    @classmethod
    def of(cls, claim: ClaimRecord) -> _Arrival:
        key = (claim.key or claim.study_uid) if claim.kind == Kind.DICOM else None
        uid = None if key is None else clean(key)
        folder = None
        if claim.kind == Kind.FOLDER:
            path = os.fspath(Path(claim.root, claim.key)) if claim.root else claim.key
            folder = masked(path)
        digest = content_digest(file.sha256 for file in claim.files)
        name = folder or masked(claim.files[0].name)
        parts = (claim.kind, uid) if uid is not None else (claim.kind, name, digest)
        whole = hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()
        return cls(claim, uid, folder, digest, whole)

    @property
    def id(self) -> str:
        """The id of its study, if it is new and no other study has it."""
        return self.whole[:_ID_DIGITS]

    @property
    def traces(self) -> set[str]:
        """What is stored once the claim is; where none of it is stored, its study is new."""
        traces = {self.claim.id, self.id, self.digest}
        return traces | {trace for trace in (self.uid, self.folder) if trace is not None}


class Intake:
    """Claims on the way to their studies, in one transaction.

    Those of which no trace is stored make new studies, written together; every other one is
    looked at by itself, after all that came before it.

    Args:
        ledger: of the files that were left in the inbox; what is recorded is added.
        late_hours: how long a folder's later images belong to the study of its earlier ones.
    """

    def __init__(
        self,
        connection: Connection,
        ledger: MutableMapping[bytes, Fingerprint],
        late_hours: float,
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._late = timedelta(hours=late_hours)
        self._stored: set[str | None] = set()  # traces, in the database or among the new ones
        self._new: dict[str, _Arrival] = {}  # studies that are not yet written, by id

    def record(self, claims: Iterable[ClaimRecord]) -> list[Recorded]:
        """Record claims in this order and say what became of each."""
        arrivals = [_Arrival.of(claim) for claim in claims]
        traces = list(set().union(*(arrival.traces for arrival in arrivals)))
        self._stored.update(trace for (trace,) in among(self._connection, _TRACES, traces))
        recorded = [self._record(arrival) for arrival in arrivals]
        self._write_new()
        return recorded

    def _record(self, arrival: _Arrival) -> Recorded:
        claim = arrival.claim
        left = claim.files if claim.place is Place.INBOX else ()
        names = {os.fsencode(file.name): _fingerprint(file) for file in left}
        replaced = [name for name in names if name in self._ledger]
        if replaced or not self._stored.isdisjoint(arrival.traces):
            self._write_new()
            recorded = self._record_alone(arrival, replaced)
        else:
            self._new[arrival.id] = arrival
            recorded = Recorded(arrival.id, "new", 1)
        self._stored |= arrival.traces
        self._ledger.update(names)
        return recorded

    def _record_alone(self, arrival: _Arrival, replaced: list[bytes]) -> Recorded:
        of_claim = select(studies.c.id, studies.c.request).join(files)
        replayed = of_claim.where(files.c.claim == arrival.claim.id).limit(1)
        if (known := self._connection.execute(replayed).first()) is not None:
            return Recorded(known.id, "replayed", known.request)
        if replaced:
            lay = and_(files.c.place == Place.INBOX, files.c.raw_name.in_(replaced))
            self._connection.execute(update(files).where(lay).values(place=Place.REPLACED))
        study = self._study_of(arrival)
        if study is not None:
            return self._add_to(study, arrival)
        study = self._free_id(arrival.whole)
        self._new[study] = arrival
        return Recorded(study, "new", 1)

    def _study_of(self, arrival: _Arrival) -> str | None:
        if arrival.uid is not None:
            same = and_(studies.c.kind == Kind.DICOM, studies.c.study_uid == arrival.uid)
            return self._connection.execute(select(studies.c.id).where(same)).scalar()
        twin = select(studies.c.id).where(studies.c.digest == arrival.digest)
        first = twin.order_by(studies.c.received_at).limit(1)
        found = self._connection.execute(first).scalar()
        if found is not None or arrival.folder is None:
            return found
        return self._earlier_folder(arrival)

    def _earlier_folder(self, arrival: _Arrival) -> str | None:
        last = func.max(files.c.received_at)
        same_path = (
            select(studies.c.id, last)
            .select_from(studies.join(files))
            .where(studies.c.kind == Kind.FOLDER, studies.c.key == arrival.folder)
            .group_by(studies.c.id)
            .order_by(last.desc())
        )
        contents = {file.sha256 for file in arrival.claim.files}
        for study, arrived in self._connection.execute(same_path).all():
            its_files = select(files.c.sha256).where(files.c.study_id == study)
            if arrived >= arrival.claim.received_at - self._late or not contents.isdisjoint(
                self._connection.execute(its_files).scalars()
            ):
                return str(study)
        return None

    def _free_id(self, whole: str) -> str:
        """The 12 digits are longer only where they are another study's."""
        taken = select(studies.c.id)
        return next(
            whole[:length]
            for length in range(_ID_DIGITS, len(whole) + 1)
            if self._connection.execute(taken.where(studies.c.id == whole[:length])).first() is None
        )

    def _add_to(self, study: str, arrival: _Arrival) -> Recorded:
        """Add a claim to a study; contents that it did not have queue it again."""
        claim = arrival.claim
        before = asked_of(self._connection, [study])[study]
        self._connection.execute(_NEW_FILES, _file_rows(study, claim))
        hashes = select(files.c.sha256)
        present = hashes.where(files.c.study_id == study, files.c.place != Place.REPLACED)
        digest = content_digest(self._connection.execute(present).scalars())
        if digest == before.digest:
            log(self._connection, claim.received_at, "duplicate", _about(claim), study)
            return Recorded(study, "duplicate", before.request)
        self._stored.add(digest)
        changed = update(studies).where(studies.c.id == study).values(digest=digest)
        self._connection.execute(changed)
        queue(self._connection, [study], "late", _about(claim))
        return Recorded(study, "late", before.request + 1)

    def _write_new(self) -> None:
        if not (new := self._new):
            return
        self._new = {}
        write = self._connection.execute
        write(_NEW_STUDIES, [_study_row(study, arrival) for study, arrival in new.items()])
        write(_FIRST_READINGS, [_first_reading(study, a.claim) for study, a in new.items()])
        write(_NEW_FILES, [row for study, a in new.items() for row in _file_rows(study, a.claim)])
        log_all(
            self._connection,
            ((a.claim.received_at, "new", _about(a.claim), study) for study, a in new.items()),
        )


def _study_row(study: str, arrival: _Arrival) -> dict[str, Any]:
    claim = arrival.claim
    return {
        "id": study,
        "kind": claim.kind,
        "key": arrival.folder or "",
        "study_uid": arrival.uid or claim.study_uid,
        "accession": claim.accession,
        "digest": arrival.digest,
        "source": _shown_source(claim),
        "received_at": claim.received_at,
        "work": Work.QUEUED if claim.queue else Work.RUNNING,
        "request": 1,
        "attempts": 0,
        "rerun": False,
        "set_all": False,
    }


def _first_reading(study: str, claim: ClaimRecord) -> dict[str, Any]:
    return {
        "study_id": study,
        "area": "",
        "received_at": claim.received_at,
        "state": State.QUEUED,
        "reason_code": "",
        "reason": "",
        "evidence": [],
        "updated_at": claim.received_at,
    }


def _file_rows(study: str, claim: ClaimRecord) -> list[dict[str, Any]]:
    return [
        {
            "study_id": study,
            "claim": claim.id,
            "raw_name": os.fsencode(Path(claim.root, file.name) if claim.root else file.name),
            "source": masked(file.name),
            "sha256": file.sha256,
            "size": file.size,
            "mtime_ns": str(file.mtime_ns),
            "inode": str(file.inode),
            "place": claim.place,
            "problem": file.problem,
            "received_at": claim.received_at,
        }
        for file in claim.files
    ]


def _shown_source(claim: ClaimRecord) -> str:
    """The folder that all files share, else the first file; labels masked."""
    if claim.kind == Kind.FOLDER and claim.key:
        return masked(claim.key)
    names = [file.name for file in claim.files]
    shared = posixpath.commonpath(names) if len(names) > 1 else names[0]
    return masked(shared or names[0])


def _about(claim: ClaimRecord) -> Json:
    return {"claim": claim.id, "files": len(claim.files), "settled_by": claim.settled_by}


def _fingerprint(file: ClaimedFile) -> Fingerprint:
    return file.size, str(file.mtime_ns), str(file.inode)
