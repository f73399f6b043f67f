"""Patients in folds: nobody is in two, and labels are spread evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from mura_batch.errors import Misconfigured
from training.dataset import Dataset, Film


def fold_numbers(films: Sequence[Film], count: int, seed: int) -> NDArray[np.int64]:
    """Return the fold of each film, 0 to ``count`` - 1.

    Raises:
        Misconfigured: one label has fewer patients than there are folds.
    """
    fewest = min(len({f.patient for f in films if f.label == label}) for label in (0, 1))
    if fewest < count:
        raise Misconfigured(
            f"{fewest} patients of one label are too few for {count} folds: give more films."
        )
    divided = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    labels, patients = [f.label for f in films], [f.patient for f in films]
    numbers = np.zeros(len(films), np.int64)
    for fold, (_, own) in enumerate(divided.split(numbers, labels, patients)):
        numbers[own] = fold
    return numbers


def folded(data: Dataset, count: int, seed: int) -> Dataset:
    """Return the films with new splits ``0`` … in place of their own.

    Raises:
        Misconfigured: as for :func:`fold_numbers`.
    """
    numbers = fold_numbers(data.films, count, seed)
    pairs = zip(data.films, numbers, strict=True)
    return replace(data, films=tuple(replace(film, split=str(fold)) for film, fold in pairs))
