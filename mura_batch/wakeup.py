"""A wait for something to happen in the inbox, by file system events where they come."""

from __future__ import annotations

import logging
import os
import threading
import warnings
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
from mura_batch.news import News

log = logging.getLogger(__name__)

_NEWS = [DirCreatedEvent, DirMovedEvent, FileCreatedEvent, FileMovedEvent, FileClosedEvent]


class Wakeup:
    """A wait that ends early when something happens in the inbox, and says in which folders.

    File system events are hints: they may be lost, late or altogether missing (network shares).
    Use it as a context manager.

    Attributes:
        mode: ``polling`` where no events can come, by choice or because they could not start.
    """

    def __init__(self, settings: Settings) -> None:
        self.mode: Literal["events", "polling"] = "polling"
        self._inbox = os.path.realpath(settings.inbox_dir)  # a link itself would have no events
        self._wanted = settings.watch != "polling"
        self._news = News()
        self._hint = _Hint(self._news)
        self._observer: BaseObserver | None = None
        self._broken = False
        self._hook = threading.excepthook

    def __enter__(self) -> Self:
        if self._wanted:
            _hush()
            self._hook, threading.excepthook = threading.excepthook, self._thread_ended
            observer = Observer()
            observer.schedule(self._hint, self._inbox, recursive=True, event_filter=_NEWS)
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

    def wait(self, timeout: float) -> set[str]:
        """Return after ``timeout`` seconds, or sooner: on an event or on :meth:`wake`.

        Returned are the folders in which something has happened since the last wait, by their
        paths relative to the inbox.
        """
        self._news.wait(timeout)
        if self.mode == "events" and not self._alive():
            log.warning("file system events have ceased: the inbox is polled")
            self.mode = "polling"
        return {
            path[len(self._inbox) + 1 :]
            for path in self._hint.taken()
            if path == self._inbox or path.startswith(self._inbox + "/")
        }

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
    """Says that there is news, and where; an exception here would end all events.

    It is told of what comes, and of what is closed after writing. Reading and taking files out
    is what the scan and the claims do themselves; while a file is being written, every write
    would be an event, and the scans that go on until it has settled see it grow.
    """

    def __init__(self, news: News) -> None:
        self._news = news
        self._folders: set[str] = set()
        self._lock = threading.Lock()

    def on_any_event(self, event: FileSystemEvent) -> None:
        paths = [os.fsdecode(path) for path in (event.src_path, event.dest_path) if path]
        with self._lock:
            self._folders.update(p if event.is_directory else p.rpartition("/")[0] for p in paths)
        self._news.tell()

    def taken(self) -> set[str]:
        """Return the folders of the events since the last call."""
        with self._lock:
            folders, self._folders = self._folders, set()
        return folders
