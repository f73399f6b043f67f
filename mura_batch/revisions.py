"""How a fresh score becomes a revision: same key, same row; else N+1, naming what it supersedes.

A result is never changed. Which of a study's results is current is said by its readings alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from mura_batch.errors import Misconfigured
from mura_batch.records import NewResult, ReadingOutcome, StudyOutcome
from mura_batch.results import Latest, chunks, latest_results
from mura_batch.schema import readings, results, views, weights


@dataclass(frozen=True, slots=True)
class Revision:
    """A stored result of a study, as far as numbering needs it."""

    id: int
    area: str
    revision: int
    supersedes: int | None


class Revisions:
    """The results of some studies during one commit.

    Args:
        reruns: ids of the studies for which a stored key gets a new row all the same.
    """

    def __init__(
        self, connection: Connection, outcomes: Sequence[StudyOutcome], reruns: Collection[str]
    ) -> None:
        self._connection = connection
        self._reruns = reruns
        ids = [outcome.study_id for outcome in outcomes]
        self._current: dict[str, dict[str, int]] = {study: {} for study in ids}
        shown = select(readings.c.study_id, readings.c.area, readings.c.result_id)
        for some in chunks(ids):
            with_result = shown.where(
                readings.c.study_id.in_(some), readings.c.result_id.is_not(None)
            )
            for study, area, number in connection.execute(with_result):
                self._current[study][area] = number or 0
        self._known = _known(connection, self._current)
        self._latest = latest_results(connection, [outcome.digest for outcome in outcomes])
        cards = select(weights.c.digest, weights.c.area)
        self._weights = {tuple(row) for row in connection.execute(cards)}

    def place(self, outcome: StudyOutcome, reading: ReadingOutcome) -> int | None:
        """Return the id of the reading's result; stores it where its key is new, or on a rerun.

        A reading without a result (failed, without weights) keeps showing its area's last one.

        Raises:
            Misconfigured: the reading names a result that is not stored.
        """
        if isinstance(reading.result, int):
            self._require(reading.result)
            return reading.result
        area = reading.area or ""
        if reading.result is None:
            return self._current[outcome.study_id].get(area)
        keys = self._latest.setdefault(outcome.digest, {})
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
        inserted = self._connection.execute(
            insert(results).values(
                study_id=outcome.study_id,
                area=area,
                revision=number,
                supersedes=before.id if before else None,
                digest=outcome.digest,
                run=run,
                views=len(result.views),
                views_failed=sum(view.logit is None for view in result.views),
                area_source=reading.area_source,
                evidence=reading.evidence,
                **{name: getattr(result, name) for name in _COPIED},
            )
        )
        new = int((inserted.inserted_primary_key or (0,))[0])
        if result.views:
            self._connection.execute(
                insert(views),
                [
                    {"result_id": new}
                    | {name: getattr(view, name) for name in type(view).__dataclass_fields__}
                    for view in result.views
                ],
            )
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
    columns = (results.c.id, results.c.area, results.c.revision, results.c.supersedes)
    wanted = select(results.c.study_id, *columns)
    owners: dict[int, str] = {}
    revisions: dict[int, Revision] = {}
    shown = sorted({number for areas in current.values() for number in areas.values()})
    own = (results.c.study_id.in_(some) for some in chunks(list(current)))
    also = (results.c.id.in_(some) for some in chunks(shown))
    for which in (*own, *also):
        for row in connection.execute(wanted.where(which)):
            owners[row.id] = row.study_id
            revisions[row.id] = Revision(row.id, row.area, row.revision, row.supersedes)
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
