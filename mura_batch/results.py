"""Reading the results: ``query``, ``export``, ``status``.

Opened read-only, also while a daemon writes. The statements are SQL text that SQLite and
PostgreSQL both read, so that a query need not wait for SQLAlchemy to be imported (``reader.py``);
every value in them is bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, cast

from mura_batch.area import Area
from mura_batch.config import NOTICE
from mura_batch.reader import Reader, SqliteReader, clean, iso_utc, json_object, moment, sqlite_path
from mura_batch.records import (
    IMAGE_ONLY_FIELDS,
    STUDY_FIELDS,
    Counts,
    EventRow,
    Filters,
    ImageRow,
    LabelRow,
    Place,
    State,
    StudyRow,
    Work,
)

HEX = re.compile("[0-9a-f]+")  # what ids and digests are written in
_STUDY_COLUMNS = len(STUDY_FIELDS) - 1  # the notice is no column
_MOMENTS = tuple(STUDY_FIELDS.index(name) for name in ("received_at", "scored_at"))
_VIEW = slice(_STUDY_COLUMNS + 1, _STUDY_COLUMNS + 6)  # after the column that rows are sorted by
_EVENTS = "SELECT at, study_id, what, detail FROM events WHERE study_id = :study ORDER BY id"
_LABELS = "SELECT study_id, label, area, by, at FROM labels ORDER BY study_id, area"


class Results:
    """The stored results, read-only; use as a context manager. Thread-safe."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the database at a SQLAlchemy URL.

        Raises:
            Misconfigured: it is missing, unreadable, or of another revision; the message names
                the command that fixes it.
        """
        if (file := sqlite_path(url)) is not None:
            return cls(SqliteReader(file))
        from mura_batch.engine import EngineReader, open_engine  # noqa: PLC0415 - imports SQLAlchemy

        return cls(EngineReader(open_engine(url, read_only=True)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.close()

    # ---- rows for people

    def query(self, filters: Filters = Filters()) -> Iterator[StudyRow]:  # noqa: B008 - frozen
        """Yield one row a study and area, newest arrival first; superseded revisions (with
        ``history``) follow their successors. Streams: the database is read as rows are taken.
        """
        with closing(self._rows(_study_parts(filters), _ROW_ORDER, filters)) as rows:
            yield from map(_study_row, rows)

    def images(self, filters: Filters = Filters()) -> Iterator[ImageRow]:  # noqa: B008 - frozen
        """Yield one row a view of the rows that :meth:`query` gives, in the same order.

        An area without a result has a row for each file of its study instead.
        """
        with closing(self._rows(_image_parts(filters), _IMAGE_ORDER, filters)) as rows:
            for row in rows:
                yield ImageRow(_study_row(row), *row[_VIEW])

    def values(
        self,
        filters: Filters = Filters(),  # noqa: B008 - frozen
        *,
        images: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of :meth:`query` or :meth:`images` as JSON values, in the order of
        ``STUDY_FIELDS`` or ``IMAGE_FIELDS``: for many of them, without a record for each.
        """
        parts, order = (
            (_image_parts(filters), _IMAGE_ORDER) if images else (_study_parts(filters), _ROW_ORDER)
        )
        with closing(self._rows(parts, order, filters)) as rows:
            if not images:
                yield from map(_study_values, rows)
                return
            for row in rows:
                told = dict(zip(STUDY_FIELDS, _study_values(row), strict=True))
                told |= zip(IMAGE_ONLY_FIELDS, row[_VIEW], strict=True)
                yield tuple(told.values())

    def events(self, study_id: str) -> list[EventRow]:
        """Return what happened to a study, oldest first."""
        with self._reader.reading() as ask:
            return [
                EventRow(cast("datetime", moment(at)), study, what, json_object(detail))
                for at, study, what, detail in ask(_EVENTS, {"study": study_id})
            ]

    def labels(self) -> Iterator[LabelRow]:
        """Yield people's labels, by study and area."""
        with self._reader.reading() as ask:
            for study, label, area, by, at in ask(_LABELS, {}):
                word = cast('Literal["positive", "negative"]', label)
                yield LabelRow(study, word, Area(area) if area else None, by, moment(at))

    # ---- numbers for `status`

    def counts(self, since: datetime) -> Counts:
        """Count the rows in each state, the queue, and what was scored since a moment."""
        under_way = {"queued": Work.QUEUED, "running": Work.RUNNING}
        with self._reader.reading() as ask:
            work = {Work(row[0]): row for row in ask(_BY_WORK, {})}
            states = Counter({State(state): count for state, count in ask(_BY_STATE, {})})
            for doing, settled, count in ask(_UNDER_WAY, under_way):
                states[State(settled)] -= count
                states[State(doing)] += count
            ((made, views),) = ask(_SCORED_SINCE, {"since": since})
            ((last,),) = ask("SELECT max(scored_at) FROM results", {})
        waiting = [work[doing][2] for doing in (Work.QUEUED, Work.RUNNING) if doing in work]
        return Counts(
            states=+states,
            studies=sum(row[1] for row in work.values()),
            queued=work[Work.QUEUED][1] if Work.QUEUED in work else 0,
            running=work[Work.RUNNING][1] if Work.RUNNING in work else 0,
            oldest=moment(min(waiting, default=None)),
            results=made,
            views=views,
            last_scored_at=moment(last),
        )

    def stale(self, active: Mapping[Area, str]) -> int:
        """Count current results of other weights than their area's active ones."""
        tables = "readings JOIN results ON results.id = readings.result_id"
        with self._reader.reading() as ask:
            ((count,),) = ask(
                _select(["count(*)"], tables, [is_stale(active)]), active_values(active)
            )
        return int(count)

    def _rows(self, parts: Sequence[str], order: str, filters: Filters) -> Generator[Sequence[Any]]:
        """Run the parts as one statement, in the rows' order."""
        together = " UNION ALL ".join(parts)
        sql = together if len(parts) == 1 else f"SELECT * FROM ({together}) AS parts"
        limit = "" if filters.limit is None else " LIMIT :limit"
        with self._reader.reading(stream=True) as ask:
            yield from ask(f"{sql} ORDER BY {order}{limit}", filter_values(filters))


# ---- what filters ask, also of the studies that a rerun chooses


def conditions(filters: Filters, *, images: bool = False) -> list[str]:
    """Return what the filters ask of a join of readings, results and studies.

    What the conditions bind is :func:`filter_values`. With ``images`` what concerns a view (its
    probability, its error) is left to the views.
    """
    wanted = _of_both("readings", filters, images=images)
    wanted += _received("readings.received_at", filters)
    if filters.state in {State.QUEUED, State.RUNNING}:
        wanted.append("studies.work = :state")
    elif filters.state is not None:
        wanted += ["readings.state = :state", _SETTLED]
    if filters.reason is not None and not images:
        wanted.append("readings.reason_code = :reason")
    return wanted


def filter_values(filters: Filters) -> dict[str, object]:
    """Return the values that the conditions bind, by name."""
    values: dict[str, object] = {f.name: getattr(filters, f.name) for f in fields(filters)}
    for name in ("study", "weights"):
        values[f"{name}_end"] = f"{values[name]}g"
    if filters.reason is not None:
        values["reason"] = clean(filters.reason)
    return values


def is_stale(active: Mapping[Area, str]) -> str:
    """A reading's result has other weights than its area's active ones; needs both tables.

    What it binds is :func:`active_values`.
    """
    each = [
        f"results.area = :area_{n} AND results.weights <> :active_{n}" for n in range(len(active))
    ]
    return f"({' OR '.join(each)})" if each else "FALSE"


def active_values(active: Mapping[Area, str]) -> dict[str, str]:
    """Return the areas and digests that :func:`is_stale` binds, by name."""
    values: dict[str, str] = {}
    for number, (area, digest) in enumerate(active.items()):
        values |= {f"area_{number}": str(area), f"active_{number}": digest}
    return values


def _begins(column: str, name: str, start: str) -> str:
    """Hexadecimal text begins with ``start``, as a range that an index can serve."""
    if not HEX.fullmatch(start):
        return "FALSE"
    return f"({column} >= :{name} AND {column} < :{name}_end)"


def _of_superseded(filters: Filters, *, images: bool = False) -> list[str]:
    wanted = [
        "NOT EXISTS (SELECT 1 FROM readings WHERE readings.result_id = results.id)",
        *_of_both("results", filters, images=images),
        *_received("studies.received_at", filters),
    ]
    if filters.state not in {None, State.DONE} or (filters.reason is not None and not images):
        wanted.append("FALSE")
    return wanted


def _of_both(table: str, filters: Filters, *, images: bool) -> list[str]:
    """What is asked alike of current rows (of ``readings``) and of superseded ``results``."""
    wanted = []
    if filters.study is not None:
        wanted.append(_begins(f"{table}.study_id", "study", filters.study))
    if filters.area is not None:
        wanted.append(f"{table}.area = :area")
    if filters.decision is not None:
        wanted.append("results.decision = :decision")
    if filters.weights is not None:
        wanted.append(_begins("results.weights", "weights", filters.weights))
    return wanted if images else wanted + _probable("results.probability", filters)


def _received(at: str, filters: Filters) -> list[str]:
    return _given(filters, since=f"{at} >= :since", until=f"{at} < :until")


def _probable(probability: str, filters: Filters) -> list[str]:
    return _given(
        filters,
        min_probability=f"{probability} >= :min_probability",
        max_probability=f"{probability} <= :max_probability",
    )


def _given(filters: Filters, **conditions: str) -> list[str]:
    """Return the conditions of those filters that were given, by the filters' names."""
    return [sql for name, sql in conditions.items() if getattr(filters, name) is not None]


# ---- the statements


def _select(columns: Iterable[str], tables: str, wanted: Iterable[str]) -> str:
    return f"SELECT {', '.join(columns)} FROM {tables} WHERE {' AND '.join(wanted) or 'TRUE'}"


def _told(code: str, words: str) -> str:
    return f"CASE WHEN {code} <> '' THEN {code} || ': ' || {words} END"


def _row_columns(of: str, *, state: str, reason: str, received_at: str) -> tuple[str, ...]:
    """Return the columns of a row, in ``StudyRow``'s order, and the area to sort by."""
    return (
        f"{of}.study_id AS study",
        "coalesce(results.digest, studies.digest) AS digest",
        "results.revision AS revision",
        f"{state} AS state",
        f"nullif({of}.area, '') AS area",
        f"{of}.area_source",
        "results.logit AS study_logit",
        "results.probability AS study_probability",
        "results.calibrated",
        "results.decision",
        "results.threshold",
        "results.operating_point",
        "results.target",
        "results.views",
        "results.views_failed",
        "results.weights",
        "studies.study_uid",
        "studies.accession",
        "studies.source",
        f"{received_at} AS received_at",
        "results.scored_at",
        f"{reason} AS reason",
        f"{of}.area AS sort_area",
    )


def _study_parts(filters: Filters) -> list[str]:
    parts = [_select(_CURRENT, _CURRENT_TABLES, conditions(filters))]
    if filters.history:
        parts.append(_select(_SUPERSEDED, _SUPERSEDED_TABLES, _of_superseded(filters)))
    return parts


def _image_parts(filters: Filters) -> list[str]:
    """Select a row a view of the current rows, and a row a file of those without a result."""
    wanted = _probable("views.probability", filters)
    current = [*conditions(filters, images=True), *wanted]
    superseded = [*_of_superseded(filters, images=True), *wanted]
    if filters.reason is not None:
        current.append("(views.error_code = :reason OR readings.reason_code = :reason)")
        superseded.append("views.error_code = :reason")
    parts = [
        _select((*_CURRENT, *_OF_VIEW), _CURRENT_TABLES + _VIEWS, current),
        _select((*_CURRENT, *_OF_FILE), _CURRENT_TABLES + _FILES, conditions(filters) + _UNSCORED),
    ]
    if filters.history:
        columns = (*_SUPERSEDED, *_OF_VIEW)
        parts.append(_select(columns, _SUPERSEDED_TABLES + _VIEWS, superseded))
    return parts


def _study_values(row: Sequence[Any]) -> tuple[Any, ...]:
    received, scored = _MOMENTS
    return (
        *row[:received],
        iso_utc(row[received]),
        iso_utc(row[scored]),
        *row[scored + 1 : _STUDY_COLUMNS],
        NOTICE,
    )


def _study_row(row: Sequence[Any]) -> StudyRow:
    told = list(row[:_STUDY_COLUMNS])
    for column in _MOMENTS:
        told[column] = moment(told[column])
    return StudyRow(*told)


_SETTLED = f"studies.work = '{Work.SETTLED}'"
_ROW_ORDER = "received_at DESC, study DESC, sort_area, revision DESC"
_IMAGE_ORDER = f"{_ROW_ORDER}, sort_view"


# Studies come last and by an outer join (each row has one): SQLite then looks them up only for
# rows that the filters have left, which halves a query over many results.
_CURRENT_TABLES = (
    "readings LEFT JOIN results ON results.id = readings.result_id"
    " LEFT JOIN studies ON studies.id = readings.study_id"
)
_CURRENT = _row_columns(
    "readings",
    state=f"CASE WHEN {_SETTLED} THEN readings.state ELSE studies.work END",
    reason=f"CASE WHEN {_SETTLED} THEN {_told('readings.reason_code', 'readings.reason')}"
    " ELSE studies.last_error END",
    received_at="readings.received_at",
)
_SUPERSEDED_TABLES = "results JOIN studies ON studies.id = results.study_id"
_SUPERSEDED = _row_columns(  # the results that no current row shows any more
    "results",
    state=f"'{State.DONE}'",
    reason="CAST(NULL AS VARCHAR)",
    received_at="studies.received_at",
)
_VIEWS = " JOIN views ON views.result_id = results.id"
_OF_VIEW = (
    "views.source AS image",
    "views.probability AS view_probability",
    "views.logit AS view_logit",
    "views.overlay",
    f"{_told('views.error_code', 'views.error')} AS error",
    "views.id AS sort_view",
)
_FILES = " JOIN files ON files.study_id = readings.study_id"
_OF_FILE = (
    "files.source AS image",
    "CAST(NULL AS DOUBLE PRECISION) AS view_probability",
    "CAST(NULL AS DOUBLE PRECISION) AS view_logit",
    "CAST(NULL AS VARCHAR) AS overlay",
    "nullif(files.problem, '') AS error",
    "files.id AS sort_view",
)
_ELSEWHERE = (
    "SELECT 1 FROM views JOIN readings AS other ON other.result_id = views.result_id"
    " WHERE other.study_id = files.study_id AND views.sha256 = files.sha256"
)
_UNSCORED = [  # by this row's result or by another one's
    "readings.result_id IS NULL",
    f"files.place <> '{Place.REPLACED}'",
    f"NOT EXISTS ({_ELSEWHERE})",
]

_BY_WORK = "SELECT work, count(*), min(received_at) FROM studies GROUP BY work"
_BY_STATE = "SELECT state, count(*) FROM readings GROUP BY state"
_UNDER_WAY = (  # few: what settled is counted without a look at the studies
    "SELECT studies.work, readings.state, count(*)"
    " FROM readings JOIN studies ON studies.id = readings.study_id"
    " WHERE studies.work IN (:queued, :running) GROUP BY studies.work, readings.state"
)
_SCORED_SINCE = "SELECT count(*), coalesce(sum(views), 0) FROM results WHERE scored_at >= :since"
