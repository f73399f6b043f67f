"""Find, settle, group: what in the inbox is complete now.

The scan of everything is the truth; events only name folders to look into before the next one
(:class:`mura_batch.wakeup.Wakeup`). Each file belongs to exactly one unit:

- a DICOM file to the study of its StudyInstanceUID, wherever it lies;
- another file of a leaf folder (none of its subfolders holds files) to that folder;
- any other file, a link and what is no file at all to itself.

In a leaf folder that holds DICOM files of one study and no PNG or JPEG, the files that name no
study (a report, a truncated DICOM file) belong to that study.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mura_batch.config import Settings
from mura_batch.custody import (
    READY,
    UNFINISHED,
    Candidate,
    FoundFile,
    SettledBy,
    ignored_names,
)
from mura_batch.moves import open_regular
from mura_batch.study import Kind, Peek, peek

log = logging.getLogger(__name__)

BLOCKED = (
    "part of the inbox cannot be looked into: check that its folders are there and may be read,"
    " and lie no more than 64 deep"
)
_Key = tuple[Kind, str]
_FEW = 500  # files that are opened in a moment: the work that waits from before starts after it
_DEEPEST = 64  # folders in each other; no tree of studies has a third of that


@dataclass(slots=True)
class _Known:
    """A file as the last look at it saw it.

    Attributes:
        peek: what it was found to be, once for this size, time and inode.
        offered: it was part of a returned unit: the ledger may have it by now.
        done: the ledger has it (``archive = "leave"``).
    """

    found: FoundFile
    peek: Peek | None = None
    offered: bool = False
    done: bool = False

    @property
    def is_file(self) -> bool:
        return self.found.problem in {"", "unreadable"}


@dataclass(frozen=True, slots=True)
class _Share:
    """What of one unit lies in one folder.

    Attributes:
        state: what must not change for the unit to settle: uploads on the way count too.
    """

    files: list[_Known] = field(compare=False)
    state: list[FoundFile]


_Unit = dict[str, _Share]  # by folder


@dataclass(slots=True)
class _Folder:
    """A folder as it was last listed, what lies in it by name.

    Attributes:
        listed: when the scan began that listed it.
        leaf: none of its subfolders holds files.
        shares: its files by unit; None where that must be found out.
    """

    files: dict[str, _Known] = field(default_factory=dict)
    subfolders: set[str] = field(default_factory=set)
    unfinished: list[FoundFile] = field(default_factory=list)
    listed: float = field(default=-math.inf, compare=False)
    leaf: bool = field(default=False, compare=False)
    shares: dict[_Key, _Share] | None = field(default=None, compare=False)


@dataclass(slots=True)
class _Observation:
    """How long a unit has looked the way it looks, on the scan's clock.

    Attributes:
        first: since when it has not settled.
        since: when its files last changed.
        offers: how often it was offered since it last changed.
        offer_at: when it may be offered again; ever later while nobody can take it.
    """

    unit: _Unit
    first: float
    since: float
    offers: int = 0
    offer_at: float = -math.inf


class Inbox:
    """What lies in the inbox, and since when it has been unchanged.

    Attributes:
        waiting: units that had not settled at the last scan.
        due: when the first of them has settled if it does not change, on the scan's clock.
        refused: units that were offered, are unchanged, and are still there.
        last_scan_seconds: what the last scan of the whole inbox cost.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        seen: Callable[[FoundFile], bool] | None = None,
    ) -> None:
        """``seen`` is the ledger's answer, asked with ``archive = "leave"`` only."""
        self._root = os.fspath(settings.inbox_dir) + "/"
        self._settle = settings.settle_seconds
        self._cap = settings.settle_max_seconds
        self._unfinished = ignored_names(UNFINISHED)
        self._ignored = ignored_names((*UNFINISHED, *settings.ignore))
        self._clock = clock
        self._seen = seen if settings.archive == "leave" else None
        self._folders: dict[str, _Folder] = {}
        self._observed: dict[_Key, _Observation] = {}
        self._ready: dict[str, float] = {}
        self._blocked: set[str] = set()
        self._offered: set[str] = set()  # folders out of which something may have been taken
        self.waiting = 0
        self.due = math.inf
        self.refused = 0
        self.last_scan_seconds = 0.0

    @property
    def blocked(self) -> int:
        """How many folders could not be listed when last looked at, or lie too deep."""
        return len(self._blocked)

    def look(self) -> None:
        """Look at the inbox for the first time: what lies there settles from now on.

        With many files, or with ``seen``, which may not be open yet, the first scan does that.
        """
        if self._seen is None and self._list_all(self._clock(), most=_FEW):
            now = self._clock()  # the files were seen; to find out what they are takes longer
            self._observed = {
                key: _Observation(unit, first=now, since=now) for key, unit in self._units().items()
            }

    def scan(self, named: Collection[str] | None = None) -> list[Candidate]:
        """Look at the whole inbox and return the units that are complete.

        With ``named``, look only into these folders (relative paths), into what is new below
        them, and where a unit may have settled by now.

        A unit that was returned and is still there unchanged is returned again after
        ``settle_seconds``, and then ever more rarely. Files and folders that vanish under the
        scan, or that cannot be read, do not stop it.
        """
        started = time.perf_counter()
        now = self._clock()
        if named is None:
            self._list_all(now)
        else:
            self._list_below({*named, *self._due(now), *self._offered}, now)
        self._offered = set()
        candidates = self._settled(self._units(), self._clock())
        if named is None:
            self.last_scan_seconds = time.perf_counter() - started
        return candidates

    # ---- find

    def _list_all(self, now: float, *, most: float = math.inf) -> bool:
        """List every folder of the inbox; False where it has more files than ``most``."""
        known, self._folders = self._folders, {}
        told, self._blocked = self._blocked, set()
        self._ready = {}
        todo = [""]
        while todo and most >= 0:
            relative = todo.pop()
            folder = self._list(relative, known.get(relative, _NOTHING), now)
            todo += [_join(relative, name) for name in folder.subfolders]
            most -= len(folder.files)
        if self._blocked and not told:
            log.warning(BLOCKED, extra={"folders": self.blocked})
        return most >= 0

    def _list_below(self, named: set[str], now: float) -> None:
        """List folders, and below them what is not known yet.

        For one that is not known or gone, the nearest known one above it is listed.
        """
        todo = {self._nearest(relative) for relative in named}
        while todo:
            relative = todo.pop()
            before = self._folders.get(relative, _NOTHING)
            folder = self._list(relative, before, now)
            for name in before.subfolders - folder.subfolders:
                self._forget(_join(relative, name))
            if folder is _NOTHING and before is not _NOTHING:
                todo |= {self._nearest(relative)} - {relative}
            todo |= {_join(relative, name) for name in folder.subfolders} - self._folders.keys()

    def _nearest(self, relative: str) -> str:
        """Return the folder itself if it is known, else the nearest known one above it."""
        while relative and relative not in self._folders:
            relative = relative.rpartition("/")[0]
        return relative

    def _forget(self, relative: str) -> None:
        """Forget a folder and all below it."""
        self._blocked.discard(relative)
        self._ready.pop(relative, None)
        for name in self._folders.pop(relative, _NOTHING).subfolders:
            self._forget(_join(relative, name))

    def _list(self, relative: str, before: _Folder, now: float) -> _Folder:
        """List one folder and remember it; one that cannot be listed is ``_NOTHING``."""
        self._folders.pop(relative, None)
        self._blocked.discard(relative)
        self._ready.pop(relative, None)
        if relative.count("/") >= _DEEPEST:  # what handles trees by recursion would fail
            self._blocked.add(relative)
            return _NOTHING
        folder = _Folder()
        try:
            with os.scandir(self._root + relative) as entries:
                for entry in entries:
                    known = before.files.get(entry.name)
                    if known is not None and _is_still(known, entry):
                        folder.files[entry.name] = known
                    else:
                        self._enter(entry, relative, folder)
        except OSError as exc:
            if not relative or not isinstance(exc, FileNotFoundError):  # a subfolder may go
                self._blocked.add(relative)
            return _NOTHING
        if folder == before and before is not _NOTHING:
            folder = before  # with what was found out of it
        folder.listed = now
        self._folders[relative] = folder
        return folder

    def _enter(self, entry: os.DirEntry[str], relative: str, folder: _Folder) -> None:
        """Add what is new or changed to its folder."""
        name = entry.name
        try:
            if entry.is_dir(follow_symlinks=False):
                if not name.startswith("."):
                    folder.subfolders.add(name)
                return
            status = entry.stat(follow_symlinks=False)
        except OSError:  # it vanished since it was listed
            return
        if not self._ignored.match(name):
            folder.files[name] = _Known(_found(_join(relative, name), status))
        elif name == READY:
            self._ready[relative] = status.st_mtime_ns if self._seen else math.inf
        elif self._unfinished.match(name):
            folder.unfinished.append(_found(_join(relative, name), status))

    # ---- group

    def _units(self) -> dict[_Key, _Unit]:
        """Put every file that is news into its unit."""
        above = _above(self._folders)
        units: defaultdict[_Key, _Unit] = defaultdict(dict)
        for relative, folder in self._folders.items():
            leaf = bool(relative) and relative not in above
            shares = folder.shares
            if shares is None or folder.leaf != leaf:
                shares = self._shared(folder, relative if leaf else None)
                certain = not any(map(self._in_doubt, folder.files.values()))
                folder.leaf, folder.shares = leaf, shares if certain else None
            for key, share in shares.items():
                units[key][relative] = share
        return units

    def _shared(self, folder: _Folder, leaf: str | None) -> dict[_Key, _Share]:
        """Divide the news in a folder among their units; ``leaf`` is its path if it is one."""
        news = [known for known in folder.files.values() if not known.done and self._is_news(known)]
        study = None if leaf is None else _only_study(news)
        shared: defaultdict[_Key, list[_Known]] = defaultdict(list)
        for known in news:
            shared[_unit_of(known, leaf, study)].append(known)
        return {
            key: _share(files, folder.unfinished if key[0] is Kind.FOLDER else [])
            for key, files in shared.items()
        }

    def _in_doubt(self, known: _Known) -> bool:
        """Whether the next scan has to ask about a file although it has not changed."""
        if known.done:
            return False
        asked = self._seen is not None and known.offered
        return asked or known.peek is None or known.found.problem == "unreadable"

    def _is_news(self, known: _Known) -> bool:
        """Whether a file is still there and not in the ledger; finds out what it is, once."""
        if self._seen is not None and (known.peek is None or known.offered):
            known.done = self._seen(known.found)
            if known.done:
                return False
        if not known.is_file:
            known.peek = _OTHER
        elif known.peek is None or known.found.problem:
            return self._inspect(known)
        return True

    def _inspect(self, known: _Known) -> bool:
        """Find out what a file is; whether it is still there."""
        path = Path(self._root + known.found.name)
        try:
            open_regular(path).close()
        except FileNotFoundError:
            return False
        except OSError:
            known.found = dataclasses.replace(known.found, problem="unreadable")
            known.peek = _OTHER
        else:
            if known.found.problem:
                known.found = dataclasses.replace(known.found, problem="")
            known.peek = peek(path)
        return True

    # ---- settle

    def _settled(self, units: dict[_Key, _Unit], now: float) -> list[Candidate]:
        """Return the units that are complete; remember how each looked.

        A scan takes time: a file was looked at between the start of its scan and ``now``.
        """
        previous, self._observed = self._observed, {}
        self.waiting = self.refused = 0
        self.due = math.inf
        candidates = []
        for key, unit in units.items():
            seen = previous.get(key)
            if seen is None:
                seen = _Observation(unit, first=now, since=now)
            elif seen.unit != unit:
                unsettled = now if seen.offers else seen.first
                seen = _Observation(unit, first=unsettled, since=now)
            seen.unit = unit  # equal, but what is known of its files is marked in this one
            self._observed[key] = seen
            looked = min(self._folders[folder].listed for folder in unit)
            settled_by = self._why_settled(seen, looked)
            if settled_by is None:
                self.waiting += 1
                self.due = min(self.due, self._due_of(seen))
            elif looked < seen.offer_at:
                self.refused += 1
            else:
                candidates.append(self._offer(key, seen, settled_by, now))
        return candidates

    def _why_settled(self, seen: _Observation, looked: float) -> SettledBy | None:
        if self._ready and (ready := min(map(self._ready_since, seen.unit))) > -math.inf:
            shares = seen.unit.values()
            if ready >= max(known.found.mtime_ns for share in shares for known in share.files):
                return "ready"
        if looked - seen.since >= self._settle:
            return "quiet"
        return "cap" if looked - seen.first >= self._cap else None

    def _due(self, now: float) -> set[str]:
        """Return the folders of units that have settled by now if they have not changed."""
        return {
            folder
            for seen in self._observed.values()
            if not seen.offers and now >= self._due_of(seen)
            for folder in seen.unit
        }

    def _due_of(self, seen: _Observation) -> float:
        return min(seen.since + self._settle, seen.first + self._cap)

    def _ready_since(self, folder: str) -> float:
        """Return up to which change of its files a marker calls ``folder`` ready, or one above it.

        With ``archive = "leave"`` a marker stays, and says nothing of files that came after it.
        """
        since = -math.inf
        while folder:
            since = max(since, self._ready.get(folder, -math.inf))
            folder = folder.rpartition("/")[0]
        return since

    def _offer(self, key: _Key, seen: _Observation, settled_by: SettledBy, now: float) -> Candidate:
        seen.offer_at = now + min(self._settle * 2**seen.offers, self._cap)
        seen.offers += 1
        for folder in seen.unit:  # a claim may take those above along, with their markers
            self._offered |= {folder, *_parents(folder)}
        files = [known for share in seen.unit.values() for known in share.files]
        for known in files:
            known.offered = True
        for folder in seen.unit:
            self._folders[folder].shares = None
        found = sorted((known.found for known in files), key=lambda found: found.name)
        return Candidate(*key, tuple(found), settled_by)


_NOTHING = _Folder()
_OTHER = Peek("other", None)


def _found(name: str, status: os.stat_result) -> FoundFile:
    problem = ""
    if stat.S_ISLNK(status.st_mode):
        problem = "symbolic_link"
    elif not stat.S_ISREG(status.st_mode):
        problem = "not_a_file"
    return FoundFile(name, status.st_size, status.st_mtime_ns, status.st_ino, problem)


def _is_still(known: _Known, entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is the file that was known, unchanged."""
    try:
        return known.found.describes(entry.stat(follow_symlinks=False))
    except OSError:  # it vanished since it was listed
        return False


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _parents(folder: str) -> Iterator[str]:
    while folder:
        folder = folder.rpartition("/")[0]
        yield folder


def _share(files: list[_Known], unfinished: list[FoundFile]) -> _Share:
    state = [*(known.found for known in files), *unfinished]
    state.sort(key=lambda found: found.name)
    return _Share(files, state)


def _above(folders: dict[str, _Folder]) -> set[str]:
    """Return every folder that has a subfolder, however deep, with files in it."""
    above: set[str] = set()
    for relative, folder in folders.items():
        if any(known.is_file for known in folder.files.values()):
            parent = relative.rpartition("/")[0]
            while parent and parent not in above:
                above.add(parent)
                parent = parent.rpartition("/")[0]
    return above


def _only_study(files: list[_Known]) -> str | None:
    """Return the one StudyInstanceUID among ``files``, if there is no other and no PNG or JPEG."""
    peeks = [known.peek for known in files if known.peek is not None]
    uids = {seen.study_uid for seen in peeks if seen.study_uid is not None}
    if len(uids) != 1 or any(seen.kind == "raster" for seen in peeks):
        return None
    return uids.pop()


def _unit_of(known: _Known, leaf: str | None, study: str | None) -> _Key:
    """Return the unit of a file in the folder ``leaf`` (None: in no leaf folder)."""
    if not known.is_file:
        return Kind.FILE, known.found.name
    uid = known.peek.study_uid if known.peek is not None else None
    if uid is None and leaf is None:
        return Kind.FILE, known.found.name
    uid = uid or study
    return (Kind.FOLDER, leaf or "") if uid is None else (Kind.DICOM, uid)
