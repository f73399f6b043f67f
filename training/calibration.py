"""From logits to probabilities that mean something, and the thresholds to decide at.

What is fitted here must come from cases that neither training nor selection saw.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from mura_batch.weights_card import PointName
from training.metrics import Cases, Estimate, Floats, Labels, resampled

POINTS: tuple[PointName, ...] = get_args(PointName)
_HIGH = 0.9  # sensitivity or specificity that the two one-sided operating points reach


class Scaling(NamedTuple):
    """Platt's scaling: calibrated = sigmoid(slope·logit + intercept)."""

    slope: float
    intercept: float

    def probabilities(self, logits: Floats) -> Floats:
        """Return what logits amount to."""
        return 1 / (1 + np.exp(-(self.slope * logits + self.intercept)))


def fit_calibration(logits: Floats, labels: Labels) -> Scaling | None:
    """Return Platt's scaling; None where a higher logit does not speak for the target.

    Source: J. Platt, "Probabilistic outputs for support vector machines", 1999.
    """
    model = LogisticRegression(C=1e6).fit(logits[:, None], labels)
    found = Scaling(float(model.coef_[0, 0]), float(model.intercept_[0]))
    return found if found.slope > 0 else None


def thresholds(probabilities: Floats, labels: Labels) -> dict[PointName, float]:
    """Return the three operating points' thresholds.

    ``balanced`` has the largest sensitivity + specificity; ``high_sensitivity`` is the largest
    threshold that finds 90 %; ``high_specificity`` the smallest that clears 90 %.
    """
    candidates = np.unique(probabilities)
    midpoints = np.concatenate([[0.0], (candidates[1:] + candidates[:-1]) / 2, [1.0]])
    sensitivity = 1 - _below(probabilities[labels == 1], midpoints)
    specificity = _below(probabilities[labels == 0], midpoints)
    return {
        "balanced": float(midpoints[np.argmax(sensitivity + specificity)]),
        "high_sensitivity": float(midpoints[sensitivity >= _HIGH].max()),
        "high_specificity": float(midpoints[specificity >= _HIGH].min()),
    }


def _below(values: Floats, thresholds: Floats) -> Floats:
    """Return the share of the values that lie below each threshold."""
    share: Floats = np.searchsorted(np.sort(values), thresholds, side="left") / len(values)
    return share


def cross_fitted_rates(cases: Cases, seed: int = 7) -> dict[PointName, tuple[Estimate, Estimate]]:
    """Return each operating point's (sensitivity, specificity), measured on cases it did not see.

    ``cases`` have no calibration yet. Calibration and thresholds are fitted on one random half of
    the patients and applied to the other, and the other way round; the decisions of both halves
    are pooled. Nothing is measured where a label has one patient only.
    """
    first = _half(cases, seed)
    if first is None:
        return dict.fromkeys(POINTS, (Estimate(None, None, None), Estimate(None, None, None)))
    decided = {name: np.zeros(len(cases.labels), bool) for name in POINTS}
    for fitted in (first, ~first):
        how = fit_calibration(cases.logits[fitted], cases.labels[fitted])
        values = cases.probabilities if how is None else how.probabilities(cases.logits)
        for name, threshold in thresholds(values[fitted], cases.labels[fitted]).items():
            decided[name][~fitted] = values[~fitted] >= threshold
    with_it = cases.labels == 1
    return {
        name: (
            resampled(positive.astype(float), cases.patients, with_it),
            resampled((~positive).astype(float), cases.patients, ~with_it),
        )
        for name, positive in decided.items()
    }


def _half(cases: Cases, seed: int) -> NDArray[np.bool_] | None:
    """Return the cases of half of the patients with each label; None where one label has one."""
    names = np.array(cases.patients)
    rng = np.random.default_rng(seed)
    with_it = np.unique(names[cases.labels == 1])
    without = np.setdiff1d(names, with_it)
    if len(with_it) <= 1 or len(without) <= 1:
        return None
    chosen = [rng.permutation(some)[::2] for some in (with_it, without)]
    half: NDArray[np.bool_] = np.isin(names, np.concatenate(chosen))
    return half
