"""The ledger: every write to the database, each method one transaction that can be replayed.

A study is recorded, taken, and committed (or deferred, or failed); what is asked of it meanwhile
counts up its ``request``, so that an outcome that is older than the last request never settles it.
"""

from __future__ import annotations

import os
import threading
from collections import ChainMap, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Self

from sqlalchemy import (
    ColumnElement,
    Connection,
    TextClause,
    and_,
    bindparam,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.engine import Engine

from mura_batch.area import Area
from mura_batch.engine import EngineReader, driver_values, open_engine, reading, writing
from mura_batch.errors import Misconfigured, listed
from mura_batch.intake import Intake, Ledger
from mura_batch.lookup import AMONG, among, chunks, resolve, stored_studies
from mura_batch.records import (
    ClaimRecord,
    Filters,
    Json,
    LabelRow,
    Move,
    Place,
    Recorded,
    Rerun,
    State,
    StoredStudy,
    StudyOutcome,
    Work,
)
from mura_batch.results import (
    NOT_DONE,
    Results,
    active_values,
    conditions,
    filter_values,
    is_stale,
)
from mura_batch.revisions import Placed, Revisions
from mura_batch.schema import files, labels, readings, studies
from mura_batch.worklist import asked_of, fail, log, log_all, queue, settle

_WAITING = (State.NEEDS_AREA, State.NO_WEIGHTS)
_GONE = (Place.DELETED, Place.REPLACED)
_INTERRUPTED = "the program ended while this study was under way: it is tried again, alone"

_DUE = and_(  # queued, and not waiting for a retry
    studies.c.work == Work.QUEUED,
    or_(studies.c.not_before.is_(None), studies.c.not_before <= bindparam("now")),
)
_CUT_OFF = studies.c.last_error.is_not_distinct_from(_INTERRUPTED)
_LONGEST = (studies.c.received_at, studies.c.id)
_NEXT = select(studies.c.id).where(_DUE).limit(bindparam("limit"))
_USUAL = _NEXT.where(~_CUT_OFF).order_by(studies.c.rerun, *_LONGEST)
_ALONE = _NEXT.where(_CUT_OFF).order_by(studies.c.attempts, *_LONGEST)
_BUSY = select(studies.c.id).where(or_(studies.c.work == Work.RUNNING, _DUE)).limit(1)
_RUNNING = update(studies).where(studies.c.id.in_(AMONG)).values(work=Work.RUNNING)
_OF_CLAIMS = select(
    files.c.id, files.c.study_id, files.c.claim, files.c.raw_name, files.c.place
).where(files.c.claim.in_(AMONG))
_LIES = update(files).where(files.c.id == bindparam("number"))
_SOUND = update(files).where(files.c.study_id.in_(AMONG), files.c.problem != "").values(problem="")


class Store(Results):
    """The writer, and what it looks up; answers everything that :class:`Results` does. Thread-safe.

    Every method raises Transient where the database does not answer; nothing was changed then.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(EngineReader(engine))
        self._engine = engine
        self._lock = threading.RLock()
        self._ledger: Ledger | None = None

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the database at a SQLAlchemy URL for reading and writing.

        Raises:
            Misconfigured: it is missing, unreadable, or of another revision; the message names
                the command that fixes it.
        """
        return cls(open_engine(url, read_only=False))

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._lock, writing(self._engine) as connection:
            yield connection

    # ---- claims

    def record(self, claims: Sequence[ClaimRecord], late_hours: float) -> list[Recorded]:
        """Record claims, all or none, and find or make the studies that they belong to.

        DICOM files belong to their Study Instance UID. Others belong to the study that has exactly
        their contents; else a folder's to the study of the same (masked) path whose last arrival
        is within ``late_hours`` or that shares a content; else they make a new study.

        Raises:
            ValueError: a claim has no files.
        """
        if bare := [claim.id for claim in claims if not claim.files]:
            msg = f"claim {bare[0]} has no files"
            raise ValueError(msg)
        left = any(claim.place is Place.INBOX for claim in claims)
        ledger = self._known_files() if left else {}
        news: Ledger = {}
        with self._write() as connection:
            recorded = Intake(connection, ChainMap(news, ledger), late_hours).record(claims)
        ledger.update(news)
        return recorded

    def seen(self, name: str, size: int, mtime_ns: int, inode: int) -> bool:
        """Say whether a file of the inbox, left where it is, has been recorded like this."""
        return self._known_files().get(os.fsencode(name)) == (size, str(mtime_ns), str(inode))

    def moved(self, *moves: Move) -> None:
        """Record where files lie now."""
        if not moves:
            return
        stated = {
            (move.claim, os.fsencode(name)): move.place for move in moves for name in move.names
        }
        changed = defaultdict[tuple[str, str, Place], list[int]](list)
        with self._write() as connection:
            claims = list({move.claim for move in moves})
            for number, study, claim, name, lay in among(connection, _OF_CLAIMS, claims):
                place = stated.get((claim, name), Place(lay))
                if place != lay:
                    changed[study, claim, place].append(number)
            if not changed:
                return
            lies = [
                {"number": number, "place": place}
                for (_, _, place), numbers in changed.items()
                for number in numbers
            ]
            connection.execute(_LIES, lies)
            now = datetime.now(UTC)
            log_all(
                connection,
                (
                    (now, "moved", {"claim": claim, "place": place, "files": len(numbers)}, study)
                    for (study, claim, place), numbers in changed.items()
                ),
            )

    def unsettled_custody(self) -> list[StoredStudy]:
        """Return settled studies that wait for nobody but whose files still lie in work."""
        waits = select(readings.c.id).where(
            readings.c.study_id == studies.c.id, readings.c.state.in_(_WAITING)
        )
        wanted = (
            select(studies.c.id)
            .distinct()
            .select_from(studies.join(files))
            .where(files.c.place == Place.WORK, studies.c.work == Work.SETTLED, ~waits.exists())
            .order_by(studies.c.id)
        )
        with reading(self._engine) as connection:
            return stored_studies(connection, connection.execute(wanted).scalars())

    # ---- studies by their ids

    def resolve(self, study: str) -> str:
        """Return the id of the study that ``study`` names, see :func:`lookup.resolve`.

        Raises:
            Misconfigured: no study or several.
        """
        with reading(self._engine) as connection:
            return resolve(connection, study)

    def study(self, study_id: str) -> StoredStudy:
        """Return a study with its files and readings.

        Raises:
            Misconfigured: there is no such study.
        """
        found = self.studies([study_id])
        if not found:
            raise Misconfigured(f"No study {study_id!r}: see `mura-batch query`.")
        return found[0]

    def studies(self, ids: Iterable[str]) -> list[StoredStudy]:
        """Return those of the studies that are stored, in the order of ``ids``."""
        with reading(self._engine) as connection:
            return stored_studies(connection, ids)

    # ---- the queue

    def take(self, limit: int, now: datetime, *, idle: bool = True) -> list[StoredStudy]:
        """Mark up to ``limit`` queued studies as running and return them.

        New studies come before reruns, and longer waiting ones first. Those that were under way
        when a process was killed come after all others, one at a time, and only where nothing
        else is under way (``idle``): so that the one that ends the program is found.
        """
        with self._write() as connection:
            ids = connection.execute(_USUAL, {"now": now, "limit": limit}).scalars().all()
            if not ids and idle:
                ids = connection.execute(_ALONE, {"now": now, "limit": 1}).scalars().all()
            for some in chunks(ids):
                connection.execute(_RUNNING, {AMONG.key: some})
            return stored_studies(connection, ids)

    def busy(self, now: datetime) -> bool:
        """Return whether any study is running, or queued and due."""
        with reading(self._engine) as connection:
            return connection.execute(_BUSY, {"now": now}).first() is not None

    def recover(self, most: int) -> int:
        """Queue again what an earlier process was running; return how many.

        Each of them counts one more attempt. One that ran alone (see :meth:`take`) and has come
        to ``most`` attempts fails: it may be what ends the program.
        """
        running = studies.c.work == Work.RUNNING
        suspect = and_(running, studies.c.last_error == _INTERRUPTED)
        again = {"work": Work.QUEUED, "last_error": _INTERRUPTED}
        with self._write() as connection:
            given_up = select(studies.c.id, studies.c.attempts + 1)
            given_up = given_up.where(suspect, studies.c.attempts + 1 >= most)
            for study, times in connection.execute(given_up).all():
                reason = (
                    f"the program ended {times} times while this study was under way: it may be"
                    f" the cause; look at its files, then `mura-batch rerun {study}`"
                )
                fail(connection, study, "interrupted", reason, datetime.now(UTC))
                settle(connection, {study}, fresh=True)
            queued = update(studies).where(running)
            return connection.execute(
                queued.values(attempts=studies.c.attempts + 1, **again)
            ).rowcount

    def commit(self, *outcomes: StudyOutcome) -> list[StoredStudy]:
        """Store what one pass over each study found out: results, readings, problems, events.

        All or none, and each study at most once. A key that is stored already keeps its row,
        except on a rerun, which makes a new one. The studies are settled, or queued again where
        more was asked of them meanwhile; returned is what is stored of them now.

        Raises:
            Misconfigured: a study, or a result that a reading names, is not stored.
            ValueError: no readings; every study keeps a row.
        """
        if bare := [outcome.study_id for outcome in outcomes if not outcome.readings]:
            msg = f"an outcome of study {bare[0]} without a reading"
            raise ValueError(msg)
        with self._write() as connection:
            asked = asked_of(connection, [outcome.study_id for outcome in outcomes])
            fresh = {o.study_id for o in outcomes if asked[o.study_id].request == o.request}
            reruns = {study for study in fresh if asked[study].rerun}
            revisions = Revisions(connection, outcomes, reruns)
            placed = revisions.place()
            revisions.show(placed, {study: row.received_at for study, row in asked.items()})
            _note_problems(connection, outcomes)
            log_all(connection, _happened(placed, outcomes))
            settle(connection, fresh, fresh=True)
            settle(connection, set(asked) - fresh, fresh=False)
            return stored_studies(connection, asked)

    def defer(self, study_id: str, error: str, not_before: datetime) -> int:
        """Queue a study for another try; return how many tries have failed."""
        with self._write() as connection:
            attempts = int(asked_of(connection, [study_id])[study_id].attempts) + 1
            connection.execute(
                update(studies)
                .where(studies.c.id == study_id)
                .values(
                    work=Work.QUEUED, attempts=attempts, last_error=error, not_before=not_before
                )
            )
            detail = {"error": error, "attempts": attempts}
            log(connection, datetime.now(UTC), "deferred", detail, study_id)
            return attempts

    def fail(self, study_id: str, request: int, code: str, reason: str, at: datetime) -> None:
        """Give a study up: all its readings fail, with what they last showed kept."""
        with self._write() as connection:
            fresh = asked_of(connection, [study_id])[study_id].request == request
            fail(connection, study_id, code, reason, at)
            settle(connection, {study_id}, fresh=fresh)

    # ---- asked again

    def requeue_no_weights(self, areas: Iterable[Area]) -> int:
        """Queue the studies that waited for weights of these areas; return how many."""
        waiting = select(readings.c.study_id).where(
            readings.c.state == State.NO_WEIGHTS, text(NOT_DONE), readings.c.area.in_(list(areas))
        )
        with self._write() as connection:
            wanted = select(studies.c.id).where(
                studies.c.id.in_(waiting), studies.c.work == Work.SETTLED
            )
            ids = list(connection.execute(wanted).scalars())
            queue(connection, ids, "weights_came", {})
            return len(ids)

    def rerun(self, which: Rerun, set_area: Area | None = None) -> list[str]:
        """Queue studies to be scored again and return their ids.

        ``set_area`` is a person's word: it counts for the undecided views where the study waits
        for an area, else for all of its views, and for images that come later. Studies of which
        files were deleted after scoring are passed over when a filter chose them, unless a part
        of them has not ended.

        Raises:
            Misconfigured: nothing was chosen, an id is unknown or ambiguous, or the files of a
                study that was named are deleted.
        """
        nothing = which.filters in {None, Filters()}
        if nothing and not (which.studies or which.failed or which.stale is not None):
            raise Misconfigured("Say which studies: ids, filters, --failed or --stale.")
        with self._write() as connection:
            named = [resolve(connection, study) for study in which.studies]
            chosen = _chosen(connection, which, named)
            ids = _with_files(connection, chosen)
            if missing := sorted(set(named) & (set(chosen) - set(ids))):
                raise Misconfigured(
                    f"The files of {', '.join(missing)} are deleted: drop them in again."
                )
            if set_area is not None:
                _set_area(connection, ids, set_area)
            queue(connection, ids, "rerun", {"set_area": set_area} if set_area else {}, rerun=True)
            return ids

    # ---- people's labels, and the log

    def set_labels(self, truth: Iterable[LabelRow]) -> int:
        """Store labels, all or none; a later one of the same study and area replaces the earlier.

        Raises:
            Misconfigured: naming the first studies that are unknown or ambiguous.
        """
        problems = []
        count = 0
        with self._write() as connection:
            for row in truth:
                try:
                    _label(connection, row, resolve(connection, row.study))
                    count += 1
                except Misconfigured as exc:
                    problems.append(str(exc))
            if problems:
                raise Misconfigured(f"No label was stored: {listed(problems)}")
        return count

    def _known_files(self) -> Ledger:
        """Return the ledger of files that were left in the inbox, read once."""
        with self._lock:
            if self._ledger is None:
                columns = (files.c.raw_name, files.c.size, files.c.mtime_ns, files.c.inode)
                wanted = select(*columns).where(files.c.place == Place.INBOX)
                with reading(self._engine) as connection:
                    rows = connection.execute(wanted)
                    self._ledger = {row[0]: (row[1], row[2], row[3]) for row in rows}
            return self._ledger


# ---- rows of one study


def _happened(
    placed: Iterable[Placed], outcomes: Iterable[StudyOutcome]
) -> Iterator[tuple[datetime, str, Json, str]]:
    """Yield what the log keeps of a pass: how each area ended, and what else was seen."""
    for each in placed:
        reading = each.reading
        how = {"area": reading.area or "", "result": each.result, "code": reading.reason_code}
        yield each.outcome.at, reading.state, how, each.outcome.study_id
    for outcome in outcomes:
        for what, detail in outcome.events:
            yield outcome.at, what, detail, outcome.study_id


def _note_problems(connection: Connection, outcomes: Sequence[StudyOutcome]) -> None:
    """Keep with each file why this pass could not score it, or that it could."""
    for some in chunks([outcome.study_id for outcome in outcomes]):
        connection.execute(_SOUND, {AMONG.key: some})
    for outcome in outcomes:
        for problem in outcome.problems:
            same = and_(files.c.study_id == outcome.study_id, files.c.sha256 == problem.sha256)
            why = f"{problem.code}: {problem.message}"
            connection.execute(update(files).where(same).values(problem=why))


def _chosen(connection: Connection, which: Rerun, named: list[str]) -> list[str]:
    filters = which.filters or Filters()
    stale = which.stale or {}
    wanted: list[ColumnElement[bool] | TextClause] = [text(one) for one in conditions(filters)]
    if which.studies:
        wanted.append(studies.c.id.in_(named))
    either: list[ColumnElement[bool] | TextClause] = []
    if which.failed:
        either.append(and_(readings.c.state == State.FAILED, studies.c.work == Work.SETTLED))
    if which.stale is not None:
        either.append(text(is_stale("readings.area", "readings.weights", stale)))
    if either:
        wanted.append(or_(*either))
    chosen = (
        select(studies.c.id)
        .select_from(readings.join(studies))
        .where(*wanted)
        .group_by(studies.c.id)
    )
    values = driver_values(connection, filter_values(filters) | active_values(stale))
    ordered = chosen.order_by(studies.c.id).limit(filters.limit)
    return list(connection.execute(ordered, values).scalars())


def _with_files(connection: Connection, ids: Sequence[str]) -> list[str]:
    """Return those of the studies that still have their files, or a part that has none scored.

    A settled study of which a scored file is deleted would only lose its result.
    """
    present: set[str] = set()
    lost: set[str] = set()
    open_states = (State.QUEUED, State.FAILED, *_WAITING)
    for some in chunks(ids):
        of = select(files.c.study_id).where(files.c.study_id.in_(some))
        present.update(connection.execute(of.where(files.c.place.not_in(_GONE))).scalars())
        ends = select(readings.c.id).where(
            readings.c.study_id == files.c.study_id, readings.c.state.in_(open_states)
        )
        settled = of.where(files.c.place == Place.DELETED, ~ends.exists())
        lost.update(connection.execute(settled).scalars())
    return [study for study in ids if study in present - lost]


def _set_area(connection: Connection, ids: Sequence[str], area: Area) -> None:
    undecided = select(readings.c.study_id).where(
        readings.c.state == State.NEEDS_AREA, text(NOT_DONE)
    )
    waiting = studies.c.id.in_(undecided)
    for some in chunks(ids):
        for which, everywhere in ((waiting, False), (~waiting, True)):
            values = {"set_area": area, "set_all": everywhere}
            chosen = and_(studies.c.id.in_(some), which)
            connection.execute(update(studies).where(chosen).values(**values))


def _label(connection: Connection, row: LabelRow, study: str) -> None:
    at = row.at or datetime.now(UTC)
    area = row.area or ""
    values = {"label": row.label, "by": row.by, "at": at}
    same = and_(labels.c.study_id == study, labels.c.area == area)
    if not connection.execute(update(labels).where(same).values(**values)).rowcount:
        connection.execute(insert(labels).values(study_id=study, area=area, **values))
    log(connection, at, "label", {"area": area, "label": row.label, "by": row.by}, study)
