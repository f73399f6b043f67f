"""The daemon: threads, clocks and signals around the pipeline, and nothing of a study's rules.

The main thread scans, has claims made, several at once, and records them; one thread takes queued
studies from the ledger and feeds the pipeline, whose own threads decode, score and finish. The
ledger is the only queue, so that ``rerun`` in another process reaches the daemon without a word
to it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mura_batch.area import Area
from mura_batch.atomic import write_atomic
from mura_batch.config import STATUS_FILE, Settings
from mura_batch.custody import Claim, Custody
from mura_batch.errors import Misconfigured, MuraError, Transient
from mura_batch.inbox import Inbox
from mura_batch.lock import LOCK_FILE
from mura_batch.news import News
from mura_batch.records import State
from mura_batch.systemd import ALIVE, READY, STOPPING
from mura_batch.wakeup import Wakeup
from mura_batch.weights import WeightsStore

if TYPE_CHECKING:
    from mura_batch.pipeline import Pipeline
    from mura_batch.store import Store

log = logging.getLogger(__name__)

_GROUP = 16  # studies claimed at once, so that their fsyncs share the disk's commits
_TAKE = 256  # studies taken from the ledger at once
_IDLE_SHARE = 50  # an idle inbox is scanned for at most 1/50 of the time
_ONCE_SECONDS = 0.1  # between two scans of `watch --once`
_SOONEST = 0.1  # of the time to settle: between two scans for what settles at different times
_LONGEST_WAIT = 60.0  # seconds between full scans, whatever they cost
_WORD_SECONDS = 5.0  # between two words for `status`
_GATHER_SECONDS = 0.05  # how long claims may gather while studies keep coming
_DEATHS = 4  # of the program that an attempt stands for: most have other causes than a study
_LEDGER_SECONDS = 0.5  # how often the ledger is asked for work that others queued

Notify = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to: rows that ended in each state, and what still waits.

    Attributes:
        untaken: studies that are complete and could not be claimed.
        blocked: folders of the inbox that could not be looked into.
    """

    finished: Counter[State]
    waiting: int
    untaken: int
    blocked: int

    @property
    def needs_attention(self) -> bool:
        """Whether any study was not done: quarantined, failed, waiting or not even claimed."""
        return self.waiting + self.untaken + self.blocked > 0 or any(
            count for state, count in self.finished.items() if state is not State.DONE
        )


class Daemon:
    """Watches one home until :meth:`stop` is called, or once through.

    Args:
        notify: told systemd's words (``READY=1``, ``WATCHDOG=1`` …) as they come true.
        lasting: the home will be used again, so that what is found out for it pays.
    """

    def __init__(
        self, settings: Settings, *, notify: Notify = lambda _: None, lasting: bool = True
    ) -> None:
        self._settings = settings
        self._lasting = lasting
        self._notify = notify
        self._stopping = False
        self._recorded = News()  # for the feeder
        self._wakeup = Wakeup(settings)
        self._next_word = 0.0
        self._unrecorded: list[Claim] = []
        self._untaken = 0

    def stop(self) -> None:
        """Finish what is in flight and return from :meth:`run` (safe in a signal handler)."""
        self._stopping = True
        self._recorded.tell()
        self._wakeup.wake()

    def run(self, *, once: bool = False) -> Summary:
        """Work until :meth:`stop`; with ``once``, until nothing in the inbox can move.

        Raises:
            Misconfigured: the home is not usable, or another daemon works in it; with ``once``,
                there is no inbox (else it may yet be mounted).
            Exception: what the database raised that no second try would mend.
        """
        settings = self._settings
        with ExitStack() as stack:
            stack.enter_context(_alone(settings))
            if once:
                _check_inbox(settings)
            inbox = Inbox(settings, seen=lambda f: store.seen(f.name, f.size, f.mtime_ns, f.inode))
            inbox.look()
            from mura_batch.pipeline import Pipeline  # noqa: PLC0415 - a quarter of a second, in which the inbox settles
            from mura_batch.scoring import warm_scorer  # noqa: PLC0415 - NumPy, while the inbox settles
            from mura_batch.store import Store  # noqa: PLC0415 - SQLAlchemy, while the inbox settles

            store = stack.enter_context(Store.open(settings.database_url))
            weights = WeightsStore(settings.weights_dir)
            custody = Custody(settings, go_on=self._go_on)
            scorer = stack.enter_context(warm_scorer(settings, weights, lasting=self._lasting))
            pipeline = stack.enter_context(Pipeline(settings, store, custody, weights, scorer))
            stack.enter_context(self._wakeup)
            log.info("watching", extra={"mode": self._wakeup.mode})
            _catch_up(settings, store, custody, pipeline)
            feeder = stack.enter_context(ThreadPoolExecutor(1, "feeder"))
            feeding = feeder.submit(self._feed, store, weights, pipeline)
            feeding.add_done_callback(lambda _: self.stop())
            try:
                self._watch(inbox, store, custody, pipeline, once=once)
            finally:
                self.stop()
                self._notify(STOPPING)
                wait([feeding])
                pipeline.drain()
            feeding.result()
            rows = store.counts(datetime.now(UTC)).states
            waiting = sum(count for state, count in rows.items() if state not in _ENDED)
            untaken = self._untaken + inbox.refused
            return Summary(pipeline.finished, waiting, untaken, inbox.blocked)

    def _watch(
        self, inbox: Inbox, store: Store, custody: Custody, pipeline: Pipeline, *, once: bool
    ) -> None:
        """Scan, claim and wait until told to stop (the main thread)."""
        ready = expecting = False
        full_at = 0.0  # when the whole inbox is looked at again
        named: set[str] | None = None
        while not self._stopping:
            claimed = self._scan(inbox, custody, pipeline, named)
            if not ready:
                self._notify(READY)
                ready = True
            self._notify(ALIVE)
            self._say(inbox)
            if inbox.waiting and not expecting:
                pipeline.expect()
                expecting = True
            idle = not (claimed or inbox.waiting or self._unrecorded)
            if once and idle and pipeline.idle and not store.busy(datetime.now(UTC)):
                return
            now = time.monotonic()
            if named is None:
                pause = max(self._settings.scan_seconds, _IDLE_SHARE * inbox.last_scan_seconds)
                full_at = now + min(pause, _LONGEST_WAIT)
            pause = full_at - now
            if inbox.waiting or once:
                settle = self._settings.settle_seconds
                soonest = max(settle * _SOONEST, inbox.last_scan_seconds)
                pause = min(pause, settle / 2, max(inbox.due - now, soonest))
            if once and not inbox.waiting:  # what ends the last study does not wake this thread
                pause = min(pause, max(_ONCE_SECONDS, inbox.last_scan_seconds))
            named = self._wakeup.wait(max(pause, 0.0))
            hinted = self._wakeup.mode == "events" and not once
            if not hinted or self._unrecorded or time.monotonic() >= full_at:
                named = None
        log.info("stopping: what is under way is finished first")

    def _go_on(self) -> bool:
        """Tell the service manager that work goes on; return whether it should."""
        self._notify(ALIVE)
        return not self._stopping

    def _say(self, inbox: Inbox) -> None:
        """Leave word for ``mura-batch status``, every few seconds."""
        if time.monotonic() < self._next_word:
            return
        self._next_word = time.monotonic() + _WORD_SECONDS
        word = {
            "pid": os.getpid(),
            "last_scan_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "last_scan_seconds": round(inbox.last_scan_seconds, 3),
            "settling": inbox.waiting,
            "refused": inbox.refused,
        }
        text = json.dumps(word).encode()
        with suppress(OSError):
            write_atomic(self._settings.home / STATUS_FILE, lambda stream: stream.write(text))

    def _scan(
        self, inbox: Inbox, custody: Custody, pipeline: Pipeline, named: set[str] | None
    ) -> int:
        """Claim what is complete and record it; return how many claims were recorded."""
        self._unrecorded += custody.cut_off()
        self._untaken = custody.held_up
        recorded = self._record(pipeline)
        if self._unrecorded:  # what the ledger does not know would be claimed once more
            return recorded
        candidates = inbox.scan(named)
        with ThreadPoolExecutor(_GROUP, "claim") as claimers:
            for start in range(0, len(candidates), _GROUP):
                if self._stopping:
                    break
                group = candidates[start : start + _GROUP]
                self._claim([claimers.submit(custody.claim, candidate) for candidate in group])
                recorded += self._record(pipeline)
                self._notify(ALIVE)
        return recorded

    def _claim(self, claims: Sequence[Future[Claim | None]]) -> None:
        """Wait for claims and keep them, to be recorded."""
        for made in claims:
            try:
                claim = made.result()
            except Transient as exc:
                if self._stopping:
                    continue  # it was told to leave the claim to the next start
                log.warning("could not be claimed, will be tried again", extra={"why": str(exc)})
                self._untaken += 1
            else:
                if claim is not None:
                    self._unrecorded.append(claim)

    def _record(self, pipeline: Pipeline) -> int:
        """Record the claims that are in work and not yet in the ledger; keep what fails."""
        recorded = 0
        while self._unrecorded:
            claims = self._unrecorded[:_GROUP]
            try:
                pipeline.receive(claims)
            except Transient as exc:
                log.warning("claims could not be recorded", extra={"why": str(exc)})
                break
            del self._unrecorded[:_GROUP]
            self._recorded.tell()
            recorded += len(claims)
        return recorded

    def _feed(self, store: Store, weights: WeightsStore, pipeline: Pipeline) -> None:
        """Take queued studies and feed them to the pipeline (the feeder thread)."""
        active: dict[Area, str] = {}
        look_again = 0.0
        while not self._stopping:
            try:
                if time.monotonic() >= look_again:
                    active = _noticed(active, store, weights)
                    look_again = time.monotonic() + _LEDGER_SECONDS
                taken = store.take(_TAKE, datetime.now(UTC), idle=pipeline.idle)
                pipeline.feed(taken)
                if len(taken) == 1 and taken[0].attempts:
                    pipeline.drain()  # it may have been under way in a process that was killed
            except Transient as exc:
                log.warning("the ledger could not be asked", extra={"why": str(exc)})
                taken = []
            if not taken:
                self._recorded.wait(_LEDGER_SECONDS)
            elif len(taken) < _TAKE:
                time.sleep(_GATHER_SECONDS)


_ENDED = (State.DONE, State.QUARANTINED)


def _catch_up(settings: Settings, store: Store, custody: Custody, pipeline: Pipeline) -> None:
    """Finish what an earlier run left between two steps."""
    if number := store.recover(_DEATHS * settings.attempts):
        log.warning("studies were cut off and are tried again", extra={"studies": number})
    pipeline.receive(custody.pending())
    pipeline.settle_custody(store.unsettled_custody())


def _noticed(active: dict[Area, str], store: Store, weights: WeightsStore) -> dict[Area, str]:
    """Return the active weights now; studies that waited for new ones are queued again."""
    now = {}
    for area in Area:
        try:
            card = weights.active(area)
        except MuraError:
            continue
        if card is not None:
            now[area] = card.sha256
    if changed := [area for area, digest in now.items() if active.get(area) != digest]:
        store.requeue_no_weights(changed)
    return now


def _check_inbox(settings: Settings) -> None:
    try:
        os.scandir(settings.inbox_dir).close()
    except OSError as exc:
        raise Misconfigured(
            f"inbox {settings.inbox_dir}: {exc.strerror}; set `inbox` to the folder that receives"
            " the studies, or make it with `mura-batch init`"
        ) from exc


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Hold the home's lock.

    Raises:
        Misconfigured: the home is missing, or another daemon holds the lock.
    """
    try:
        stream = (settings.home / LOCK_FILE).open("w")
    except OSError as exc:
        cure = "this user must be able to write there"
        if isinstance(exc, (FileNotFoundError, NotADirectoryError)):
            cure = "run `mura-batch init`"
        raise Misconfigured(f"{settings.home}: {exc.strerror}; {cure}") from exc
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Misconfigured(f"another `mura-batch watch` works in {settings.home}") from exc
        yield
