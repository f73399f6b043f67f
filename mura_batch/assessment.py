"""What a study's evidence and its views' scores amount to: pure rules, no files, no threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mura_batch.area import Area, AreaRules, Decision, decide, decision_by_person
from mura_batch.config import Settings
from mura_batch.scoring import sigmoid
from mura_batch.study import Study, View
from mura_batch.weights import Card


@dataclass(frozen=True, slots=True)
class PersonAnswer:
    """An area that a person set.

    Attributes:
        everywhere: it holds for all views; else only for those whose evidence is not enough.
    """

    area: Area
    everywhere: bool


@dataclass(frozen=True, slots=True)
class Part:
    """The views of a study that show one area, or that nobody can place yet (area None)."""

    decision: Decision
    views: tuple[View, ...]

    @property
    def area(self) -> Area | None:
        """The area that these views are scored as."""
        return self.decision.area


def divide(study: Study, rules: AreaRules, answer: PersonAnswer | None) -> tuple[Part, ...]:
    """Decide the area image by image and gather the views of each area.

    A view without a single witness of its own goes with the others where they agree on one
    area; views that need a person form one part, views of other body parts another.
    """
    by_clues = {view.clues: view for view in study.views}  # frames of a file share them
    told = {clues: _decision(view, rules, answer) for clues, view in by_clues.items()}
    decisions = [told[view.clues] for view in study.views]
    decided = {d.area: d for d in decisions if d.area is not None}
    shared = next(iter(decided.values())) if len(decided) == 1 else None
    parts: dict[tuple[Area | None, str], tuple[Decision, list[View]]] = {}
    for view, own in zip(study.views, decisions, strict=True):
        silent = own.area is None and not own.witnesses and not own.conflicts
        decision = shared if silent and shared is not None else own
        key = (decision.area, decision.outcome)
        parts.setdefault(key, (decision, []))[1].append(view)
    return tuple(Part(decision, tuple(views)) for decision, views in parts.values())


def _decision(view: View, rules: AreaRules, answer: PersonAnswer | None) -> Decision:
    if answer is not None and answer.everywhere:
        return decision_by_person(answer.area, view.clues, rules)
    own = decide(view.clues, rules)
    if answer is not None and own.outcome == "needs_person":
        return decision_by_person(answer.area, view.clues, rules)
    return own


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The study-level numbers of one area.

    Attributes:
        logit: mean of the views' logits.
        probability: the views' raw sigmoids, aggregated.
        calibrated: the card's calibration of ``logit``; None where the card has none or the
            aggregate is not the mean it was fitted for.
        threshold: on the scale of ``calibrated`` where there is one, else of ``probability``.
        operating_point: the card's name for it, or ``site`` for a threshold from the settings.
    """

    logit: float
    probability: float
    calibrated: float | None
    decision: Literal["positive", "negative"]
    threshold: float
    operating_point: str


def conclude(logits: Sequence[float], card: Card, settings: Settings) -> Conclusion:
    """Aggregate the views' logits (at least one) and hold the result against the threshold.

    Raises:
        Misconfigured: the card has no operating point of the name that the settings ask for.
    """
    logit = sum(logits) / len(logits)
    probability = aggregate([sigmoid(x) for x in logits], settings.aggregate)
    calibration = card.calibration if settings.aggregate == "mean" else None
    calibrated = None
    if calibration is not None:
        calibrated = sigmoid(calibration.slope * logit + calibration.intercept)
    threshold, name = _threshold(card, settings, raw=calibrated is None)
    value = probability if calibrated is None else calibrated
    decision: Literal["positive", "negative"] = "positive" if value >= threshold else "negative"
    return Conclusion(logit, probability, calibrated, decision, threshold, name)


def aggregate(probabilities: Sequence[float], rule: str) -> float:
    """Return a study's probability: ``mean``, ``max`` or ``noisy_or`` (1 - Π(1 - p))."""
    if rule == "max":
        return max(probabilities)
    if rule == "noisy_or":
        return 1 - math.prod(1 - p for p in probabilities)
    return sum(probabilities) / len(probabilities)


def _threshold(card: Card, settings: Settings, *, raw: bool) -> tuple[float, str]:
    """Return threshold and its name; ``raw`` asks for the scale before calibration."""
    if settings.threshold is not None:
        return settings.threshold, "site"
    point = card.point(settings.operating_point)
    if not raw or card.calibration is None:
        return point.threshold, point.name
    bounded = min(max(point.threshold, 1e-9), 1 - 1e-9)
    logit = math.log(bounded / (1 - bounded))
    return sigmoid((logit - card.calibration.intercept) / card.calibration.slope), point.name
