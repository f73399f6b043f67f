"""Figures of a binary classifier, each with its interval over resampled patients.

A bootstrap sample is a weight per case: how often it was drawn. So every figure is computed for
all samples at once, from weights of shape (B, N); one row of ones gives the figure itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mura_batch.weights_card import PointName

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Figure = Callable[[Floats], Floats]  # weights (B, N) → one value a sample, NaN where there is none
_Needed = tuple[NDArray[np.bool_], ...]  # groups of the cases, (N,) each

_RESAMPLES = 2000
_SEED = 11
_CELLS = 4_000_000  # of a matrix of weights: what is in memory at a time
_FEWEST = 5  # patients of a label that a figure needs: the bootstrap of fewer says nothing
_BINS = 10


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % percentile-bootstrap interval (None: not estimable).

    Nothing is estimated from fewer than five patients of a label that the figure is of.
    """

    value: float | None
    low: float | None
    high: float | None

    def words(self, style: str = ".3f") -> str:
        """Return figure and interval in words; ``style`` is that of each number."""
        if self.value is None or self.low is None or self.high is None:
            return "not estimable"
        value, low, high = (format(number, style) for number in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"


@dataclass(frozen=True, slots=True)
class Cases:
    """Scored images or studies.

    Attributes:
        logits: shape (N,), raw.
        probabilities: shape (N,), as the product gives them: calibrated where the card says how.
        labels: shape (N,), 0 or 1.
        patients: whose each is; they are resampled whole.
    """

    logits: Floats
    probabilities: Floats
    labels: Labels
    patients: tuple[str, ...]

    def only(self, chosen: NDArray[np.bool_]) -> Cases:
        """Return some of the cases."""
        numbers = np.flatnonzero(chosen)
        return Cases(
            self.logits[numbers],
            self.probabilities[numbers],
            self.labels[numbers],
            tuple(self.patients[n] for n in numbers),
        )


def figures(cases: Cases, thresholds: Mapping[PointName, float]) -> dict[str, Estimate]:
    """Return every figure of the cases, at each of the named thresholds where it needs one.

    Accuracy, F1 and kappa are those at ``balanced``.
    """
    truth = cases.labels == 1
    every, both = _all_of(cases), _of_each_label(cases)
    found: dict[str, tuple[Figure, _Needed]] = {
        "roc_auc": (lambda w: roc_auc(cases.logits, cases.labels, w), both),
        "average_precision": (lambda w: average_precision(cases.logits, cases.labels, w), both),
        "brier": (lambda w: brier(cases.probabilities, cases.labels, w), every),
        "ece": (lambda w: calibration_error(cases.probabilities, cases.labels, w), every),
    }
    for name, threshold in thresholds.items():
        counts = _Decisions(cases.probabilities >= threshold, truth)
        found[f"sensitivity_{name}"] = counts.sensitivity, (truth,)
        found[f"specificity_{name}"] = counts.specificity, (~truth,)
        if name == "balanced":
            found["accuracy"] = counts.accuracy, every
            found |= {"f1": (counts.f1, both), "kappa": (counts.kappa, both)}
    return {
        name: estimate(figure, cases.patients, needed) for name, (figure, needed) in found.items()
    }


def _resamples(patients: Sequence[str]) -> Iterator[Floats]:
    """Yield how often each case is drawn in samples of patients, (some, N) at a time."""
    _, group = np.unique(np.array(patients), return_inverse=True)
    count = int(group.max()) + 1
    rng = np.random.default_rng(_SEED)
    step = max(1, _CELLS // len(patients))
    for start in range(0, _RESAMPLES, step):
        some = min(step, _RESAMPLES - start)
        yield rng.multinomial(count, np.full(count, 1 / count), some)[:, group].astype(np.float64)


def resampled(values: Floats, patients: Sequence[str], among: NDArray[np.bool_]) -> Estimate:
    """Return the mean of values over some of the cases."""
    chosen = among.astype(np.float64)
    return estimate(lambda w: w @ (values * chosen) / (w @ chosen), patients, (among,))


def auc_of(cases: Cases) -> Estimate:
    """Return the area under the ROC curve of the logits."""
    return estimate(
        lambda w: roc_auc(cases.logits, cases.labels, w), cases.patients, _of_each_label(cases)
    )


def ece_of(cases: Cases) -> Estimate:
    """Return the expected calibration error of the probabilities."""
    return estimate(
        lambda w: calibration_error(cases.probabilities, cases.labels, w),
        cases.patients,
        _all_of(cases),
    )


def difference(
    one: Cases, other: Cases, figure: Callable[[Floats, Labels, Floats], Floats]
) -> Estimate:
    """Return how much higher a figure of the logits is for ``one``, over the same samples.

    Both are scores of the same cases in the same order (paired bootstrap).
    """
    return estimate(
        lambda w: figure(one.logits, one.labels, w) - figure(other.logits, other.labels, w),
        one.patients,
        _of_each_label(one),
    )


def _all_of(cases: Cases) -> _Needed:
    return (np.ones(len(cases.labels), bool),)


def _of_each_label(cases: Cases) -> _Needed:
    return cases.labels == 1, cases.labels == 0


def estimate(figure: Figure, patients: Sequence[str], needed: _Needed) -> Estimate:
    """Return a figure and its interval over the samples of patients in which it exists.

    ``needed`` are groups of cases that it is of: of each there must be patients enough.
    """
    names = np.array(patients)
    if min(len(np.unique(names[group])) for group in needed) < _FEWEST:
        return Estimate(None, None, None)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(figure(np.ones((1, len(patients))))[0])
        drawn = np.concatenate([figure(samples) for samples in _resamples(patients)])
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(drawn):
        return Estimate(None, None, None)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


# ---- figures; weights have shape (B, N), scores and labels (N,)


def roc_auc(scores: Floats, labels: Labels, weights: Floats) -> Floats:
    """Return the area under the ROC curve: how often a positive stands above a negative."""
    _, rank = np.unique(scores, return_inverse=True)
    positive = _by_rank(weights * (labels == 1), rank)
    negative = _by_rank(weights * (labels == 0), rank)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=1)
    value: Floats = wins / (positive.sum(axis=1) * negative.sum(axis=1))
    return value


def average_precision(scores: Floats, labels: Labels, weights: Floats) -> Floats:
    """Return the precision at each positive, averaged (not interpolated)."""
    _, rank = np.unique(-scores, return_inverse=True)
    positive = _by_rank(weights * (labels == 1), rank)
    found = np.cumsum(positive, axis=1)
    told = np.cumsum(_by_rank(weights, rank), axis=1)
    precision = np.divide(found, told, out=np.zeros_like(found), where=told > 0)
    value: Floats = (positive * precision).sum(axis=1) / positive.sum(axis=1)
    return value


def brier(probabilities: Floats, labels: Labels, weights: Floats) -> Floats:
    """Return the mean squared distance of probability and label."""
    value: Floats = weights @ (probabilities - labels) ** 2 / weights.sum(axis=1)
    return value


def calibration_error(probabilities: Floats, labels: Labels, weights: Floats) -> Floats:
    """Return the expected calibration error over ten bins of equal mass.

    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI
    2015; cases of one probability lie together in the bin of the middle of their mass.
    """
    levels, rank = np.unique(probabilities, return_inverse=True)
    mass = _by_rank(weights, rank)
    gap = mass * levels - _by_rank(weights * labels, rank)
    total = mass.sum(axis=1, keepdims=True)
    middle = (np.cumsum(mass, axis=1) - mass / 2) / total
    bins = np.minimum((middle * _BINS).astype(np.int64), _BINS - 1)
    value = np.zeros(len(weights))
    for number in range(_BINS):
        value += np.abs(np.where(bins == number, gap, 0.0).sum(axis=1))
    value /= total[:, 0]
    return value


def _by_rank(weights: Floats, rank: NDArray[np.intp]) -> Floats:
    """Return the weights summed over equal scores, lowest first."""
    order = np.argsort(rank, kind="stable")
    starts = np.flatnonzero(np.diff(rank[order], prepend=-1))
    if not len(starts):
        return weights
    value: Floats = np.add.reduceat(weights[:, order], starts, axis=1)
    return value


class _Decisions:
    """What decisions get right, over samples."""

    def __init__(self, positive: NDArray[np.bool_], truth: NDArray[np.bool_]) -> None:
        self._positive = positive.astype(np.float64)
        self._truth = truth.astype(np.float64)
        self._hit = self._positive * self._truth

    def sensitivity(self, weights: Floats) -> Floats:
        """Return the share of the positive cases that were found."""
        value: Floats = weights @ self._hit / (weights @ self._truth)
        return value

    def specificity(self, weights: Floats) -> Floats:
        """Return the share of the negative cases that were cleared."""
        value: Floats = weights @ self._cleared() / (weights @ (1 - self._truth))
        return value

    def accuracy(self, weights: Floats) -> Floats:
        """Return the share of the cases that were decided as they are."""
        value: Floats = weights @ (self._hit + self._cleared()) / weights.sum(axis=1)
        return value

    def f1(self, weights: Floats) -> Floats:
        """Return the harmonic mean of precision and sensitivity."""
        value: Floats = 2 * (weights @ self._hit) / (weights @ (self._positive + self._truth))
        return value

    def kappa(self, weights: Floats) -> Floats:
        """Return Cohen's kappa: agreement beyond that of chance."""
        total = weights.sum(axis=1)
        told, true = weights @ self._positive / total, weights @ self._truth / total
        chance = told * true + (1 - told) * (1 - true)
        value: Floats = (self.accuracy(weights) - chance) / (1 - chance)
        return value

    def _cleared(self) -> Floats:
        return (1 - self._positive) * (1 - self._truth)
