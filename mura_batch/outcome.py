"""What one pass over a study found out, put into the ledger's records.

The pipeline fills the slots, a view each, with scores or errors; here they become readings,
results and problems. No files, no threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import version

from mura_batch.area import Area
from mura_batch.assessment import Part, conclude
from mura_batch.config import Settings
from mura_batch.errors import MuraError, Rejected, UnsupportedArea
from mura_batch.records import (
    FileProblem,
    Json,
    NewResult,
    Place,
    ReadingOutcome,
    State,
    StoredStudy,
    StudyOutcome,
    ViewOutcome,
)
from mura_batch.scoring import ViewScore
from mura_batch.study import Study, View, masked
from mura_batch.weights import Card


@dataclass(slots=True)
class Slot:
    """One view on its way: its score or the reason why there is none."""

    view: View
    score: ViewScore | None = None
    overlay: str | None = None
    error: Rejected | None = None


@dataclass(slots=True)
class PartWork:
    """One area of a study on its way.

    Attributes:
        card: of the weights that score it; None where nothing can.
        known: a stored result with the same key; its views are not scored again.
    """

    part: Part
    card: Card | None = None
    known: int | None = None
    slots: list[Slot] = field(default_factory=list)


def part_work(part: Part, stored: StoredStudy, active: Callable[[Area], Card | None]) -> PartWork:
    """Say what has to be done for one area; ``active`` gives the card that its area uses."""
    slots = [Slot(view, error=view.problem) for view in part.views]
    card = None if part.area is None else active(part.area)
    if part.area is None or card is None:
        return PartWork(part, slots=slots)
    known = stored.scored.get((part.area, card.sha256))
    if known is not None and not stored.rerun:
        return PartWork(part, card, known)
    return PartWork(part, card, slots=slots)


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass over a study that has ended: every view has its score or error.

    Attributes:
        refused: why there were no weights for views that have neither, where that is known.
    """

    stored: StoredStudy
    study: Study
    parts: Sequence[PartWork]
    refused: MuraError | None = None


def study_outcome(ended: Pass, settings: Settings) -> StudyOutcome:
    """Return what the ledger is to be told of a study.

    Raises:
        Misconfigured: a card lacks the operating point that the settings ask for.
    """
    now = datetime.now(UTC)
    return StudyOutcome(
        study_id=ended.stored.id,
        request=ended.stored.request,
        digest=ended.stored.digest,
        at=now,
        readings=tuple(_reading(work, ended, settings, now) for work in _joined(ended.parts)),
        problems=_file_problems(ended),
        events=tuple(
            ("identifier_conflict", {"sop_instance_uid": uid}) for uid in ended.study.conflicts
        ),
    )


def _joined(parts: Sequence[PartWork]) -> list[PartWork]:
    """Return at most one part without an area: what a person can answer stands for all of it."""
    placed = [work for work in parts if work.part.area is not None]
    loose = [work for work in parts if work.part.area is None]
    loose.sort(
        key=lambda work: (
            work.part.decision.outcome != "needs_person" or all(slot.error for slot in work.slots)
        )
    )
    return placed + loose[:1]


def _reading(work: PartWork, ended: Pass, settings: Settings, now: datetime) -> ReadingOutcome:
    """Say how one area of the study ended."""
    decision = work.part.decision

    def told(
        state: State, code: str = "", reason: str = "", result: NewResult | int | None = None
    ) -> ReadingOutcome:
        return ReadingOutcome(
            area=decision.area,
            state=state,
            area_source=decision.source,
            evidence=decision.evidence(),
            reason_code=code,
            reason=reason,
            result=result,
        )

    def done(result: NewResult | int) -> ReadingOutcome:
        if not ended.study.conflicts:
            return told(State.DONE, result=result)
        why = "files of different content have one SOP Instance UID: all were scored"
        return told(State.DONE, "identifier_conflict", why, result)

    if work.known is not None:
        return done(work.known)
    errors = [slot.error for slot in work.slots]
    first = next((error for error in errors if error is not None), None)
    if first is not None and all(errors):
        return told(State.QUARANTINED, first.code, str(first))
    if decision.outcome == "unsupported":
        return told(State.QUARANTINED, "unsupported_area", decision.why)
    if decision.area is None:
        answer = f"answer with `mura-batch rerun {ended.stored.id} --set-area AREA`"
        if all(file.place is Place.OUTSIDE for file in ended.stored.files):
            answer = "name it with `--area AREA`"
        return told(State.NEEDS_AREA, "needs_area", f"{decision.why}; {answer}")
    scores = [slot.score for slot in work.slots if slot.score is not None]
    if work.card is None or not scores:
        return told(State.NO_WEIGHTS, "no_weights", _no_weights(decision.area, ended.refused))
    return done(_result(work.card, scores, work.slots, settings, now))


def _no_weights(area: Area, refused: MuraError | None) -> str:
    if refused is not None:
        return str(refused)
    return f"no active weights for {area}: run `mura-batch models fetch {area}` or `models import`"


def _result(
    card: Card,
    scores: Sequence[ViewScore],
    slots: Sequence[Slot],
    settings: Settings,
    now: datetime,
) -> NewResult:
    conclusion = conclude([score.logit for score in scores], card, settings)
    data = _card_data(card)
    return NewResult(
        weights=card.sha256,
        card=data,
        logit=conclusion.logit,
        probability=conclusion.probability,
        calibrated=conclusion.calibrated,
        decision=conclusion.decision,
        threshold=conclusion.threshold,
        operating_point=conclusion.operating_point,
        aggregate=settings.aggregate,
        target=card.target,
        preprocessing=data["preprocessing"],
        calibration=data["calibration"],
        runtime=scores[0].runtime,
        version=_program_version(),
        scored_at=now,
        views=tuple(map(_view_outcome, slots)),
    )


@lru_cache(maxsize=len(Area))
def _card_data(card: Card) -> Json:
    """Return what a card says as JSON values, the same objects for the same card."""
    data: Json = json.loads(card.to_json())
    return data


@cache
def _program_version() -> str:
    return version("mura-batch")


def _view_outcome(slot: Slot) -> ViewOutcome:
    view, score = slot.view, slot.score
    return ViewOutcome(
        sha256=view.file.sha256,
        frame=view.frame,
        source=masked(view.file.name),
        sop_instance_uid=view.sop_instance_uid,
        logit=None if score is None else score.logit,
        probability=None if score is None else score.probability,
        overlay=slot.overlay,
        error_code="" if slot.error is None else slot.error.code,
        error="" if slot.error is None else str(slot.error),
    )


def _file_problems(ended: Pass) -> tuple[FileProblem, ...]:
    """Return the files none of whose views can ever be scored; known parts keep theirs."""
    before = {file.sha256: file.problem.partition(": ") for file in ended.stored.files}
    by_file: dict[str, list[Rejected | None]] = {}
    for work in ended.parts:
        for view in work.part.views if work.known is not None else ():
            code, _, message = before[view.file.sha256]
            kept = Rejected(code, message) if code else None
            by_file.setdefault(view.file.sha256, []).append(kept)
        for slot in work.slots:
            error = slot.error
            if error is None and work.part.decision.outcome == "unsupported":
                error = UnsupportedArea("unsupported_area", work.part.decision.why)
            by_file.setdefault(slot.view.file.sha256, []).append(error)
    return tuple(
        FileProblem(sha256, errors[0].code, str(errors[0]))
        for sha256, errors in by_file.items()
        if errors[0] is not None and all(errors)
    )
