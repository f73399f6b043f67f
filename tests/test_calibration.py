"""Calibration and operating points, by what they promise."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.calibration import cross_fitted_rates, fit_calibration, thresholds
from training.metrics import Cases


def scores(seed: int, count: int = 120) -> Cases:
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(np.int64)
    labels[:2] = (0, 1)
    logits = rng.normal(labels * 1.5, 1.0)
    patients = tuple(str(number) for number in range(count))
    return Cases(logits, 1 / (1 + np.exp(-logits)), labels, patients)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_operating_points_reach_what_they_are_named_for(seed: int) -> None:
    made = scores(seed)
    values = fit_calibration(made.logits, made.labels).probabilities(made.logits)
    points = thresholds(values, made.labels)
    assert (values[made.labels == 1] >= points["high_sensitivity"]).mean() >= 0.9
    assert (values[made.labels == 0] < points["high_specificity"]).mean() >= 0.9
    assert abs(values.mean() - made.labels.mean()) < 0.02


def test_rates_are_measured_on_patients_that_did_not_set_them() -> None:
    sensitivity, specificity = cross_fitted_rates(scores(3, 600))["balanced"]
    assert sensitivity.low < sensitivity.value < sensitivity.high
    assert 0.6 < sensitivity.value < 0.95
    assert 0.6 < specificity.value < 0.95


def test_few_studies_give_rates_or_none() -> None:
    labels = np.arange(12) % 2
    few = Cases(np.arange(12.0), np.linspace(0.1, 0.9, 12), labels, tuple("abcdefghijkl"))
    for seed in range(20):
        assert cross_fitted_rates(few, seed)["balanced"][0].value is not None
    fewer = few.only(np.arange(12) < 9)
    assert cross_fitted_rates(fewer)["balanced"][0].value is None


def test_rates_of_a_network_that_orders_the_wrong_way_are_those_of_its_decisions() -> None:
    good = scores(3, 600)
    wrong = Cases(-good.logits, 1 - good.probabilities, good.labels, good.patients)
    assert fit_calibration(wrong.logits, wrong.labels) is None
    sensitivity, specificity = cross_fitted_rates(wrong)["balanced"]
    assert sensitivity.value + specificity.value < 1.1
