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
from dataclasses import fields, replace
from datetime import datetime
from itertools import islice
from types import TracebackType
from typing import Any, Literal, Self, cast

from mura_batch.area import Area
from mura_batch.config import NOTICE
from mura_batch.reader import (
    Ask,
    Reader,
    SqliteReader,
    clean,
    iso_utc,
    json_object,
    moment,
    sqlite_path,
)
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

Block = dict[str, Sequence[Any]]
"""Rows by the column: the JSON values of each of ``STUDY_FIELDS`` or ``IMAGE_FIELDS``."""

HEX = re.compile("[0-9a-f]+")  # what ids and digests are written in
_STUDY_COLUMNS = len(STUDY_FIELDS) - 1  # the notice is no column
_MOMENTS = tuple(STUDY_FIELDS.index(name) for name in ("received_at", "scored_at"))
_VIEW = slice(_STUDY_COLUMNS + 1, _STUDY_COLUMNS + 6)  # after the column that rows are sorted by
_EVENTS = "SELECT at, study_id, what, detail FROM events WHERE study_id = :study ORDER BY id"
_LAST = 2**31 - 1  # what has no result yet comes before all revisions
_DIGEST = 64  # digits of a whole one
_BLOCK = 500  # rows of a block: few enough to stay in a processor's cache
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
        with closing(self._rows(filters)) as rows:
            yield from map(_study_row, rows)

    def images(self, filters: Filters = Filters()) -> Iterator[ImageRow]:  # noqa: B008 - frozen
        """Yield one row a view of the rows that :meth:`query` gives, in the same order.

        An area without a result has a row for each file of its study instead.
        """
        with closing(self._rows(filters, images=True)) as rows:
            for row in rows:
                yield ImageRow(_study_row(row), *row[_VIEW])

    def blocks(
        self,
        filters: Filters = Filters(),  # noqa: B008 - frozen
        *,
        images: bool = False,
    ) -> Iterator[Block]:
        """Yield the rows of :meth:`query` or :meth:`images` by the block: for many of them,
        without a record for each.
        """
        with closing(self._rows(filters, images=images)) as rows:
            while some := list(islice(rows, _BLOCK)):
                columns: list[Sequence[Any]] = list(zip(*some, strict=True))
                for place in _MOMENTS:
                    columns[place] = [iso_utc(at) for at in columns[place]]
                told = [*columns[:_STUDY_COLUMNS], (NOTICE,) * len(some)]
                block = dict(zip(STUDY_FIELDS, told, strict=True))
                if images:
                    block |= zip(IMAGE_ONLY_FIELDS, columns[_VIEW], strict=True)
                yield block

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
        with self._reader.reading() as ask:
            ((studies, rows),) = ask(_HOW_MANY, {})
            work = {Work(row[0]): row for row in ask(_BY_WORK, {})}
            states = Counter({State(state): count for state, count in ask(_NOT_DONE, {})})
            states[State.DONE] = rows - states.total()
            for doing, settled, count in ask(_UNDER_WAY_BY_STATE, {}):
                states[State(settled)] -= count
                states[State(doing)] += count
            ((made, views),) = ask(_SCORED_SINCE, {"since": since})
            ((last,),) = ask("SELECT max(scored_at) FROM results", {})
        return Counts(
            states=+states,
            studies=studies,
            queued=work[Work.QUEUED][1] if Work.QUEUED in work else 0,
            running=work[Work.RUNNING][1] if Work.RUNNING in work else 0,
            oldest=moment(min((row[2] for row in work.values()), default=None)),
            results=made,
            views=views,
            last_scored_at=moment(last),
        )

    def stale(self, active: Mapping[Area, str]) -> int:
        """Count current results of other weights than their area's active ones."""
        sql = _select([_SHOWN], "weights", [is_stale("weights.area", "weights.digest", active)])
        with self._reader.reading() as ask:
            return sum(count for (count,) in ask(sql, active_values(active)))

    def _rows(self, filters: Filters, *, images: bool = False) -> Generator[Sequence[Any]]:
        with self._reader.reading(stream=True) as ask:
            chosen = _with_whole_digest(filters, ask)
            yield from ask(_rows_sql(chosen, images=images), filter_values(chosen))


# ---- what filters ask, also of the studies that a rerun chooses


def conditions(filters: Filters, *, images: bool = False) -> list[str]:
    """Return what the filters ask of readings.

    What the conditions bind is :func:`filter_values`. With ``images`` what concerns a view (its
    probability, its error) is left to the views.
    """
    wanted = _of_both("readings", filters, images=images)
    wanted += _received("readings.received_at", filters)
    if filters.state in {State.QUEUED, State.RUNNING}:
        wanted.append("readings.study_id IN (SELECT id FROM studies WHERE work = :state)")
    elif filters.state is not None:
        wanted += ["readings.state = :state", _AT_REST]
        if filters.state != State.DONE:
            wanted.append(NOT_DONE)
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


def _with_whole_digest(filters: Filters, ask: Ask) -> Filters:
    """Return the filters with all of the weights digest that they name by its beginning alone."""
    if filters.weights is None:
        return filters
    begins = _begins("digest", "weights", filters.weights)
    found = list(ask(f"SELECT DISTINCT digest FROM weights WHERE {begins}", filter_values(filters)))
    return replace(filters, weights=found[0][0]) if len(found) == 1 else filters


def is_stale(area: str, weights: str, active: Mapping[Area, str]) -> str:
    """Weights, by their column, are others than the active ones of the area in its column.

    What it binds is :func:`active_values`.
    """
    each = [f"{area} = :area_{n} AND {weights} <> :active_{n}" for n in range(len(active))]
    return f"({' OR '.join(each)})" if each else "FALSE"


def active_values(active: Mapping[Area, str]) -> dict[str, str]:
    """Return the areas and digests that :func:`is_stale` binds, by name."""
    values: dict[str, str] = {}
    for number, (area, digest) in enumerate(active.items()):
        values |= {f"area_{number}": str(area), f"active_{number}": digest}
    return values


def _begins(column: str, name: str, start: str) -> str:
    """Hexadecimal text begins with ``start``, as a range that an index can serve.

    A whole digest is asked for as such: an index then gives its rows in their order.
    """
    if not HEX.fullmatch(start):
        return "FALSE"
    if len(start) == _DIGEST:
        return f"{column} = :{name}"
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
        wanted.append(f"{table}.decision = :decision")
    if filters.weights is not None:
        wanted.append(_begins(f"{table}.weights", "weights", filters.weights))
    return wanted if images else wanted + _probable(f"{table}.probability", filters)


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


def _rows_sql(filters: Filters, *, images: bool) -> str:
    """Return the parts as one statement, in the rows' order."""
    parts = _image_parts(filters) if images else _study_parts(filters)
    together = " UNION ALL ".join(parts)
    sql = together if len(parts) == 1 else f"SELECT * FROM ({together}) AS parts"
    order = ["received_at DESC", "study DESC", "sort_area"]  # as the indexes have it, from the end
    order += [f"coalesce(revision, {_LAST}) DESC"] * filters.history + ["sort_view"] * images
    limit = "" if filters.limit is None else " LIMIT :limit"
    return f"{sql} ORDER BY {', '.join(order)}{limit}"


def _study_parts(filters: Filters) -> list[str]:
    parts = [_select(_CURRENT, "readings" + _OF_READINGS, conditions(filters))]
    if filters.history:
        parts.append(_select(_SUPERSEDED, "results" + _OF_RESULTS, _of_superseded(filters)))
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
        _select((*_CURRENT, *_OF_VIEW), _READINGS_VIEWS + _OF_READINGS, current),
        _select(
            (*_CURRENT, *_OF_FILE), _READINGS_FILES + _OF_READINGS, conditions(filters) + _UNSCORED
        ),
    ]
    if filters.history:
        columns = (*_SUPERSEDED, *_OF_VIEW)
        parts.append(_select(columns, _RESULTS_VIEWS + _OF_RESULTS, superseded))
    return parts


def _study_row(row: Sequence[Any]) -> StudyRow:
    told = list(row[:_STUDY_COLUMNS])
    for column in _MOMENTS:
        told[column] = moment(told[column])
    return StudyRow(*told)


NOT_DONE = f"readings.state <> '{State.DONE}'"  # said beside a state, for the partial index
_SETTLED = f"studies.work = '{Work.SETTLED}'"
_UNDER_WAY = f"studies.work IN ('{Work.QUEUED}', '{Work.RUNNING}')"
_AT_REST = f"readings.study_id NOT IN (SELECT id FROM studies WHERE {_UNDER_WAY})"


# What filters ask stands in readings and views. The rest comes by outer joins, though each row has
# it: SQLite then looks it up for the rows that are left, and not before.
_READINGS_VIEWS = "readings JOIN views ON views.result_id = readings.result_id"
_READINGS_FILES = "readings JOIN files ON files.study_id = readings.study_id"
_RESULTS_VIEWS = "results JOIN views ON views.result_id = results.id"
_OF_RESULTS = " LEFT JOIN studies ON studies.id = results.study_id"
_OF_READINGS = (
    " LEFT JOIN results ON results.id = readings.result_id"
    " LEFT JOIN studies ON studies.id = readings.study_id"
)
_CURRENT = _row_columns(
    "readings",
    state=f"CASE WHEN {_SETTLED} THEN readings.state ELSE studies.work END",
    reason=f"CASE WHEN {_SETTLED} THEN {_told('readings.reason_code', 'readings.reason')}"
    " ELSE studies.last_error END",
    received_at="readings.received_at",
)
_SUPERSEDED = _row_columns(  # the results that no current row shows any more
    "results",
    state=f"'{State.DONE}'",
    reason="nullif('', '')",  # a cast would keep SQLite from merging the parts in their order
    received_at="studies.received_at",
)
_OF_VIEW = (
    "views.source AS image",
    "views.probability AS view_probability",
    "views.logit AS view_logit",
    "views.overlay",
    f"{_told('views.error_code', 'views.error')} AS error",
    "views.id AS sort_view",
)
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
    "readings.weights IS NULL",  # nothing to walk but the index of what is not done
    NOT_DONE,
    f"files.place <> '{Place.REPLACED}'",
    f"NOT EXISTS ({_ELSEWHERE})",
]

# Counted are all rows, which SQLite knows by the page, and the few that are not settled or done.
_HOW_MANY = "SELECT (SELECT count(*) FROM studies), (SELECT count(*) FROM readings)"
_BY_WORK = f"SELECT work, count(*), min(received_at) FROM studies WHERE {_UNDER_WAY} GROUP BY work"
_NOT_DONE = f"SELECT state, count(*) FROM readings WHERE {NOT_DONE} GROUP BY state"
_UNDER_WAY_BY_STATE = (
    "SELECT studies.work, readings.state, count(*)"
    " FROM readings JOIN studies ON studies.id = readings.study_id"
    f" WHERE {_UNDER_WAY} GROUP BY studies.work, readings.state"
)
_SHOWN = (
    "(SELECT count(*) FROM readings"
    " WHERE readings.weights = weights.digest AND readings.area = weights.area)"
)
_SCORED_SINCE = "SELECT count(*), coalesce(sum(views), 0) FROM results WHERE scored_at >= :since"
