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
from training.dataset import Region

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
) -> Localised | None:
    """Hold a map (h, w) of the region ``seen`` of a film of (height, width) against its boxes.

    None where no box lies in what the network saw, or nothing speaks for the target.
    """
    cells = [_in_cells(box, seen, size, evidence.shape) for box in boxes]
    touched = _covered(cells, evidence.shape, touch=True)
    positive = np.maximum(evidence, 0.0)
    if not touched.any() or not positive.any():
        return None
    peak = np.unravel_index(int(np.argmax(evidence)), evidence.shape)
    fine = (evidence.shape[0] * _FINE, evidence.shape[1] * _FINE)
    inside = _covered([tuple(_FINE * edge for edge in cell) for cell in cells], fine, touch=False)
    smooth = np.asarray(
        Image.fromarray(positive.astype(np.float32)).resize(
            (fine[1], fine[0]), Image.Resampling.BILINEAR
        )
    )
    marked = smooth >= LEVEL * smooth.max()
    return Localised(
        hit=bool(touched[peak]),
        chance=float(touched.mean()),
        energy=float(smooth[inside].sum() / smooth.sum()),
        overlap=float((marked & inside).sum() / (marked | inside).sum()),
    )


_Edges = tuple[float, ...]  # left, top, right, bottom


def _in_cells(box: Region, seen: Box, size: tuple[int, int], shape: tuple[int, ...]) -> _Edges:
    """Return a box's edges in cells of the map."""
    height, width = size
    across = shape[1] / (seen.right - seen.left)
    down = shape[0] / (seen.bottom - seen.top)
    return (
        ((box.x - box.width / 2) * width - seen.left) * across,
        ((box.y - box.height / 2) * height - seen.top) * down,
        ((box.x + box.width / 2) * width - seen.left) * across,
        ((box.y + box.height / 2) * height - seen.top) * down,
    )


def _covered(boxes: Sequence[_Edges], shape: tuple[int, ...], *, touch: bool) -> NDArray[np.bool_]:
    """Return the cells that boxes touch, or those whose centres lie inside."""
    mask = np.zeros(shape, bool)
    rows, columns = np.arange(shape[0]), np.arange(shape[1])
    near, far = (0.0, 1.0) if touch else (0.5, 0.5)
    for left, top, right, bottom in boxes:
        down = (rows + far > top) & (rows + near < bottom)
        across = (columns + far > left) & (columns + near < right)
        mask |= down[:, None] & across[None]
    return mask
