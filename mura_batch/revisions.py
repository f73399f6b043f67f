"""How a fresh score becomes a revision: same key, same row; else N+1, naming what it supersedes.

A result is never changed. Which of a study's results is current is said by its readings alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, func, insert, or_, select

from mura_batch.errors import Misconfigured
from mura_batch.records import NewResult, ReadingOutcome, StudyOutcome
from mura_batch.results import latest_result
from mura_batch.schema import readings, results, views, weights


@dataclass(frozen=True, slots=True)
class Revision:
    """A stored result of a study, as far as numbering needs it."""

    id: int
    area: str
    revision: int
    supersedes: int | None


class Revisions:
    """The results of one study during one commit."""

    def __init__(self, connection: Connection, outcome: StudyOutcome, *, rerun: bool) -> None:
        self._connection = connection
        self._outcome = outcome
        self._rerun = rerun
        study = outcome.study_id
        shown = select(readings.c.area, readings.c.result_id).where(
            readings.c.study_id == study, readings.c.result_id.is_not(None)
        )
        self._current = {area: number or 0 for area, number in connection.execute(shown)}
        columns = (results.c.id, results.c.area, results.c.revision, results.c.supersedes)
        known = select(*columns).where(
            or_(results.c.study_id == study, results.c.id.in_(self._current.values()))
        )
        self._known = [Revision(*row) for row in connection.execute(known.order_by(results.c.id))]

    def place(self, reading: ReadingOutcome) -> int | None:
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
            return self._current.get(area)
        stored = latest_result(self._connection, self._outcome.digest, area, reading.result.weights)
        if stored is not None and not self._rerun:
            return stored.id
        return self._append(reading, reading.result, run=stored.run + 1 if stored else 1)

    def _append(self, reading: ReadingOutcome, result: NewResult, run: int) -> int:
        area = reading.area or ""
        before = predecessor(
            area, self._current, self._known, {r.area or "" for r in self._outcome.readings}
        )
        same_area = [known.revision for known in self._known if known.area == area]
        number = 1 + max([*same_area, before.revision if before else 0])
        self._use_weights(area, result)
        inserted = self._connection.execute(
            insert(results).values(
                study_id=self._outcome.study_id,
                area=area,
                revision=number,
                supersedes=before.id if before else None,
                digest=self._outcome.digest,
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
        self._known.append(Revision(new, area, number, before.id if before else None))
        return new

    def _use_weights(self, area: str, result: NewResult) -> None:
        known = select(func.count()).where(
            weights.c.digest == result.weights, weights.c.area == area
        )
        if not self._connection.execute(known).scalar_one():
            self._connection.execute(
                insert(weights).values(
                    digest=result.weights,
                    area=area,
                    card=result.card,
                    first_used=result.scored_at,
                )
            )

    def _require(self, result: int) -> None:
        wanted = select(results.c.id).where(results.c.id == result)
        if self._connection.execute(wanted).scalar() is None:
            raise Misconfigured(f"No result {result} is stored; was the database replaced?")


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
