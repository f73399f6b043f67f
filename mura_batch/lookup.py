"""What a transaction looks up: studies by their ids, with their files, readings and results."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

from sqlalchemy import BindParameter, Connection, Row, and_, bindparam, or_, select
from sqlalchemy.sql.selectable import TypedReturnsRows

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from mura_batch.records import Place, State, StoredFile, StoredReading, StoredStudy, Work
from mura_batch.results import HEX
from mura_batch.schema import files, readings, results, studies
from mura_batch.study import Kind, masked

_BOUND = 500  # values in one IN (…)
_T = TypeVar("_T")
_Columns = TypeVarTuple("_Columns")

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
    """Return the id that ``study`` is or is the only beginning of, or whose folder in the inbox
    or StudyInstanceUID it is.

    Raises:
        Misconfigured: no study or several.
    """
    wanted = select(studies.c.id).order_by(studies.c.id).limit(4)
    found: list[str] = []
    if HEX.fullmatch(study):
        begins = studies.c.id >= study, studies.c.id < study + "g"
        found += connection.execute(wanted.where(*begins)).scalars()
    if not found:
        folder = and_(studies.c.kind == Kind.FOLDER, studies.c.key == masked(study.strip("/")))
        named = or_(folder, studies.c.study_uid == study)
        found += connection.execute(wanted.where(named)).scalars()
    if study in found or len(found) == 1:
        return study if study in found else found[0]
    if not found:
        raise Misconfigured(f"No study {study!r}: see `mura-batch query`.")
    raise Misconfigured(
        f"{study!r} means several studies ({', '.join(found)}): give more of the id."
    )


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
