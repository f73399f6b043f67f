"""How a fresh score becomes a revision: same key, same row; else N+1, naming what it supersedes.

A result is never changed. Which of a study's results is current is said by its readings alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from mura_batch.errors import Misconfigured
from mura_batch.lookup import AMONG, Latest, among, chunks, latest_results
from mura_batch.records import NewResult, ReadingOutcome, StudyOutcome
from mura_batch.schema import readings, results, views, weights

_SHOWN = select(readings.c.study_id, readings.c.area, readings.c.id, readings.c.result_id).where(
    readings.c.study_id.in_(AMONG)
)
_NO_MORE = delete(readings).where(readings.c.id.in_(AMONG))
_CHOSEN_BY = {  # what a reading says of its result, for the filters
    name: select(results.c[name]).where(results.c.id == bindparam("shown")).scalar_subquery()
    for name in ("decision", "probability", "weights")
}
_KEPT = update(readings).where(readings.c.id == bindparam("number")).values(_CHOSEN_BY)
_REVISIONS = select(
    results.c.study_id, results.c.id, results.c.area, results.c.revision, results.c.supersedes
)
_OF_STUDIES = _REVISIONS.where(results.c.study_id.in_(AMONG))
_BY_NUMBER = _REVISIONS.where(results.c.id.in_(AMONG))
_WEIGHTS = select(weights.c.digest, weights.c.area)
_NEW_RESULT = insert(results)
_NEW_VIEWS = insert(views)
_NEW_READINGS = insert(readings).values(_CHOSEN_BY)


@dataclass(frozen=True, slots=True)
class Revision:
    """A stored result of a study, as far as numbering needs it."""

    id: int
    area: str
    revision: int
    supersedes: int | None


@dataclass(frozen=True, slots=True)
class Placed:
    """A reading of an outcome, and the id of the result that it shows."""

    outcome: StudyOutcome
    reading: ReadingOutcome
    result: int | None


class Revisions:
    """The readings and the results of some studies during one commit.

    Args:
        reruns: ids of the studies for which a stored key gets a new row all the same.
    """

    def __init__(
        self, connection: Connection, outcomes: Sequence[StudyOutcome], reruns: Collection[str]
    ) -> None:
        self._connection = connection
        self._outcomes = outcomes
        self._reruns = reruns
        self._readings: dict[tuple[str, str], int] = {}
        self._current: dict[str, dict[str, int]] = {o.study_id: {} for o in outcomes}
        for study, area, reading, result in among(connection, _SHOWN, list(self._current)):
            self._readings[study, area] = reading
            if result is not None:
                self._current[study][area] = result
        self._known = _known(connection, self._current)
        self._latest = latest_results(connection, [outcome.digest for outcome in outcomes])
        self._weights = {tuple(row) for row in connection.execute(_WEIGHTS)}
        self._views: list[dict[str, Any]] = []

    def place(self) -> list[Placed]:
        """Say which result each reading shows; stores those whose key is new, or on a rerun.

        A reading without a result (failed, without weights) keeps showing its area's last one.

        Raises:
            Misconfigured: a reading names a result that is not stored.
        """
        placed = [
            Placed(outcome, reading, self._result_of(outcome, reading))
            for outcome in self._outcomes
            for reading in outcome.readings
        ]
        if self._views:
            self._connection.execute(_NEW_VIEWS, self._views)
        return placed

    def show(self, placed: Sequence[Placed], received_at: Mapping[str, datetime]) -> None:
        """Make the studies' current rows: one for each of their areas, and no others."""
        rows: dict[tuple[str, str], dict[str, Any]] = {
            (each.outcome.study_id, each.reading.area or ""): {
                "received_at": received_at[each.outcome.study_id],
                "state": each.reading.state,
                "reason_code": each.reading.reason_code,
                "reason": each.reading.reason,
                "area_source": each.reading.area_source,
                "evidence": each.reading.evidence,
                "result_id": each.result,
                "shown": each.result,
                "updated_at": each.outcome.at,
            }
            for each in placed
        }
        before = self._readings
        for gone in chunks([number for key, number in before.items() if key not in rows]):
            self._connection.execute(_NO_MORE, {AMONG.key: gone})
        if kept := [row | {"number": before[key]} for key, row in rows.items() if key in before]:
            self._connection.execute(_KEPT, kept)
        if new := [
            row | {"study_id": study, "area": area}
            for (study, area), row in rows.items()
            if (study, area) not in before
        ]:
            self._connection.execute(_NEW_READINGS, new)

    def _result_of(self, outcome: StudyOutcome, reading: ReadingOutcome) -> int | None:
        if isinstance(reading.result, int):
            self._require(reading.result)
            return reading.result
        area = reading.area or ""
        if reading.result is None:
            return self._current[outcome.study_id].get(area)
        keys = self._latest[outcome.digest]
        stored = keys.get((area, reading.result.weights))
        if stored is not None and outcome.study_id not in self._reruns:
            return stored.id
        run = stored.run + 1 if stored else 1
        new = self._append(outcome, reading, reading.result, run)
        keys[area, reading.result.weights] = Latest(new, run)
        return new

    def _append(
        self, outcome: StudyOutcome, reading: ReadingOutcome, result: NewResult, run: int
    ) -> int:
        area = reading.area or ""
        known = self._known[outcome.study_id]
        areas = {other.area or "" for other in outcome.readings}
        before = predecessor(area, self._current[outcome.study_id], known, areas)
        same_area = [revision.revision for revision in known if revision.area == area]
        number = 1 + max([*same_area, before.revision if before else 0])
        self._use_weights(area, result)
        row = {
            "study_id": outcome.study_id,
            "area": area,
            "revision": number,
            "supersedes": before.id if before else None,
            "digest": outcome.digest,
            "run": run,
            "views": len(result.views),
            "views_failed": sum(view.logit is None for view in result.views),
            "area_source": reading.area_source,
            "evidence": reading.evidence,
        }
        inserted = self._connection.execute(
            _NEW_RESULT, row | {name: getattr(result, name) for name in _COPIED}
        )
        new = int((inserted.inserted_primary_key or (0,))[0])
        self._views += [
            {"result_id": new}
            | {name: getattr(view, name) for name in type(view).__dataclass_fields__}
            for view in result.views
        ]
        known.append(Revision(new, area, number, before.id if before else None))
        return new

    def _use_weights(self, area: str, result: NewResult) -> None:
        if (result.weights, area) in self._weights:
            return
        self._weights.add((result.weights, area))
        values = {"digest": result.weights, "area": area, "card": result.card}
        self._connection.execute(insert(weights).values(**values, first_used=result.scored_at))

    def _require(self, result: int) -> None:
        wanted = select(results.c.id).where(results.c.id == result)
        if self._connection.execute(wanted).scalar() is None:
            raise Misconfigured(f"No result {result} is stored; was the database replaced?")


def _known(
    connection: Connection, current: Mapping[str, Mapping[str, int]]
) -> dict[str, list[Revision]]:
    """Return for each study its own results and those that it shows, oldest first."""
    owners: dict[int, str] = {}
    revisions: dict[int, Revision] = {}
    shown = sorted({number for areas in current.values() for number in areas.values()})
    for study, number, area, revision, supersedes in (
        *among(connection, _OF_STUDIES, list(current)),
        *among(connection, _BY_NUMBER, shown),
    ):
        owners[number] = study
        revisions[number] = Revision(number, area, revision, supersedes)
    return {
        study: [
            revisions[number]
            for number in sorted(revisions)
            if owners[number] == study or number in areas.values()
        ]
        for study, areas in current.items()
    }


_COPIED = (
    "weights",
    "logit",
    "probability",
    "calibrated",
    "decision",
    "threshold",
    "operating_point",
    "aggregate",
    "target",
    "preprocessing",
    "calibration",
    "runtime",
    "version",
    "scored_at",
)


def predecessor(
    area: str, current: Mapping[str, int], known: list[Revision], areas: set[str]
) -> Revision | None:
    """Return what a new result of ``area`` supersedes.

    The area's current result; else its last one that nothing has superseded; else the last such
    result of an area that the study no longer has (``areas`` are those it has now).
    """
    superseded = {revision.supersedes for revision in known}
    heads = [revision for revision in known if revision.id not in superseded]
    for fits in (
        lambda r: r.id == current.get(area) and r.area == area,
        lambda r: r.area == area,
        lambda r: r.area not in areas,
    ):
        if matching := [revision for revision in heads if fits(revision)]:
            return max(matching, key=lambda revision: revision.revision)
    return None
