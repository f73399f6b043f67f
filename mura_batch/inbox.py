"""Find, settle, group: what in the inbox is complete now.

The full scan is the truth; events only make it come sooner (:class:`Wakeup`). Each file belongs
to exactly one unit:

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
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

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
from mura_batch.news import News
from mura_batch.study import Kind, Peek, peek

log = logging.getLogger(__name__)

BLOCKED = (
    "part of the inbox cannot be looked into: check that its folders are there and may be read,"
    " and lie no more than 64 deep"
)
_Key = tuple[Kind, str]
_NEWS = [DirCreatedEvent, DirMovedEvent, FileCreatedEvent, FileMovedEvent, FileClosedEvent]
_DEEPEST = 64  # folders in each other; no tree of studies has a third of that


@dataclass(slots=True)
class _Known:
    """A file as the last scan saw it.

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


@dataclass(slots=True)
class _Folder:
    files: list[_Known] = field(default_factory=list)
    unfinished: list[FoundFile] = field(default_factory=list)


@dataclass(slots=True)
class _Unit:
    files: list[_Known] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    unfinished: list[FoundFile] = field(default_factory=list)

    def state(self) -> list[FoundFile]:
        """Return what must not change for the unit to settle: uploads on the way count too."""
        files = [known.found for known in self.files] + self.unfinished
        files.sort(key=lambda found: found.name)
        return files


@dataclass(slots=True)
class _Observation:
    """How long a unit has looked the way it looks, on the scan's clock.

    Attributes:
        first: since when it has not settled.
        since: when its files last changed.
        offers: how often it was offered since it last changed.
        offer_at: when it may be offered again; ever later while nobody can take it.
    """

    state: list[FoundFile]
    first: float
    since: float
    offers: int = 0
    offer_at: float = -math.inf


class Inbox:
    """What lies in the inbox, and since when it has been unchanged.

    Attributes:
        waiting: units that had not settled at the last scan.
        refused: units that were offered, are unchanged, and are still there.
        blocked: folders that could not be listed at the last scan, or lie too deep.
        last_scan_seconds: what the last scan cost.
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
        self._known: dict[str, _Known] = {}
        self._observed: dict[_Key, _Observation] = {}
        self._ready: dict[str, float] = {}
        self.waiting = 0
        self.refused = 0
        self.blocked = 0
        self.last_scan_seconds = 0.0

    def scan(self) -> list[Candidate]:
        """Look at the whole inbox and return the units that are complete.

        A unit that was returned and is still there unchanged is returned again after
        ``settle_seconds``, and then ever more rarely. Files and folders that vanish under the
        scan, or that cannot be read, do not stop it.
        """
        started = time.perf_counter()
        before = self._clock()
        units = self._grouped(self._walk())
        candidates = self._settled(units, before, self._clock())
        self.last_scan_seconds = time.perf_counter() - started
        return candidates

    # ---- find

    def _walk(self) -> dict[str, _Folder]:
        """List every folder below the inbox that holds files, by its relative path."""
        previous, self._known = self._known, {}
        self._ready = {}
        told, self.blocked = self.blocked > 0, 0
        folders: dict[str, _Folder] = {}
        todo = [""]
        while todo:
            relative = todo.pop()
            if relative.count("/") >= _DEEPEST:  # what handles trees by recursion would fail
                self.blocked += 1
                continue
            prefix = relative + "/" if relative else ""
            folder = _Folder()
            try:
                with os.scandir(self._root + relative) as entries:
                    looks = (self._look(entry, prefix, folder, previous) for entry in entries)
                    todo.extend(filter(None, looks))
            except FileNotFoundError:
                self.blocked += not relative  # a subfolder may go, the inbox should not
                continue
            except OSError:
                self.blocked += 1
                continue
            if folder.files:
                folders[relative] = folder
        if self.blocked and not told:
            log.warning(BLOCKED, extra={"folders": self.blocked})
        return folders

    def _look(
        self, entry: os.DirEntry[str], prefix: str, folder: _Folder, previous: dict[str, _Known]
    ) -> str | None:
        """Add one entry to its folder; return its relative path if it is a folder to list."""
        name = entry.name
        relative = prefix + name
        try:
            if entry.is_dir(follow_symlinks=False):
                return None if name.startswith(".") else relative
            known = previous.get(relative)
            if known is None and self._ignored.match(name):
                if name == READY:
                    status = entry.stat(follow_symlinks=False)
                    self._ready[prefix[:-1]] = status.st_mtime_ns if self._seen else math.inf
                elif self._unfinished.match(name):
                    status = entry.stat(follow_symlinks=False)
                    folder.unfinished.append(_found(relative, status))
                return None
            status = entry.stat(follow_symlinks=False)
        except OSError:  # it vanished since it was listed
            return None
        if known is None or not known.found.describes(status):
            known = _Known(_found(relative, status))
        self._known[relative] = known
        folder.files.append(known)
        return None

    # ---- group

    def _grouped(self, folders: dict[str, _Folder]) -> dict[_Key, _Unit]:
        """Put every file that is news into its unit."""
        above = _above(folders)
        units: defaultdict[_Key, _Unit] = defaultdict(_Unit)
        for relative, folder in folders.items():
            news = [known for known in folder.files if not known.done and self._is_news(known)]
            leaf = bool(relative) and relative not in above
            study = _only_study(news) if leaf else None
            for known in news:
                key = _unit_of(known, relative if leaf else None, study)
                unit = units[key]
                unit.files.append(known)
                unit.folders.add(relative)
                if key[0] is Kind.FOLDER:
                    unit.unfinished = folder.unfinished
        return units

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

    def _settled(self, units: dict[_Key, _Unit], before: float, after: float) -> list[Candidate]:
        """Return the units that are complete; remember how each looked.

        A scan takes time: each file was looked at somewhere between ``before`` and ``after``.
        """
        previous, self._observed = self._observed, {}
        self.waiting = self.refused = 0
        candidates = []
        for key, unit in units.items():
            state = unit.state()
            seen = previous.get(key)
            if seen is None:
                seen = _Observation(state, first=after, since=after)
            elif seen.state != state:
                unsettled = after if seen.offers else seen.first
                seen = _Observation(state, first=unsettled, since=after)
            self._observed[key] = seen
            settled_by = self._why_settled(unit, seen, before)
            if settled_by is None:
                self.waiting += 1
            elif before < seen.offer_at:
                self.refused += 1
            else:
                candidates.append(self._offer(key, unit, seen, settled_by, after))
        return candidates

    def _why_settled(self, unit: _Unit, seen: _Observation, now: float) -> SettledBy | None:
        if self._ready:
            newest = max(known.found.mtime_ns for known in unit.files)
            if all(self._ready_since(folder) >= newest for folder in unit.folders):
                return "ready"
        if now - seen.since >= self._settle:
            return "quiet"
        return "cap" if now - seen.first >= self._cap else None

    def _ready_since(self, folder: str) -> float:
        """Return up to which change of its files a marker calls ``folder`` ready, or one above it.

        With ``archive = "leave"`` a marker stays, and says nothing of files that came after it.
        """
        since = -math.inf
        while folder:
            since = max(since, self._ready.get(folder, -math.inf))
            folder = folder.rpartition("/")[0]
        return since

    def _offer(
        self, key: _Key, unit: _Unit, seen: _Observation, settled_by: SettledBy, now: float
    ) -> Candidate:
        seen.offer_at = now + min(self._settle * 2**seen.offers, self._cap)
        seen.offers += 1
        for known in unit.files:
            known.offered = True
        files = sorted((known.found for known in unit.files), key=lambda found: found.name)
        return Candidate(*key, tuple(files), settled_by)


_OTHER = Peek("other", None)


def _found(name: str, status: os.stat_result) -> FoundFile:
    problem = ""
    if stat.S_ISLNK(status.st_mode):
        problem = "symbolic_link"
    elif not stat.S_ISREG(status.st_mode):
        problem = "not_a_file"
    return FoundFile(name, status.st_size, status.st_mtime_ns, status.st_ino, problem)


def _above(folders: dict[str, _Folder]) -> set[str]:
    """Return every folder that has a subfolder, however deep, with files in it."""
    above: set[str] = set()
    for relative, folder in folders.items():
        if any(known.is_file for known in folder.files):
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


class Wakeup:
    """A wait that ends early when something happens in the inbox.

    File system events are a bare hint here: they carry no name and may be lost, late or
    altogether missing (network shares). Use it as a context manager.

    Attributes:
        mode: ``polling`` where no events can come, by choice or because they could not start.
    """

    def __init__(self, settings: Settings) -> None:
        self.mode: Literal["events", "polling"] = "polling"
        self._inbox = settings.inbox_dir
        self._wanted = settings.watch != "polling"
        self._news = News()
        self._observer: BaseObserver | None = None
        self._broken = False
        self._hook = threading.excepthook

    def __enter__(self) -> Self:
        if self._wanted:
            _hush()
            self._hook, threading.excepthook = threading.excepthook, self._thread_ended
            observer = Observer()
            observer.schedule(
                _Hint(self._news), os.fspath(self._inbox), recursive=True, event_filter=_NEWS
            )
            try:
                observer.start()
            except Exception as exc:  # noqa: BLE001 - limits on watches, trees too deep: events are hints
                observer.stop()
                why = (isinstance(exc, OSError) and exc.strerror) or type(exc).__name__
                log.warning("no file system events (%s): the inbox is polled", why)
            else:
                self._observer = observer
                self.mode = "events"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None
        if self._wanted:
            threading.excepthook = self._hook
        self.mode = "polling"

    def wait(self, timeout: float) -> None:
        """Return after ``timeout`` seconds, or sooner: on an event or on :meth:`wake`."""
        self._news.wait(timeout)
        if self.mode == "events" and not self._alive():
            log.warning("file system events have ceased: the inbox is polled")
            self.mode = "polling"

    def wake(self) -> None:
        """End the present or the next wait; may be called from a signal handler."""
        self._news.tell()

    def _alive(self) -> bool:
        observer = self._observer
        return (
            not self._broken
            and observer is not None
            and all(thread.is_alive() for thread in (observer, *observer.emitters))
        )

    def _thread_ended(self, args: threading.ExceptHookArgs) -> None:
        """Take note of an exception that ended a thread of watchdog: its traceback names paths."""
        if type(args.thread).__module__.partition(".")[0] != "watchdog":
            self._hook(args)
            return
        self._broken = True
        self.wake()


def _hush() -> None:
    """Keep watchdog's warnings out of standard error and logs: they name the inbox's folders."""
    if not any(getattr(entry[3], "pattern", "") == _TALKATIVE for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_TALKATIVE)
    logging.getLogger("watchdog").setLevel(logging.CRITICAL + 1)


_TALKATIVE = r"watchdog(\.|$)"


class _Hint(FileSystemEventHandler):
    """Says that there is news, and nothing else: an exception here would end all events.

    It is told of what comes, and of what is closed after writing. Reading and taking files out
    is what the scan and the claims do themselves; while a file is being written, every write
    would be an event, and the scans that go on until it has settled see it grow.
    """

    def __init__(self, news: News) -> None:
        self._news = news

    def on_any_event(self, event: FileSystemEvent) -> None:  # noqa: ARG002 - that it came is all
        self._news.tell()
