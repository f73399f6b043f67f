"""What views' areas and scores amount to."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mura_batch.area import Area, AreaRules, Clue, Source
from mura_batch.assessment import PersonAnswer, aggregate, conclude, divide
from mura_batch.config import Settings
from mura_batch.scoring import sigmoid
from mura_batch.study import SourceFile, Study, View
from mura_batch.weights import bundled_card
from mura_batch.weights_card import Calibration, OperatingPoint

SETTINGS = Settings(home=Path("/nowhere"))
PLAIN = replace(
    bundled_card(Area.XR_HAND),
    calibration=None,
    operating_points=(
        OperatingPoint("balanced", 0.5),
        OperatingPoint("high_sensitivity", 0.2),
        OperatingPoint("high_specificity", 0.9),
    ),
)
CALIBRATED = replace(PLAIN, calibration=Calibration(0.8, -0.4, "exams"))


def view(name: str, *clues: Clue) -> View:
    file = SourceFile(Path("/x") / name, name, name * 8, 1)
    return View(file, 0, clues, None, None)


def study(*views: View) -> Study:
    return Study(views, None, None, "digest", ())


HAND = Clue(Source.BODY_PART, "BodyPartExamined", "HAND")
WRIST = Clue(Source.BODY_PART, "BodyPartExamined", "WRIST")
CHEST = Clue(Source.BODY_PART, "BodyPartExamined", "CHEST")


def test_two_areas_in_one_study_are_two_parts() -> None:
    parts = divide(study(view("a", HAND), view("b", WRIST), view("c", HAND)), AreaRules(), None)
    assert {p.area: [v.file.name for v in p.views] for p in parts} == {
        Area.XR_HAND: ["a", "c"],
        Area.XR_WRIST: ["b"],
    }


def test_a_silent_view_goes_with_the_others_where_they_agree() -> None:
    agreeing = divide(study(view("a", HAND), view("b")), AreaRules(), None)
    assert [(p.area, len(p.views)) for p in agreeing] == [(Area.XR_HAND, 2)]
    split = divide(study(view("a", HAND), view("b", WRIST), view("c")), AreaRules(), None)
    assert {p.area for p in split} == {Area.XR_HAND, Area.XR_WRIST, None}


def test_an_unsupported_view_never_joins_an_area() -> None:
    parts = divide(study(view("a", HAND), view("b", CHEST)), AreaRules(), None)
    assert {(p.area, p.decision.outcome) for p in parts} == {
        (Area.XR_HAND, "decided"),
        (None, "unsupported"),
    }


def test_a_person_answers_for_the_undecided_views_or_for_all() -> None:
    mixed = study(view("a", HAND), view("b", HAND, WRIST))
    some = divide(mixed, AreaRules(), PersonAnswer(Area.XR_WRIST, everywhere=False))
    assert {(p.area, p.decision.source) for p in some} == {
        (Area.XR_HAND, Source.BODY_PART),
        (Area.XR_WRIST, Source.PERSON),
    }
    whole = divide(mixed, AreaRules(), PersonAnswer(Area.XR_ELBOW, everywhere=True))
    assert [(p.area, p.decision.source) for p in whole] == [(Area.XR_ELBOW, Source.PERSON)]


def test_threshold_applies_to_the_calibrated_probability_where_there_is_one() -> None:
    logit = 0.3  # raw 0.574, calibrated sigmoid(-0.16) = 0.460
    assert conclude([logit], PLAIN, SETTINGS).decision == "positive"
    found = conclude([logit], CALIBRATED, SETTINGS)
    assert found.calibrated == pytest.approx(sigmoid(0.8 * logit - 0.4))
    assert (found.decision, found.threshold) == ("negative", 0.5)


def test_operating_point_and_site_threshold_are_named() -> None:
    sensitive = replace(SETTINGS, operating_point="high_sensitivity")
    assert conclude([-1.0], PLAIN, sensitive).operating_point == "high_sensitivity"
    assert conclude([-1.0], PLAIN, sensitive).decision == "positive"
    site = conclude([0.0], PLAIN, replace(SETTINGS, threshold=0.7))
    assert (site.threshold, site.operating_point, site.decision) == (0.7, "site", "negative")


def test_other_aggregates_decide_on_the_raw_scale_at_the_same_point() -> None:
    found = conclude([0.3], CALIBRATED, replace(SETTINGS, aggregate="max"))
    assert found.calibrated is None
    assert found.decision == "negative"
    assert sigmoid(0.8 * math.log(found.threshold / (1 - found.threshold)) - 0.4) == pytest.approx(
        0.5
    )


probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@given(probabilities)
def test_aggregates_stay_in_order(values: list[float]) -> None:
    mean, most = aggregate(values, "mean"), aggregate(values, "max")
    union = aggregate(values, "noisy_or")
    assert min(values) - 1e-9 <= mean <= most + 1e-9
    assert most - 1e-9 <= union <= 1


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=10), st.randoms())
def test_a_conclusion_does_not_depend_on_the_order_of_views(logits: list[float], rng) -> None:
    shuffled = list(logits)
    rng.shuffle(shuffled)
    one, other = conclude(logits, CALIBRATED, SETTINGS), conclude(shuffled, CALIBRATED, SETTINGS)
    assert one.probability == pytest.approx(other.probability)
    assert one.calibrated == pytest.approx(other.calibrated)


@given(st.floats(-700, 700))
def test_sigmoid_is_a_probability_and_symmetric(logit: float) -> None:
    assert 0 <= sigmoid(logit) <= 1
    assert sigmoid(logit) + sigmoid(-logit) == pytest.approx(1)
