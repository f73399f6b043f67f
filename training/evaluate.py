"""What a network does on held-back exams, with intervals, and the thresholds to use it at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from mura_batch.network import EvidenceNet, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from training.dataset import Film

Floats = NDArray[np.float64]
_RESAMPLES = 2000
_HIGH = 0.9  # sensitivity or specificity that the two one-sided operating points reach


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % percentile-bootstrap interval over exams (None: not estimable)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class ExamScores:
    """Study-level scores of held-back exams.

    Attributes:
        logits: shape (N,), mean logit of each exam's films.
        labels: shape (N,), 1 where any film of the exam has the target.
        areas: the area that most films of the exam show.
    """

    logits: Floats
    labels: NDArray[np.int64]
    areas: tuple[str, ...]

    def only(self, area: str) -> ExamScores:
        """Return the exams of one area."""
        chosen = np.array([name == area for name in self.areas])
        return ExamScores(
            self.logits[chosen], self.labels[chosen], tuple(a for a in self.areas if a == area)
        )


def score_exams(
    network: EvidenceNet, films: Sequence[Film], spec: Preprocessing, *, batch: int = 16
) -> ExamScores:
    """Score ``films`` as the product does and gather them by exam."""
    network.eval()
    logits: list[float] = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(films), batch), desc="scoring", disable=None):
            chunk = films[start : start + batch]
            pixels = np.stack([read_film(film.path, 0, spec)[1].pixels for film in chunk])
            images = normalise(torch.from_numpy(pixels), spec.mean, spec.std)
            logits += network(images).logit.tolist()
    exams: dict[str, list[int]] = {}
    for index, film in enumerate(films):
        exams.setdefault(film.exam, []).append(index)
    areas = []
    for members in exams.values():
        names = [films[i].area for i in members]
        areas.append(max(sorted(set(names)), key=names.count))
    return ExamScores(
        np.array([np.mean([logits[i] for i in members]) for members in exams.values()]),
        np.array([max(films[i].label for i in members) for members in exams.values()]),
        tuple(areas),
    )


def auc(scores: ExamScores) -> Estimate:
    """Return the study-level area under the ROC curve."""
    return _bootstrap(
        lambda chosen: float(roc_auc_score(scores.labels[chosen], scores.logits[chosen])),
        scores.labels,
    )


def fit_calibration(logits: Floats, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Return (slope, intercept) of Platt's scaling: calibrated = sigmoid(slope·logit + intercept).

    Source: J. Platt, "Probabilistic outputs for support vector machines", 1999.
    """
    model = LogisticRegression(C=1e6).fit(logits[:, None], labels)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def thresholds(values: Floats, labels: NDArray[np.int64]) -> dict[str, float]:
    """Return the three operating points' thresholds on the scale of ``values``.

    ``balanced`` has the largest sensitivity + specificity; ``high_sensitivity`` is the largest
    threshold that finds 90 %; ``high_specificity`` the smallest that clears 90 %.
    """
    candidates = np.unique(values)
    midpoints = np.concatenate([[0.0], (candidates[1:] + candidates[:-1]) / 2, [1.0]])
    rates = np.array([_rates(values, labels, t) for t in midpoints])
    sensitivity, specificity = rates[:, 0], rates[:, 1]
    return {
        "balanced": float(midpoints[np.argmax(sensitivity + specificity)]),
        "high_sensitivity": float(midpoints[sensitivity >= _HIGH].max()),
        "high_specificity": float(midpoints[specificity >= _HIGH].min()),
    }


def cross_fitted_rates(scores: ExamScores, seed: int = 7) -> dict[str, tuple[Estimate, Estimate]]:
    """Return each operating point's (sensitivity, specificity), measured on exams it did not see.

    Calibration and thresholds are fitted on one random half of the exams and applied to the
    other, and the other way round; the decisions of both halves are pooled.
    """
    order = np.random.default_rng(seed).permutation(len(scores.labels))
    halves = (order[::2], order[1::2])
    decided: dict[str, NDArray[np.bool_]] = {}
    for fitted, applied in (halves, halves[::-1]):
        slope, intercept = fit_calibration(scores.logits[fitted], scores.labels[fitted])
        values = 1 / (1 + np.exp(-(slope * scores.logits + intercept)))
        for name, threshold in thresholds(values[fitted], scores.labels[fitted]).items():
            positive = decided.setdefault(name, np.zeros(len(order), dtype=bool))
            positive[applied] = values[applied] >= threshold
    return {
        name: (
            _bootstrap(_share(positive, scores.labels == 1), scores.labels),
            _bootstrap(_share(~positive, scores.labels == 0), scores.labels),
        )
        for name, positive in decided.items()
    }


def _share(
    hit: NDArray[np.bool_], among: NDArray[np.bool_]
) -> Callable[[NDArray[np.int64]], float]:
    return lambda chosen: float(hit[chosen][among[chosen]].mean())


def _rates(values: Floats, labels: NDArray[np.int64], threshold: float) -> tuple[float, float]:
    positive = values >= threshold
    return float(positive[labels == 1].mean()), float((~positive)[labels == 0].mean())


def _bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], labels: NDArray[np.int64]
) -> Estimate:
    """Return ``statistic`` of all exams and its percentile interval over resampled exams."""
    if len(np.unique(labels)) < 2:  # noqa: PLR2004 - both classes are needed
        return Estimate(None, None, None)
    rng = np.random.default_rng(11)
    draws: list[float] = []
    while len(draws) < _RESAMPLES:
        chosen = rng.integers(0, len(labels), len(labels))
        if len(np.unique(labels[chosen])) == 2:  # noqa: PLR2004
            draws.append(statistic(chosen))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(statistic(np.arange(len(labels))), float(low), float(high))
