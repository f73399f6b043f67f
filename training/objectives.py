"""What a network is made to minimise, and how both classes come to count in it.

All of it is differentiable in the one forward pass, because the evidence map is a closed form
(:mod:`mura_batch.network`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training.dataset import Film
from training.settings import Imbalance

_FAINT = -15.0  # from here down the logarithm of a softplus is its argument


def film_weights(films: Sequence[Film], imbalance: Imbalance) -> NDArray[np.float64]:
    """Return how much each film's loss counts.

    With ``mura``, of N negative and A positive films, positives count N / (A + N) and negatives
    A / (A + N), as in the MURA paper.
    """
    own = np.array([film.weight for film in films])
    if imbalance != "mura":
        return own
    positive = np.array([film.label for film in films]) == 1
    share = positive.mean()
    weights: NDArray[np.float64] = own * np.where(positive, 1 - share, share)
    return weights


def film_order(
    labels: NDArray[np.intp], imbalance: Imbalance, rng: np.random.Generator
) -> list[int]:
    """Return the numbers of an epoch's films, as many as there are, in a random order.

    With ``balanced`` as many of either label, and of one label none more than once oftener than
    another; else each film once.
    """
    chosen = np.arange(len(labels))
    if imbalance == "balanced":
        half = len(labels) // 2
        sides = zip((half, len(labels) - half), (0, 1), strict=True)
        chosen = np.concatenate(
            [_evenly(np.flatnonzero(labels == label), count, rng) for count, label in sides]
        )
    order: list[int] = rng.permutation(chosen).tolist()
    return order


def _evenly(films: NDArray[np.intp], count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    rounds = [rng.permutation(films) for _ in range(math.ceil(count / len(films)))]
    return np.concatenate(rounds)[:count]


def outside(maps: Tensor, boxes: Tensor) -> Tensor:
    """Return how little of the evidence's energy lies inside the boxes, (N,): -log of its share.

    ``maps`` (N, h, w) is signed evidence, ``boxes`` (N, h, w) the share of each cell that lies in
    a box; films without one give 0. The energy of a cell is a smooth form of its positive part, so
    that a box without any is pulled up too. After the energy-based pointing game of H. Wang et
    al., "Score-CAM", CVPR workshops 2020.
    """
    evidence = maps.float().flatten(1) * (maps.shape[-2] * maps.shape[-1])
    energy = torch.where(
        evidence < _FAINT, evidence, functional.softplus(evidence.clamp_min(_FAINT)).log()
    )
    shares = boxes.flatten(1)
    boxed = shares.sum(dim=1, keepdim=True) > 0
    inside = torch.where(boxed, shares, 1.0).log()  # of films without a box: everything
    lost: Tensor = energy.logsumexp(dim=1) - (energy + inside).logsumexp(dim=1)
    return lost


def unsteady(maps: Tensor, mirrored: Tensor) -> Tensor:
    """Return how far maps differ from those of the films mirrored and moved by a cell, (N,).

    ``mirrored`` is of the same films moved up and left by a cell, then mirrored. After the
    equivariant regularisation of Y. Wang et al., "Self-supervised Equivariant Attention Mechanism
    for Weakly Supervised Semantic Segmentation", CVPR 2020.
    """
    cells = maps.shape[-2] * maps.shape[-1]
    back = mirrored.flip(-1)
    return ((maps[:, 1:, 1:] - back[:, :-1, :-1]) * cells).abs().mean(dim=(1, 2))


def regions_and_views(films: Sequence[Film]) -> NDArray[np.float32]:
    """Return for each film which of all regions and views it shows, (N, K) of 0 and 1."""
    told = [{film.area, *film.also, *film.views} for film in films]
    names = sorted(set().union(*told))
    return np.array([[name in of_film for name in names] for of_film in told], np.float32)
