"""Reading the database: ``query``, ``export``, ``status``, and what the daemon looks up.

Opened read-only, also while a daemon writes. Nothing heavy is imported here: a query is a process
that has to answer at once.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar, TypeVarTuple, cast

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    CursorResult,
    Float,
    Row,
    Select,
    String,
    Table,
    and_,
    bindparam,
    case,
    false,
    func,
    literal,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.engine import Engine
from sqlalchemy.sql.selectable import TypedReturnsRows

from mura_batch.area import Area
from mura_batch.engine import check_revision, open_engine, reading
from mura_batch.errors import Misconfigured
from mura_batch.records import (
    Counts,
    EventRow,
    Filters,
    ImageRow,
    LabelRow,
    Place,
    State,
    StoredFile,
    StoredReading,
    StoredStudy,
    StudyRow,
    Work,
)
from mura_batch.schema import events, files, labels, readings, results, studies, views

_BOUND = 500  # values in one IN (…)
_T = TypeVar("_T")
_Columns = TypeVarTuple("_Columns")
_STREAM = 1000  # rows fetched at a time: memory stays flat however long the answer is
_HEX = re.compile("[0-9a-f]+")
_STUDY_COLUMNS = len(StudyRow.__dataclass_fields__) - 1  # the notice is no column


class Results:
    """The stored studies and results, read-only; use as a context manager. Thread-safe."""

    _READ_ONLY: ClassVar = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the database at a SQLAlchemy URL.

        Raises:
            Misconfigured: it is missing, unreadable, or of another revision; the message names
                the command that fixes it.
        """
        engine = open_engine(url, read_only=cls._READ_ONLY)
        try:
            check_revision(engine)
        except Misconfigured:
            engine.dispose()
            raise
        return cls(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._engine.dispose()

    # ---- rows for people

    def query(self, filters: Filters = Filters()) -> Iterator[StudyRow]:  # noqa: B008 - frozen
        """Yield one row a study and area, newest arrival first; superseded revisions (with
        ``history``) follow their successors. Streams: the database is read as rows are taken.
        """
        parts = [_current(filters)]
        if filters.history:
            parts.append(_superseded(filters))
        for row in self._stream(parts, filters.limit):
            yield _study_row(row)

    def images(self, filters: Filters = Filters()) -> Iterator[ImageRow]:  # noqa: B008 - frozen
        """Yield one row a view of the rows that :meth:`query` gives, in the same order.

        An area without a result has a row for each file of its study instead.
        """
        for row in self._stream(_view_parts(filters), filters.limit):
            first = _STUDY_COLUMNS + 1  # after the column that rows are sorted by
            yield ImageRow(_study_row(row), *row[first : first + 5])

    def events(self, study_id: str) -> list[EventRow]:
        """Return what happened to a study, oldest first."""
        wanted = (
            select(events.c.at, events.c.study_id, events.c.what, events.c.detail)
            .where(events.c.study_id == study_id)
            .order_by(events.c.id)
        )
        with reading(self._engine) as connection:
            return [EventRow(*row) for row in connection.execute(wanted)]

    def labels(self) -> Iterator[LabelRow]:
        """Yield people's labels, by study and area."""
        columns = (labels.c.study_id, labels.c.label, labels.c.area, labels.c.by, labels.c.at)
        ordered = select(*columns).order_by(labels.c.study_id, labels.c.area)
        with reading(self._engine) as connection:
            for study, label, area, by, at in connection.execute(ordered):
                word = cast('Literal["positive", "negative"]', label)
                yield LabelRow(study, word, _area(area), by, at)

    # ---- numbers for `status`

    def counts(self, since: datetime) -> Counts:
        """Count the rows in each state, the queue, and what was scored since a moment."""
        work = select(studies.c.work, func.count(), func.min(studies.c.received_at))
        by_state = select(readings.c.state, func.count()).group_by(readings.c.state)
        at_work = (  # few: what settled is counted without a look at the studies
            select(studies.c.work, readings.c.state, func.count())
            .select_from(readings.join(studies))
            .where(studies.c.work.in_((Work.QUEUED, Work.RUNNING)))
            .group_by(studies.c.work, readings.c.state)
        )
        scored = select(func.count(), func.coalesce(func.sum(results.c.views), 0))
        with reading(self._engine) as connection:
            by_work = {row[0]: row for row in connection.execute(work.group_by(studies.c.work))}
            states = Counter({State(s): count for s, count in connection.execute(by_state)})
            for doing, settled, count in connection.execute(at_work):
                states[State(settled)] -= count
                states[State(doing)] += count
            made = connection.execute(scored.where(results.c.scored_at >= since)).one()
            last = connection.execute(select(func.max(results.c.scored_at))).scalar()
        open_work = [by_work[w] for w in (Work.QUEUED, Work.RUNNING) if w in by_work]
        return Counts(
            states=+states,
            studies=sum(row[1] for row in by_work.values()),
            queued=by_work[Work.QUEUED][1] if Work.QUEUED in by_work else 0,
            running=by_work[Work.RUNNING][1] if Work.RUNNING in by_work else 0,
            oldest=min((row[2] for row in open_work), default=None),
            results=made[0],
            views=made[1],
            last_scored_at=last,
        )

    def stale(self, active: Mapping[Area, str]) -> int:
        """Count current results of other weights than their area's active ones."""
        wanted = select(func.count()).select_from(readings.join(results)).where(is_stale(active))
        with reading(self._engine) as connection:
            return connection.execute(wanted).scalar_one()

    # ---- what the daemon looks up

    def resolve(self, study: str) -> str:
        """Return the id that ``study`` is, or is the only beginning of.

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

    def _stream(self, parts: list[Select[Any]], limit: int | None) -> Iterator[Any]:
        """Run the parts as one statement, in the rows' order."""
        if len(parts) == 1:
            statement: Any = parts[0]
        else:
            statement = select(union_all(*parts).subquery())
        by = statement.selected_columns
        order = [by.received_at.desc(), by.study.desc(), by.sort_area, by.revision.desc()]
        if "sort_view" in by:
            order.append(by.sort_view)
        statement = statement.order_by(*order).limit(limit)
        with reading(self._engine) as connection:
            streaming = connection.execution_options(yield_per=_STREAM)
            rows: CursorResult[Any] = streaming.execute(statement)
            yield from rows


# ---- looked up inside a transaction, also by the store

# Statements that run for every study stand ready: to build one costs more than to run it.
AMONG: BindParameter[Any] = bindparam("among", expanding=True)  # what `among` looks up
_STUDIES = select(
    *(
        studies.c[name]
        for name in StoredStudy.__dataclass_fields__
        if name not in {"files", "readings", "scored"}
    )
).where(studies.c.id.in_(AMONG))
_FILES = (
    select(
        files.c.study_id,
        files.c.claim,
        files.c.raw_name,
        files.c.source,
        files.c.sha256,
        files.c.size,
        files.c.place,
        files.c.problem,
    )
    .where(files.c.study_id.in_(AMONG), files.c.place != Place.REPLACED)
    .order_by(files.c.id)
)
_READINGS = (
    select(
        readings.c.study_id,
        readings.c.area,
        readings.c.state,
        readings.c.reason_code,
        readings.c.reason,
        readings.c.result_id,
    )
    .where(readings.c.study_id.in_(AMONG))
    .order_by(readings.c.area)
)
_KEYS = (
    select(results.c.digest, results.c.area, results.c.weights, results.c.id, results.c.run)
    .where(results.c.digest.in_(AMONG))
    .order_by(results.c.run)
)


def resolve(connection: Connection, study: str) -> str:
    """Return the id that ``study`` is, or is the only beginning of.

    Raises:
        Misconfigured: no study or several.
    """
    wanted = select(studies.c.id).where(_begins(studies.c.id, study)).order_by(studies.c.id)
    found = list(connection.execute(wanted.limit(4)).scalars())
    if study in found or len(found) == 1:
        return study if study in found else found[0]
    if not found:
        raise Misconfigured(f"No study {study!r}: see `mura-batch query`.")
    raise Misconfigured(f"{study!r} begins several studies ({', '.join(found)}): give more of it.")


def chunks(ids: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Yield the values in pieces that a statement can bind."""
    for start in range(0, len(ids), _BOUND):
        yield ids[start : start + _BOUND]


def among(
    connection: Connection, statement: TypedReturnsRows[*_Columns], values: Sequence[_T]
) -> Iterator[Row[*_Columns]]:
    """Yield the rows of a statement in which ``AMONG`` stands for these values."""
    for some in chunks(values):
        yield from connection.execute(statement, {AMONG.key: some})


def stored_studies(connection: Connection, ids: Iterable[str]) -> list[StoredStudy]:
    """Return the studies of these ids with their files and readings, in the order of ``ids``."""
    wanted = list(dict.fromkeys(ids))
    rows = {row.id: row for row in among(connection, _STUDIES, wanted)}
    their_files = _files_of(connection, wanted)
    their_readings = _readings_of(connection, wanted)
    scored = latest_results(connection, [row.digest for row in rows.values()])
    return [
        StoredStudy(
            **row._asdict()
            | {
                "work": Work(row.work),
                "set_area": _area(row.set_area),
                "files": tuple(their_files[study]),
                "readings": tuple(their_readings[study]),
                "scored": {key: latest.id for key, latest in scored[row.digest].items()},
            }
        )
        for study in wanted
        if (row := rows.get(study)) is not None
    ]


def _files_of(connection: Connection, ids: Sequence[str]) -> defaultdict[str, list[StoredFile]]:
    """What was replaced under its name is not the study's any more."""
    found = defaultdict[str, list[StoredFile]](list)
    for study, claim, name, source, sha256, size, place, problem in among(connection, _FILES, ids):
        file = StoredFile(claim, os.fsdecode(name), source, sha256, size, Place(place), problem)
        found[study].append(file)
    return found


def _readings_of(
    connection: Connection, ids: Sequence[str]
) -> defaultdict[str, list[StoredReading]]:
    found = defaultdict[str, list[StoredReading]](list)
    for study, area, state, code, reason, result in among(connection, _READINGS, ids):
        found[study].append(StoredReading(_area(area), State(state), code, reason, result))
    return found


def _area(name: str | None) -> Area | None:
    return Area(name) if name else None


class Latest(NamedTuple):
    """The latest result of a key, and which run of it that was."""

    id: int
    run: int


def latest_results(
    connection: Connection, digests: Sequence[str]
) -> defaultdict[str, dict[tuple[str, str], Latest]]:
    """Return by study digest the latest result of each (area, weights digest)."""
    found = defaultdict[str, dict[tuple[str, str], Latest]](dict)
    for digest, area, weights, number, run in among(connection, _KEYS, digests):
        found[digest][area, weights] = Latest(number, run)
    return found


def is_stale(active: Mapping[Area, str]) -> ColumnElement[bool]:
    """A reading's result has other weights than its area's active ones; needs both tables."""
    return or_(
        false(),
        *(
            and_(results.c.area == area, results.c.weights != digest)
            for area, digest in active.items()
        ),
    )


def conditions(filters: Filters, *, images: bool = False) -> list[ColumnElement[bool]]:
    """Return what the filters ask of a join of readings, results and studies.

    With ``images`` what concerns a view (its probability, its error) is left to the views.
    """
    wanted = _shared_conditions(readings, filters, images=images)
    if filters.since is not None:
        wanted.append(readings.c.received_at >= filters.since)
    if filters.until is not None:
        wanted.append(readings.c.received_at < filters.until)
    if filters.state in {State.QUEUED, State.RUNNING}:
        wanted.append(studies.c.work == filters.state)
    elif filters.state is not None:
        wanted += [readings.c.state == filters.state, studies.c.work == Work.SETTLED]
    if filters.reason is not None and not images:
        wanted.append(readings.c.reason_code == filters.reason)
    return wanted


def _superseded_conditions(filters: Filters, *, images: bool) -> list[ColumnElement[bool]]:
    shown = select(readings.c.id).where(readings.c.result_id == results.c.id).exists()
    wanted = [~shown, *_shared_conditions(results, filters, images=images)]
    if filters.since is not None:
        wanted.append(studies.c.received_at >= filters.since)
    if filters.until is not None:
        wanted.append(studies.c.received_at < filters.until)
    if filters.state not in {None, State.DONE} or (filters.reason is not None and not images):
        wanted.append(false())
    return wanted


def _shared_conditions(
    of: Table[Any], filters: Filters, *, images: bool
) -> list[ColumnElement[bool]]:
    """What is asked alike of current rows (``of`` readings) and of superseded results."""
    wanted: list[ColumnElement[bool]] = []
    if filters.study is not None:
        wanted.append(_begins(of.c.study_id, filters.study))
    if filters.area is not None:
        wanted.append(of.c.area == filters.area)
    if filters.decision is not None:
        wanted.append(results.c.decision == filters.decision)
    if filters.weights is not None:
        wanted.append(_begins(results.c.weights, filters.weights))
    return wanted if images else wanted + _between(results.c.probability, filters)


def _between(probability: ColumnElement[Any], filters: Filters) -> list[ColumnElement[bool]]:
    wanted: list[ColumnElement[bool]] = []
    if filters.min_probability is not None:
        wanted.append(probability >= filters.min_probability)
    if filters.max_probability is not None:
        wanted.append(probability <= filters.max_probability)
    return wanted


def _begins(column: ColumnElement[str], start: str) -> ColumnElement[bool]:
    """Hexadecimal text begins with ``start``, as a range that an index can serve."""
    if not _HEX.fullmatch(start):
        return false()
    return and_(column >= start, column < start + "g")


# ---- the statements


def _current(filters: Filters, *, images: bool = False) -> Select[Any]:
    """Select the current rows; one a study and area."""
    # Studies come last and by an outer join (each row has one): SQLite then looks them up only
    # for rows that the filters have left, which halves a query over many results.
    tables = readings.outerjoin(results, results.c.id == readings.c.result_id)
    tables = tables.outerjoin(studies, studies.c.id == readings.c.study_id)
    columns = [*_current_columns(), readings.c.area.label("sort_area")]
    return select(*columns).select_from(tables).where(*conditions(filters, images=images))


def _superseded(filters: Filters, *, images: bool = False) -> Select[Any]:
    """Select the results that no current row shows any more."""
    columns = _row_columns(
        results,
        state=literal(State.DONE),
        reason=sql_cast(null(), String),
        received_at=studies.c.received_at,
    )
    return (
        select(*columns, results.c.area.label("sort_area"))
        .select_from(results.join(studies, studies.c.id == results.c.study_id))
        .where(*_superseded_conditions(filters, images=images))
    )


def _view_parts(filters: Filters) -> list[Select[Any]]:
    """Select a row a view of the current rows, and a row a file of those without a result."""
    error = case(
        (views.c.error_code == "", null()), else_=views.c.error_code + ": " + views.c.error
    )
    of_view = (
        views.c.source.label("image"),
        views.c.probability.label("view_probability"),
        views.c.logit.label("view_logit"),
        views.c.overlay,
        error.label("error"),
        views.c.id.label("sort_view"),
    )
    wanted = _between(views.c.probability, filters)
    current, superseded = _current(filters, images=True), _superseded(filters, images=True)
    if filters.reason is not None:
        its_own = views.c.error_code == filters.reason
        current = current.where(or_(its_own, readings.c.reason_code == filters.reason))
        superseded = superseded.where(its_own)
    parts = [
        part.add_columns(*of_view).join(views, views.c.result_id == results.c.id).where(*wanted)
        for part in ([current, superseded] if filters.history else [current])
    ]
    return [*parts, _with_files(filters)]


def _with_files(filters: Filters) -> Select[Any]:
    """Select the current rows without a result, once for each file that no other row scored."""
    of_file = (
        files.c.source.label("image"),
        sql_cast(null(), Float).label("view_probability"),
        sql_cast(null(), Float).label("view_logit"),
        sql_cast(null(), String).label("overlay"),
        func.nullif(files.c.problem, "", type_=String).label("error"),
        files.c.id.label("sort_view"),
    )
    other = readings.alias()
    scored = (
        select(views.c.id)
        .join(other, other.c.result_id == views.c.result_id)
        .where(other.c.study_id == files.c.study_id, views.c.sha256 == files.c.sha256)
    )
    return (
        _current(filters)
        .add_columns(*of_file)
        .join(files, files.c.study_id == readings.c.study_id)
        .where(readings.c.result_id.is_(None), files.c.place != Place.REPLACED, ~scored.exists())
    )


def _current_columns() -> list[ColumnElement[Any]]:
    settled = studies.c.work == Work.SETTLED
    told = case(
        (readings.c.reason_code == "", null()),
        else_=readings.c.reason_code + ": " + readings.c.reason,
    )
    return _row_columns(
        readings,
        state=case((settled, readings.c.state), else_=studies.c.work),
        reason=case((settled, told), else_=studies.c.last_error),
        received_at=readings.c.received_at,
    )


def _row_columns(
    of: Table[Any],
    *,
    state: ColumnElement[str],
    reason: ColumnElement[str | None],
    received_at: ColumnElement[datetime],
) -> list[ColumnElement[Any]]:
    """Return the columns of a row, in ``StudyRow``'s order."""
    return [
        of.c.study_id.label("study"),
        func.coalesce(results.c.digest, studies.c.digest).label("digest"),
        results.c.revision.label("revision"),
        state.label("state"),
        func.nullif(of.c.area, "", type_=String).label("area"),
        of.c.area_source,
        results.c.logit.label("study_logit"),
        results.c.probability.label("study_probability"),
        results.c.calibrated,
        results.c.decision,
        results.c.threshold,
        results.c.operating_point,
        results.c.target,
        results.c.views,
        results.c.views_failed,
        results.c.weights,
        studies.c.study_uid,
        studies.c.accession,
        studies.c.source,
        received_at.label("received_at"),
        results.c.scored_at,
        reason.label("reason"),
    ]


def _study_row(row: Any) -> StudyRow:
    return StudyRow(*row[:_STUDY_COLUMNS])
