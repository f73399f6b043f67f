"""Figures of classifiers against scikit-learn's, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn import metrics as reference

from training.metrics import (
    Cases,
    Estimate,
    auc_of,
    average_precision,
    brier,
    calibration_error,
    difference,
    figures,
    roc_auc,
)

drawn = st.lists(
    st.tuples(st.integers(-4, 4), st.integers(0, 1), st.integers(0, 3)), min_size=2, max_size=40
)


def made(seed: int = 1, count: int = 300, views: int = 1) -> Cases:
    """Cases of which ``views`` after each other are copies, of one patient."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.4).astype(np.int64)
    logits = rng.normal(1.5 * labels - 0.7, 1.0)
    names = [str(number) for number in range(count) for _ in range(views)]
    logits, labels = np.repeat(logits, views), np.repeat(labels, views)
    return Cases(logits, 1 / (1 + np.exp(-logits)), labels, tuple(names))


@given(drawn)
def test_weighted_figures_are_those_of_scikit_learn(cases: list[tuple[int, int, int]]) -> None:
    scores, labels, weights = (np.array(column) for column in zip(*cases, strict=True))
    assume(len(set(labels[weights > 0])) == 2)
    both = np.stack([weights, np.ones(len(cases))]).astype(float)
    values = scores.astype(float)
    assert roc_auc(values, labels, both)[0] == pytest.approx(
        reference.roc_auc_score(labels, scores, sample_weight=weights)
    )
    assert average_precision(values, labels, both)[0] == pytest.approx(
        reference.average_precision_score(labels, scores, sample_weight=weights)
    )
    probabilities = 1 / (1 + np.exp(-values))
    assert brier(probabilities, labels, both)[0] == pytest.approx(
        reference.brier_score_loss(labels, probabilities, sample_weight=weights)
    )


def test_figures_at_a_threshold_are_those_of_scikit_learn() -> None:
    cases = made()
    told = figures(cases, {"balanced": 0.4, "high_sensitivity": 0.2})
    positive = cases.probabilities >= 0.4
    assert told["accuracy"].value == pytest.approx(reference.accuracy_score(cases.labels, positive))
    assert told["f1"].value == pytest.approx(reference.f1_score(cases.labels, positive))
    assert told["kappa"].value == pytest.approx(reference.cohen_kappa_score(cases.labels, positive))
    assert told["sensitivity_balanced"].value == pytest.approx(
        reference.recall_score(cases.labels, positive)
    )
    assert told["specificity_high_sensitivity"].value == pytest.approx(
        reference.recall_score(cases.labels, cases.probabilities >= 0.2, pos_label=0)
    )
    assert all(one.low <= one.value <= one.high for one in told.values() if one is not told["ece"])


def test_calibration_error_is_the_gap_of_ten_bins_of_equal_mass() -> None:
    probabilities = np.linspace(0.005, 0.995, 100)
    labels = (np.arange(100) % 10 < np.arange(100) // 10 + 0.5).astype(np.int64)
    once = np.ones((1, 100))
    bins = [slice(start, start + 10) for start in range(0, 100, 10)]
    by_hand = np.mean([abs((probabilities[b] - labels[b]).mean()) for b in bins])
    assert calibration_error(probabilities, labels, once)[0] == pytest.approx(by_hand)
    assert calibration_error(labels.astype(float), labels, once)[0] == 0
    half = np.arange(100) % 2
    tied = np.full(100, 0.5)
    assert calibration_error(tied, half, once)[0] == 0
    assert calibration_error(tied, np.sort(half), once)[0] == 0
    assert calibration_error(1.0 - half, half, once)[0] == 1


def test_views_of_one_patient_are_no_further_evidence() -> None:
    def width(cases: Cases) -> float:
        told = auc_of(cases)
        return told.high - told.low

    once, four_times = made(2), made(2, views=4)
    assert width(four_times) == pytest.approx(width(once), rel=0.1)
    as_strangers = Cases(
        four_times.logits,
        four_times.probabilities,
        four_times.labels,
        tuple(map(str, range(len(four_times.labels)))),
    )
    assert width(as_strangers) < 0.6 * width(once)


def test_one_label_alone_has_no_area_under_a_curve() -> None:
    cases = made()
    told = figures(cases.only(cases.labels == 1), {"balanced": 0.5})
    assert told["roc_auc"].value is None
    assert told["specificity_balanced"].value is None
    assert told["sensitivity_balanced"].value is not None


def test_nothing_is_estimated_from_few_patients() -> None:
    cases = made()
    few = np.flatnonzero(cases.labels == 1)[:4]
    chosen = np.isin(np.arange(len(cases.labels)), few) | (cases.labels == 0)
    told = figures(cases.only(chosen), {"balanced": 0.5})
    for name in ("roc_auc", "average_precision", "f1", "kappa", "sensitivity_balanced"):
        assert told[name] == Estimate(None, None, None)
    for name in ("brier", "ece", "accuracy", "specificity_balanced"):
        assert told[name].value is not None


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    cases = made(3)
    noise = np.random.default_rng(4).normal(0, 0.2, len(cases.labels))
    other = Cases(cases.logits + noise, cases.probabilities, cases.labels, cases.patients)
    told = difference(cases, other, roc_auc)
    alone = auc_of(cases)
    assert told.low < told.value < told.high
    assert told.high - told.low < 0.5 * (alone.high - alone.low)
    assert difference(cases, cases, roc_auc).value == 0
