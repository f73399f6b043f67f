"""The way of a study, from a claim to its place in the archive.

    claimed → recorded → taken → decided → decoded → scored → overlay → committed → moved

Each arrow can be cut by a crash. What lies before the commit is done again with the same names
and the same numbers; what lies after it is found by :meth:`Pipeline.settle_custody`. The steps
are logged at debug level by the logger ``mura_batch.steps`` under these names.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Self

from mura_batch.area import Area
from mura_batch.assessment import PersonAnswer, divide
from mura_batch.config import Settings
from mura_batch.custody import Claim, Custody
from mura_batch.errors import (
    MuraError,
    NoWeights,
    Rejected,
    Transient,
    WeightsRefused,
)
from mura_batch.gpu_decode import decode_on_gpu
from mura_batch.moves import MAX_BYTES, digest
from mura_batch.network_input import Luminance
from mura_batch.outcome import PartWork, Pass, Slot, part_work, study_outcome
from mura_batch.overlay import Caption, Thumbnail, overlay_name, render, thumbnail, write_overlay
from mura_batch.radiograph import read_film
from mura_batch.reasons import Reason, what_to_do
from mura_batch.records import (
    ClaimedFile,
    ClaimRecord,
    Move,
    Place,
    Recorded,
    State,
    StoredFile,
    StoredStudy,
    StudyOutcome,
)
from mura_batch.scoring import Scorer, ViewScore
from mura_batch.store import Store
from mura_batch.study import Kind, SourceFile, Study, View, identify, read_study
from mura_batch.weights import Card, WeightsStore

log = logging.getLogger(__name__)
_steps = logging.getLogger("mura_batch.steps")

_WAITING = {State.QUEUED, State.RUNNING, State.NEEDS_AREA, State.NO_WEIGHTS, State.FAILED}
_NEVER_OPENED = {"symbolic_link", "not_a_file"}  # what a claim found; other files are read again
_LEFT = {Place.INBOX, Place.OUTSIDE}
_GROUP = 32  # studies that are committed together at most
_GATHER_SECONDS = 0.5  # how long an ended study waits for others that are under way
_LONGEST_WAIT = 86400.0  # seconds between two tries of a study
_VIEWS_IN_FLIGHT = 4  # batches' worth of views between decode and overlay


@dataclass(slots=True)
class _Job:
    """One study on its way through the threads."""

    stored: StoredStudy
    study: Study
    parts: list[PartWork]
    leaves_files: bool = False  # where others can still write them
    open_views: int = 1  # one more than the views, until all of them are on their way
    passing: MuraError | None = None
    committed: tuple[StudyOutcome, StoredStudy] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(self) -> Pass:
        """Return what the pass came to."""
        return Pass(self.stored, self.study, self.parts, self.passing)


class Pipeline:
    """Takes claims in, scores queued studies, and leaves every file in its place.

    Args:
        decoders: threads that decode; overlays have as many of their own, commits one.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        custody: Custody,
        weights: WeightsStore,
        scorer: Scorer,
        *,
        decoders: int | None = None,
    ) -> None:
        if settings.gpu_decode:
            decode_on_gpu()
        self.finished: Counter[State] = Counter()
        self._settings = settings
        self._store = store
        self._custody = custody
        self._weights = weights
        self._scorer = scorer
        threads = decoders or max(2, min(8, _processors()))
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self._finishers = ThreadPoolExecutor(threads, "finish")
        self._closer = ThreadPoolExecutor(1, "close")
        self._ended: deque[_Job] = deque()
        self._window = threading.BoundedSemaphore(max(64, _VIEWS_IN_FLIGHT * settings.batch))
        self._in_flight = 0
        self._untold: deque[tuple[StoredStudy, MuraError]] = deque()
        self._telling = threading.Lock()
        self._idle = threading.Condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()
        self._decoders.shutdown()
        self._finishers.shutdown()
        self._closer.shutdown()

    # ---- intake

    def receive(self, claims: Sequence[Claim], *, outside: bool = False) -> list[Recorded]:
        """Record claims in the ledger; the studies they belong to are queued if they are news.

        Claims from ``outside`` the site stay where they are, and the caller feeds their studies.
        """
        for claim in claims:
            _step("claimed", claim=claim.id)
        records = [self._claim_record(claim) for claim in claims]
        if outside:
            root = str(self._settings.inbox_dir)
            records = [
                replace(record, place=Place.OUTSIDE, root=root, queue=False) for record in records
            ]
        recorded = self._store.record(records, self._settings.late_hours)
        for one in recorded:
            log.info("study received", extra={"study": one.study_id, "as": one.outcome})
            _step("recorded", study=one.study_id)
        known = [one.study_id for one in recorded if one.outcome in {"duplicate", "replayed"}]
        if not outside:
            self.settle_custody(self._store.studies(known))
        return recorded

    def _claim_record(self, claim: Claim) -> ClaimRecord:
        study_uid = accession = None
        for file in claim.files if claim.kind is Kind.DICOM else claim.files[:1]:
            if not file.problem:
                header = identify(file.path)
                study_uid, accession = header.study_uid, header.accession
            if study_uid:
                break
        return ClaimRecord(
            id=claim.id,
            kind=claim.kind,
            key=claim.key,
            received_at=claim.received_at,
            settled_by=claim.settled_by,
            files=tuple(
                ClaimedFile(
                    f.name, f.sha256, f.size, found.mtime_ns, found.inode, problem=f.problem
                )
                for f, found in zip(claim.files, claim.fingerprints, strict=True)
            ),
            study_uid=study_uid,
            accession=accession,
            place=Place.INBOX if self._settings.archive == "leave" else Place.WORK,
        )

    # ---- scoring

    def expect(self) -> None:
        """Have the network made ready for studies that may come, where all areas have the same."""
        cards = {card.sha256: card for area in Area if (card := self._active(area)) is not None}
        if len(cards) == 1:
            self._scorer.expect(*cards.values())

    def feed(self, studies: Iterable[StoredStudy]) -> None:
        """Start the studies that were taken from the queue; waits where too much is in flight.

        What becomes active meanwhile counts from the next call on.
        """
        self._tell()
        active = cache(self._active)
        with self._scorer.feeding():
            for stored in studies:
                with self._idle:
                    self._in_flight += 1
                _step("taken", study=stored.id)
                self._bounded(stored, partial(self._start, stored, active))

    @property
    def idle(self) -> bool:
        """Whether no study is in flight."""
        with self._idle:
            return self._in_flight == 0

    def drain(self) -> None:
        """Wait until every study that was fed is finished."""
        with self._idle:
            self._idle.wait_for(lambda: self._in_flight == 0)

    def _bounded(self, stored: StoredStudy, action: Callable[[], None]) -> None:
        """Run a step of one study; what goes wrong in it stays with that study."""
        error = _attempt(stored.id, action)
        if error is None:
            return
        self._untold.append((stored, error))
        self._tell()
        again = isinstance(error, Transient) and stored.attempts + 1 < self._settings.attempts
        self._leave(*(() if again else (State.FAILED,)))

    def _tell(self) -> None:
        """Write failures to the ledger; what it does not take now is written with the next."""
        with self._telling:
            for _ in range(len(self._untold)):
                stored, error = self._untold.popleft()
                trouble = _attempt(stored.id, partial(self._give_up, stored, error))
                if trouble is not None:
                    log.error("the ledger could not be written", extra={"study": stored.id})
                    self._untold.append((stored, error))

    def _give_up(self, stored: StoredStudy, error: MuraError) -> None:
        """Try the study again later, or fail it."""
        if isinstance(error, Transient):
            self._defer(stored, error)
        else:
            code = error.code if isinstance(error, Rejected) else "misconfigured"
            self._fail(stored, code, str(error))

    def _active(self, area: Area) -> Card | None:
        try:
            return self._weights.active(area)
        except MuraError as exc:
            log.warning("weights refused", extra={"area": area, "error": str(exc)})
            return None

    def _start(self, stored: StoredStudy, active: Callable[[Area], Card | None]) -> None:
        """Decide the areas and send every view that needs a score on its way."""
        if not stored.files:
            why = "other content came under its names before it could be read: see the newer study"
            raise Rejected("replaced", why)
        study = read_study([self._source(stored, file) for file in stored.files])
        answer = PersonAnswer(stored.set_area, stored.set_all) if stored.set_area else None
        divided = divide(study, self._settings.rules, answer)
        parts = [part_work(part, stored, active) for part in divided]
        _step("decided", study=stored.id)
        job = _Job(stored, study, parts, any(file.place in _LEFT for file in stored.files))
        for part in parts:
            for slot in part.slots:
                if slot.error is None and part.card is not None:
                    self._admit(job, slot, part.card)
        self._view_done(job)

    def _source(self, stored: StoredStudy, file: StoredFile) -> SourceFile:
        if file.place is Place.DELETED:
            path, problem = self._settings.home, "deleted"
        else:
            path = self._custody.locate(file.place, stored.id, file.claim, file.name)
            found = file.problem.partition(": ")[0]
            never = "too_large" if file.size > MAX_BYTES else ""
            problem = found if found in _NEVER_OPENED else never
        name = file.source if file.place is Place.OUTSIDE else file.name
        return SourceFile(path, name, file.sha256, file.size, problem)

    def _admit(self, job: _Job, slot: Slot, card: Card) -> None:
        if not self._window.acquire(blocking=False):
            with self._scorer.pausing():
                self._window.acquire()
        with job.lock:
            job.open_views += 1
        self._scorer.announce(card)
        self._decoders.submit(self._decode, job, slot, card)

    def _decode(self, job: _Job, slot: Slot, card: Card) -> None:
        """Read one view and hand it to the scorer (a decoder thread)."""

        def action() -> None:
            view = slot.view
            luminance, seen = read_film(
                view.file.path, view.frame, card.preprocessing, self._scorer.resize
            )
            if job.leaves_files:
                _still_the_same(view.file)
            picture = thumbnail(luminance, seen.box) if self._settings.overlays else None
            _step("decoded", study=job.stored.id)
            submitted.append((seen.pixels, picture))

        submitted: list[tuple[Luminance, Thumbnail | None]] = []
        if (error := _attempt(job.stored.id, action)) is not None:
            self._scorer.withdraw(card)
            self._view_failed(job, slot, error)
            return
        pixels, picture = submitted[0]
        self._scorer.submit(card, pixels).add_done_callback(
            lambda score: self._finishers.submit(self._scored, job, slot, card, picture, score)
        )

    def _scored(
        self,
        job: _Job,
        slot: Slot,
        card: Card,
        picture: Thumbnail | None,
        score: Future[ViewScore],
    ) -> None:
        """Keep one view's score and write its overlay (a finisher thread)."""

        def action() -> None:
            slot.score = score.result()
            _step("scored", study=job.stored.id)
            if picture is not None:
                slot.overlay = self._write_overlay(job.study, slot.view, slot.score, card, picture)
                _step("overlay", study=job.stored.id)

        error = _attempt(job.stored.id, action)
        if error is None:
            self._window.release()
            self._view_done(job)
        else:
            self._view_failed(job, slot, error)

    def _write_overlay(
        self, study: Study, view: View, score: ViewScore, card: Card, picture: Thumbnail
    ) -> str:
        name = overlay_name(study.digest, view.file.sha256, view.frame, card.sha256, card.area)
        target = self._settings.overlays_dir / name
        caption = Caption(card, score.probability)
        write_overlay(target, render(picture, score.map, caption, self._settings.overlay_scale))
        return f"{self._settings.overlays_dir.name}/{name}"

    def _view_failed(self, job: _Job, slot: Slot, error: MuraError) -> None:
        self._window.release()
        if isinstance(error, Rejected):
            slot.error = error
        else:
            job.passing = error
        self._view_done(job)

    def _view_done(self, job: _Job) -> None:
        with job.lock:
            job.open_views -= 1
            last = job.open_views == 0
        if last:
            with self._idle:
                self._ended.append(job)
                self._idle.notify_all()
            self._closer.submit(self._close)

    # ---- outcome

    def _close(self) -> None:
        """Commit the studies that have ended since and move their files (the closer).

        All at once where that works, else one by one; none is committed twice.
        """
        with self._idle:
            if self._ended:
                self._idle.wait_for(self._gathered, _GATHER_SECONDS)
            jobs = [self._ended.popleft() for _ in range(min(_GROUP, len(self._ended)))]
        if not jobs:
            return
        if len(sound := [job for job in jobs if _lasting(job.passing) is None]) > 1:
            _attempt("several", partial(self._commit, sound))
        for job in jobs:
            if job.committed is None:
                self._bounded(job.stored, partial(self._commit, [job]))
        if (error := _attempt("several", partial(self._look_again, jobs))) is not None:
            log.warning("new weights could not be looked for", extra={"why": str(error)})
        done = [(job.stored, *job.committed) for job in jobs if job.committed is not None]
        moving = partial(self.settle_custody, [now for _, _, now in done])
        moved = _attempt("several", moving) is None
        for stored, outcome, now in done:
            self._bounded(stored, partial(self._end, outcome, () if moved else (now,)))

    def _gathered(self) -> bool:
        return len(self._ended) >= min(_GROUP, self._in_flight)

    def _commit(self, jobs: Sequence[_Job]) -> None:
        """Commit what was found out, all or none; every view has its score or error."""
        for job in jobs:
            if (error := _lasting(job.passing)) is not None:
                raise error
            if job.passing is not None:
                log.warning("weights refused", extra={"study": job.stored.id})
        outcomes = [study_outcome(job.ended(), self._settings) for job in jobs]
        now = {stored.id: stored for stored in self._store.commit(*outcomes)}
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.committed = outcome, now[outcome.study_id]
            _step("committed", study=outcome.study_id)
            for problem in outcome.problems:
                lost = {"study": outcome.study_id, "code": problem.code}
                log.warning("a file could not be scored", extra=lost)
            for reading in outcome.readings:
                facts = {"study": outcome.study_id, "area": reading.area, "state": reading.state}
                log.info("study finished", extra=facts)

    def _look_again(self, jobs: Sequence[_Job]) -> None:
        """Queue again what was committed without weights that came while it was under way."""
        unscored = {
            (work.part.area, work.card)
            for job in jobs
            for work in job.parts
            if work.known is None and not any(slot.score for slot in work.slots)
        }
        came = [
            area
            for area, card in unscored
            if area is not None and self._active(area) not in {None, card}
        ]
        if came:
            self._store.requeue_no_weights(came)

    def _end(self, outcome: StudyOutcome, unmoved: Sequence[StoredStudy]) -> None:
        """Move the files that could not be moved with others', and let the study go."""
        self.settle_custody(unmoved)
        self._leave(*(reading.state for reading in outcome.readings))

    def _defer(self, stored: StoredStudy, error: MuraError) -> None:
        attempt = stored.attempts + 1
        if attempt >= self._settings.attempts:
            self._fail(stored, "attempts_exhausted", str(error))
            return
        wait = min(self._settings.retry_seconds * 2 ** min(attempt - 1, 20), _LONGEST_WAIT)
        due = datetime.now(UTC) + timedelta(seconds=wait)
        self._store.defer(stored.id, str(error), due)
        log.warning("study will be tried again", extra={"study": stored.id, "attempt": attempt})

    def _fail(self, stored: StoredStudy, code: str, reason: str) -> None:
        self._store.fail(stored.id, stored.request, code, reason, datetime.now(UTC))
        log.error("study failed", extra={"study": stored.id, "code": code})

    def _leave(self, *states: State) -> None:
        with self._idle:
            self.finished.update(states)
            self._in_flight -= 1
            self._idle.notify_all()

    # ---- custody

    def settle_custody(self, studies: Iterable[StoredStudy]) -> None:
        """Move studies' files to where their stored state says they belong; replayable."""
        moves: list[Move] = []
        moved: list[str] = []
        for stored in studies:
            states = {reading.state for reading in stored.readings}
            if states & _WAITING or not states:
                continue
            whole = states == {State.QUARANTINED}
            moves += self._quarantine(stored) if whole else self._release(stored)
            moved.append(stored.id)
        self._store.moved(*moves)
        for study in moved:
            _step("moved", study=study)

    def _quarantine(self, stored: StoredStudy) -> list[Move]:
        """Put every file of a study that can never be scored in quarantine, with the reason."""
        reading = stored.readings[0]
        reason = _reason(reading.reason_code, reading.reason)
        moves = []
        for claim, names in _by_claim(stored, Place.WORK, Place.ARCHIVE).items():
            self._custody.to_quarantine(stored.id, claim, reason)
            moves.append(Move(claim, Place.QUARANTINE, names))
        for claim, names in _by_claim(stored, Place.INBOX).items():
            self._custody.to_quarantine(stored.id, claim, reason, sources=names)
        return moves

    def _release(self, stored: StoredStudy) -> list[Move]:
        """Archive (or delete) a scored study's files; its unreadable ones go to quarantine."""
        moves = []
        saved = _by_claim(stored, Place.QUARANTINE, whole=False)  # by a person, or a second look
        for claim in saved:
            self._custody.reopen(stored.id, claim)
        for file in stored.files:
            back = file.place is Place.QUARANTINE and file.claim in saved
            if file.problem and (back or file.place in {Place.WORK, Place.INBOX}):
                code, _, message = file.problem.partition(": ")
                reason = _reason(code, message or "this file could not be scored")
                self._custody.quarantine_file(stored.id, file.claim, file.name, reason)
                if file.place is Place.WORK:
                    moves.append(Move(file.claim, Place.QUARANTINE, (file.name,)))
        for claim in _by_claim(stored, Place.INBOX, whole=False):
            self._custody.absolve(stored.id, claim)
        for claim, names in _by_claim(stored, Place.WORK, Place.QUARANTINE, whole=False).items():
            if self._settings.archive == "delete":
                self._custody.discard(claim)
                moves.append(Move(claim, Place.DELETED, names))
            else:
                self._custody.to_archive(stored.id, claim)
                moves.append(Move(claim, Place.ARCHIVE, names))
        return moves


def _processors() -> int:
    """Return how many processors this process may use, which can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _attempt(study_id: str, action: Callable[[], None]) -> MuraError | None:
    """Run ``action`` and return what went wrong, as an error of the tree (the study boundary)."""
    try:
        action()
    except MuraError as exc:
        return exc
    except (OSError, MemoryError) as exc:
        return Transient(
            f"{type(exc).__name__}: {os.strerror(exc.errno or 0)}"
            if isinstance(exc, OSError)
            else "out of memory"
        )
    except Exception as exc:  # noqa: BLE001 - a defect costs one study, not the daemon
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        where = f"{type(exc).__name__} in {frame.name}, line {frame.lineno}"
        log.error("defect in this program", extra={"study": study_id, "error": where})  # noqa: TRY400 - a message could hold what logs must not
        return Rejected("defect", f"a defect in this program: {where}")
    return None


def _reason(code: str, message: str) -> Reason:
    return Reason(code, "score", message, what_to_do(code))


def _by_claim(
    stored: StoredStudy, *places: Place, whole: bool = True
) -> dict[str, tuple[str, ...]]:
    """Return by claim the names of the files in ``places``; if not ``whole``, of sound ones."""
    found: dict[str, tuple[str, ...]] = {}
    for file in stored.files:
        if file.place in places and (whole or not file.problem):
            found[file.claim] = (*found.get(file.claim, ()), file.name)
    return found


def _still_the_same(file: SourceFile) -> None:
    """Refuse what was read of a file that stays where others can write it, if they did.

    Raises:
        Transient: its content is not the one that was claimed.
    """
    if digest(file.path, file.name, os.lstat(file.path)) != (file.sha256, ""):
        raise Transient("a file was changed after it was found: it is read again as it is now")


def _lasting(passing: MuraError | None) -> MuraError | None:
    """Return what keeps a study from being finished now; without weights it can wait for them."""
    return None if isinstance(passing, (NoWeights, WeightsRefused)) else passing


def _step(name: str, **ids: str) -> None:
    _steps.debug(name, extra=ids)
