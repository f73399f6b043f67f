"""Whether the evidence lies where the boxes are: pointing game, energy inside, overlap.

Sources: J. Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016 (pointing
game); H. Wang et al., "Score-CAM", CVPR workshops 2020 (energy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mura_batch.network_input import Box
from training.dataset import Edges, Region

_FINE = 32  # pixels a cell for the overlap, as on a 224 pixel input with a 7 by 7 map
LEVEL = 0.5  # of the peak: what is brighter counts as marked for the overlap


@dataclass(frozen=True, slots=True)
class Localised:
    """How one film's evidence lies to its boxes.

    Attributes:
        hit: the cell with the most evidence touches a box.
        chance: share of the cells that touch one, what a random cell would reach.
        energy: share of the positive evidence inside the boxes.
        overlap: intersection over union of the boxes and the evidence above ``LEVEL`` of its peak.
    """

    hit: bool
    chance: float
    energy: float
    overlap: float


def localise(
    evidence: NDArray[np.float32], boxes: Sequence[Region], seen: Box, size: tuple[int, int]
) -> Localised:
    """Hold a map (h, w) of the region ``seen`` of a film of (height, width) against its boxes.

    Where no box lies in what the network saw, or nothing speaks for the target, it is a miss.
    """
    edges = [box.within(seen, size) for box in boxes]
    touched = _covered(edges, evidence.shape, touch=True)
    positive = np.maximum(evidence, 0.0)
    chance = float(touched.mean())
    if not touched.any() or not positive.any():
        return Localised(hit=False, chance=chance, energy=0.0, overlap=0.0)
    peak = np.unravel_index(int(np.argmax(evidence)), evidence.shape)
    fine = (evidence.shape[0] * _FINE, evidence.shape[1] * _FINE)
    inside = _covered(edges, fine, touch=False)
    smooth = np.asarray(
        Image.fromarray(positive.astype(np.float32)).resize(
            (fine[1], fine[0]), Image.Resampling.BILINEAR
        )
    )
    marked = smooth >= LEVEL * smooth.max()
    return Localised(
        hit=bool(touched[peak]),
        chance=chance,
        energy=float(smooth[inside].sum() / smooth.sum()),
        overlap=float((marked & inside).sum() / (marked | inside).sum()),
    )


def _covered(boxes: Sequence[Edges], shape: tuple[int, ...], *, touch: bool) -> NDArray[np.bool_]:
    """Return the cells that boxes touch, or those whose centres lie inside."""
    mask = np.zeros(shape, bool)
    rows, columns = np.arange(shape[0]), np.arange(shape[1])
    near, far = (0.0, 1.0) if touch else (0.5, 0.5)
    for left, top, right, bottom in boxes:
        down = (rows + far > top * shape[0]) & (rows + near < bottom * shape[0])
        across = (columns + far > left * shape[1]) & (columns + near < right * shape[1])
        mask |= down[:, None] & across[None]
    return mask
