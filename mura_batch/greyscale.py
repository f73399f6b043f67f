"""Values to eight bits of grey: a robust range for contrast, and what counts as colour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mura_batch.errors import UnreadableImage

_TAIL = 0.005  # share of the pixels left out at each end: markers, dead pixels
_WIDE = 0.5  # of the full range: what covers it has its contrast already


def stretched(
    values: NDArray[np.float64],
    counts: NDArray[np.int64],
    full: tuple[float, float] | None = None,
) -> NDArray[np.float64]:
    """Map ``values`` (K,), each met ``counts`` (K,) times in an image, to 0–1.

    The range from the 0.5th to the 99.5th percentile of the pixels becomes 0–1, and what lies
    outside is clipped. Where ``full`` is given (the range that the format can hold) and the robust
    range covers at least half of it, ``full`` becomes 0–1 and no value is changed relative to
    another: an image that uses a tenth of 16 bits is stretched, one that uses them is not. An
    image of one value is 0 where no ``full`` is given.
    """
    low, high = _robust_range(values, counts)
    if full is not None and (high == low or high - low >= _WIDE * (full[1] - full[0])):
        low, high = full
    if high == low:
        return np.zeros_like(values)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _robust_range(values: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float]:
    met = np.flatnonzero(counts)
    if met.size == 0:
        return 0.0, 0.0
    order = met[np.argsort(values[met], kind="stable")]
    cumulative = np.cumsum(counts[order])
    total = int(cumulative[-1])
    low = values[order[np.searchsorted(cumulative, _TAIL * total, side="right")]]
    high = values[order[np.searchsorted(cumulative, (1 - _TAIL) * total, side="left")]]
    if low == high:
        low, high = values[order[0]], values[order[-1]]
    return float(low), float(high)


def eight_bits(display: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return 0–1 as 0–255, rounded; what lies outside is clipped."""
    return np.rint(np.clip(display, 0.0, 1.0) * 255.0).astype(np.uint8)


_COUNTED = 1 << 20  # words at a time: numpy makes 64 bits of each that it counts
_GATHERED = 256  # rows at a time: the index copy that numpy makes stays in the cache


def counted(words: NDArray[Any], size: int) -> NDArray[np.int64]:
    """Return how often each of 0 … ``size`` - 1 is met in unsigned words of any shape."""
    flat = words.ravel()
    counts = np.zeros(size, np.int64)
    for start in range(0, flat.size, _COUNTED):
        counts += np.bincount(flat[start : start + _COUNTED], minlength=size)
    return counts


def gathered(table: NDArray[np.uint8], words: NDArray[Any]) -> NDArray[np.uint8]:
    """Return ``table[words]`` for words (H, ...)."""
    result = np.empty(words.shape, np.uint8)
    for rows in strips(len(words)):
        np.take(table, words[rows], out=result[rows], mode="clip")
    return result


def strips(height: int) -> Iterator[slice]:
    """Return the rows of an image, some at a time, for work that takes more than its pixels."""
    return (slice(start, start + _GATHERED) for start in range(0, height, _GATHERED))


_MOST_HALVINGS = 3  # what JPEG can


def spare_halvings(width: int, height: int, enough: int | None) -> int:
    """Return how often an image can be halved and keep a longer side of ``enough`` pixels."""
    if enough is None:
        return 0
    return min(_MOST_HALVINGS, max(0, (max(width, height) // enough).bit_length() - 1))


_GLANCE = 256  # pixels of the longer side at which colour is judged: evens out chroma noise
_LEVELS = 32  # steps of brightness, each with its own tint
_RESIDUAL_LIMIT = 20  # of 255
_BRIGHT = 48  # of 255: darker pixels have no hue to speak of
_COLD_LIMIT = 0.5  # blue and green film bases
_WARM_LIMIT = 0.2  # yellowed film; skin and wood lie above it
_SHARE = 0.05  # of the pixels that may break a limit: coloured arrows, a logo


def grey_of_colour(film: Image.Image) -> NDArray[np.uint8]:
    """Return the luminance (ITU-R BT.601, as Pillow's ``convert("L")``) of an RGB image.

    Raises:
        UnreadableImage: ``colour``, see :func:`check_colour`.
    """
    check_colour(film)
    return np.asarray(film.convert("L"))


def check_colour(film: Image.Image) -> None:
    """Tell radiographs in RGB from photographs.

    A radiograph in colour channels is grey, or has one tint at each brightness (film base, sepia
    copies); a photograph has many, or one that no film has. Measured on the image reduced to 256
    pixels. Refused is an image in which more than 5 % of the pixels

    - have an (R-G, B-G) that is more than 20 of 255 away from the median of the pixels as bright
      as they are, or
    - are saturated, (max - min) / max of the channels, above 0.5 where blue leads red, above 0.2
      where red leads blue (skin); pixels darker than 48 are left out.

    Raises:
        UnreadableImage: ``colour``.
    """
    factor = max(1, -(-max(film.size) // _GLANCE))
    glance = np.asarray(film.reduce(factor) if factor > 1 else film).astype(np.int16)
    tinted = bool((glance != glance[..., :1]).any())
    if tinted and (_residual(glance) > _RESIDUAL_LIMIT or _saturated(glance) > _SHARE):
        raise UnreadableImage(
            "colour", "this is a colour photograph, not a radiograph: export the image in grey"
        )


def _residual(rgb: NDArray[np.int16]) -> float:
    """Return what 95 % of the pixels' distances to the tint of equally bright ones stay below."""
    red, green, blue = (rgb[..., channel].ravel() for channel in range(3))
    hue = np.stack([red - green, blue - green])
    level = (red.astype(np.int32) + green + blue) * _LEVELS // (3 * 256)
    distance = np.zeros(red.size)
    for step in np.unique(level):
        here = level == step
        tint = np.median(hue[:, here], axis=1, keepdims=True)
        distance[here] = np.abs(hue[:, here] - tint).max(axis=0)
    return float(np.quantile(distance, 1 - _SHARE))


def _saturated(rgb: NDArray[np.int16]) -> float:
    """Return the share of pixels that are more saturated than any film base makes them."""
    brightest = rgb.max(axis=-1)
    limit = np.where(rgb[..., 0] > rgb[..., 2], _WARM_LIMIT, _COLD_LIMIT)
    beyond = (brightest - rgb.min(axis=-1) > limit * brightest) & (brightest > _BRIGHT)
    return float(beyond.mean())
