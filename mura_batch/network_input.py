"""Luminance to the network's input, as the weights' card asks (:class:`Preprocessing`).

Training and scoring call the same :func:`prepare`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mura_batch.preprocessing import Preprocessing

Luminance = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a radiograph in its pixels; it may reach outside the film."""

    left: int
    top: int
    right: int
    bottom: int


Resize = Callable[[Luminance, Box, int], Luminance]
"""Gives a region of luminance (H, W) as (size, size)."""


@dataclass(frozen=True, slots=True)
class NetworkInput:
    """What the network sees of one view.

    Attributes:
        pixels: uint8 luminance of shape (size, size).
        box: the region of the radiograph that ``pixels`` show.
    """

    pixels: Luminance
    box: Box


def resized(luminance: Luminance, box: Box, size: int) -> Luminance:
    """Return ``box`` of luminance (H, W) as (size, size), by Pillow; black outside the film."""
    film = Image.fromarray(luminance)
    if (box.left, box.top, box.right, box.bottom) != (0, 0, film.width, film.height):
        film = _narrowed(film, box, size)
    return np.asarray(film.resize((size, size), Image.Resampling.BILINEAR))


def prepare(luminance: Luminance, spec: Preprocessing, resize: Resize = resized) -> NetworkInput:
    """Return the network input for luminance of shape (H, W).

    The resize is PIL's bilinear with antialiasing, so with the default ``spec`` the result is
    bit-equal to torchvision's ``Resize((224, 224))`` on the PIL image; ``resize`` gives the same.
    """
    box = _region(luminance, spec)
    return NetworkInput(resize(luminance, box, spec.size), box)


_STRIP = 1024  # rows: shorter ones cost a call more often


def _narrowed(film: Image.Image, box: Box, width: int) -> Image.Image:
    """Return ``box`` of a film at its own height, and ``width`` wide.

    That is the first half of what Pillow's ``resize`` does. A strip at a time, because the square
    around a long film can be many times the film, and more than Pillow crops.
    """
    narrow = Image.new("L", (width, box.bottom - box.top))
    last = min(box.bottom, film.height)
    for top in range(max(box.top, 0), last, _STRIP):
        bottom = min(top + _STRIP, last)
        strip = film.crop((box.left, top, box.right, bottom))
        strip = strip.resize((width, bottom - top), Image.Resampling.BILINEAR)
        narrow.paste(strip, (0, top - box.top))
    return narrow


def _region(luminance: Luminance, spec: Preprocessing) -> Box:
    height, width = luminance.shape
    box = Box(0, 0, width, height)
    if spec.crop == "foreground":
        box = _foreground(luminance)
    if spec.fit == "pad":
        side = max(box.right - box.left, box.bottom - box.top)
        left = (box.left + box.right - side) // 2
        top = (box.top + box.bottom - side) // 2
        box = Box(left, top, left + side, top + side)
    return box


_THUMBNAIL = 128  # pixels of the longer side: enough to find a limb
_RIM = 0.08  # share of the film at each side where bright cassette edges lie: not looked at
_TAIL = 0.002  # share of foreground cut off at each end: specks
_MARGIN = 0.04  # of the longer side of the region, added all round


def _foreground(luminance: Luminance) -> Box:
    """Return the region of a film (H, W) that is brighter than its background."""
    height, width = luminance.shape
    scale = max(height, width) / _THUMBNAIL
    small = Image.fromarray(luminance).resize(
        (max(1, round(width / scale)), max(1, round(height / scale))), Image.Resampling.BOX
    )
    pixels = np.asarray(small)
    rows, columns = (round(_RIM * side) for side in pixels.shape)
    inner = pixels[rows : len(pixels) - rows, columns : pixels.shape[1] - columns]
    mask = inner > otsu_threshold(inner)
    left, right = _extent(mask.sum(axis=0), width, columns)
    top, bottom = _extent(mask.sum(axis=1), height, rows)
    margin = _MARGIN * max(right - left, bottom - top)
    return Box(
        max(0, int(left - margin)),
        max(0, int(top - margin)),
        min(width, int(np.ceil(right + margin))),
        min(height, int(np.ceil(bottom + margin))),
    )


def _extent(profile: NDArray[np.int_], length: int, rim: int) -> tuple[float, float]:
    """Return [first, last) of the foreground along one side of the film, in film pixels.

    ``profile`` counts foreground per bin, without ``rim`` bins at each end; foreground that
    touches the rim goes on to the film's edge.
    """
    cumulative = np.cumsum(profile)
    total = int(cumulative[-1])
    if total == 0:
        return 0.0, float(length)
    first = int(np.searchsorted(cumulative, _TAIL * total, side="right"))
    last = int(np.searchsorted(cumulative, (1 - _TAIL) * total, side="left")) + 1
    bin_size = length / (len(profile) + 2 * rim)
    return (
        0.0 if first == 0 else (first + rim) * bin_size,
        float(length) if last == len(profile) else (last + rim) * bin_size,
    )


def otsu_threshold(pixels: Luminance) -> int:
    """Return Otsu's threshold (IEEE Trans. SMC 9, 62–66, 1979): foreground is ``> threshold``."""
    counts = np.bincount(pixels.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nanargmax(spread)) if np.isfinite(spread).any() else 0
