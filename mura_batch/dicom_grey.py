"""Stored DICOM values to grey: Modality LUT, VOI LUT or window, inversion, as one table.

DICOM PS3.3 C.7.5.1.1.2 (padding), C.11.1 (Modality LUT), C.11.2 (VOI LUT), C.7.6.16 (per frame).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from mura_batch.dicom_file import items, number, text, values
from mura_batch.errors import UnreadableImage
from mura_batch.greyscale import counted, eight_bits, gathered, stretched

KEYWORDS = (
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
"""Elements of the header that :class:`GreyTable` reads."""


@dataclass(frozen=True, slots=True)
class GreyTable:
    """The way from stored words to grey, computed once for each word that can occur.

    For 8 and 16 bits that is a table of all words, so that an image costs one gather whatever
    stands between its values and the screen.

    Attributes:
        dataset: the header.
        frame: index of the frame, for enhanced objects with a window for each.
        bits: how many bits of a word count.
        shift: unused bits below them.
        signed: whether they are a two's complement.
        inverted: MONOCHROME1.
        little_endian: byte order of the header.
    """

    dataset: Dataset
    frame: int
    bits: int
    shift: int
    signed: bool
    inverted: bool
    little_endian: bool

    def rendered(self, stored: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the luminance (H, W) of stored words (H, W).

        Raises:
            UnreadableImage: ``corrupt`` where the rescale leaves the finite numbers.
        """
        words = unsigned_words(stored)
        if words.dtype.itemsize > 2:  # noqa: PLR2004 - a table of 2**32 values is no table
            domain, flat = np.unique(words, return_inverse=True)
            words = flat.reshape(words.shape)
        else:
            domain = np.arange(np.iinfo(words.dtype).max + 1)
        with np.errstate(over="ignore", invalid="ignore"):  # judged or clipped in the table
            table = self._table(domain.astype(np.int64), words)
        return gathered(table, words)

    def _table(self, domain: NDArray[np.int64], words: NDArray[Any]) -> NDArray[np.uint8]:
        stored = self._interpreted(domain)
        padding = self._padding(stored)
        modality = self._modality(stored)
        if not np.isfinite(np.ptp(modality)):
            raise UnreadableImage(
                "corrupt", "its rescale gives no finite grey values: export the study again"
            )
        display = self._voi(modality)
        if display is None:
            counts = counted(words, domain.size)
            counts[padding] = 0
            narrow = self.bits <= 8  # noqa: PLR2004 - made for a screen, like an 8-bit PNG
            full = (float(modality.min()), float(modality.max())) if narrow else None
            display = stretched(modality, counts, full)
        table = eight_bits(display)
        if self.inverted:
            table = 255 - table
        table[padding] = 0
        return table

    def _interpreted(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the stored values of words: unused and overlay bits dropped, sign restored."""
        value = (words >> self.shift) & ((1 << self.bits) - 1)
        if self.signed:
            value -= (value >> (self.bits - 1)) << self.bits
        return value

    def _padding(self, stored: NDArray[np.int64]) -> NDArray[np.bool_]:
        first = number(self.dataset, "PixelPaddingValue")
        if first is None:
            return np.zeros(stored.shape, dtype=np.bool_)
        last = number(self.dataset, "PixelPaddingRangeLimit")
        ends = [int(first), int(first if last is None else last)]
        if self.signed:  # a negative value may be written as an unsigned one
            largest = np.iinfo(np.int16).max
            ends = [end - 0x10000 if end > largest else end for end in ends]
        return np.asarray((stored >= min(ends)) & (stored <= max(ends)))

    def _groups(self, macro: str) -> list[Dataset]:
        """Return where an attribute may stand: the data set, this frame's macro, the shared one."""
        frames = items(self.dataset, "PerFrameFunctionalGroupsSequence")[
            self.frame : self.frame + 1
        ]
        shared = items(self.dataset, "SharedFunctionalGroupsSequence")[:1]
        return [
            self.dataset,
            *(item for group in (*frames, *shared) for item in items(group, macro)),
        ]

    def _modality(self, stored: NDArray[np.int64]) -> NDArray[np.float64]:
        for group in self._groups("PixelValueTransformationSequence"):
            for item in items(group, "ModalityLUTSequence")[:1]:
                lut = _lut(item, little=self.little_endian)
                if lut is not None:
                    return lut.mapped(stored.astype(np.float64))
            slope = number(group, "RescaleSlope") or 1.0
            intercept = number(group, "RescaleIntercept") or 0.0
            if (slope, intercept) != (1.0, 0.0):
                return stored.astype(np.float64) * slope + intercept
        return stored.astype(np.float64)

    def _voi(self, modality: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Return 0–1 through the first VOI LUT or window; None where there is none."""
        groups = self._groups("FrameVOILUTSequence")
        for group in groups:
            for item in items(group, "VOILUTSequence")[:1]:
                lut = _lut(item, little=self.little_endian)
                if lut is not None:
                    return lut.mapped(modality) / lut.white
        for group in groups:
            center, width = number(group, "WindowCenter"), number(group, "WindowWidth")
            if center is not None and width is not None and width > 0:
                return _windowed(modality, center, width, text(group, "VOILUTFunction"))
        return None


def _windowed(
    value: NDArray[np.float64], center: float, width: float, function: str
) -> NDArray[np.float64]:
    """Return 0–1 by a window of ``width`` > 0 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (value - center) / width, -700.0, 700.0)))
    if function == "LINEAR_EXACT":
        return np.clip((value - center) / width + 0.5, 0.0, 1.0)
    if width <= 1:
        return (value > center - 0.5).astype(np.float64)
    return np.clip((value - (center - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class _Lut:
    """A lookup table of PS3.3 C.11.1.1: ``entries[0]`` belongs to the value ``first``."""

    first: int
    entries: NDArray[np.float64]
    white: float  # the largest value that its entries can have

    def mapped(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """Look up values; those outside take the table's first or last entry."""
        first = self.first
        if first > 0x7FFF and value.min() < 0:  # noqa: PLR2004 - a negative one written as US
            first -= 0x10000
        at = np.clip(np.rint(value) - first, 0, self.entries.size - 1).astype(np.intp)
        return np.asarray(self.entries[at])


def _lut(item: Dataset, *, little: bool) -> _Lut | None:
    descriptor = _sixteen_bits(item, "LUTDescriptor", little=little)
    entries = _sixteen_bits(item, "LUTData", little=little)
    if descriptor.size < 3 or not entries.size:  # noqa: PLR2004 - count, first, bits
        return None
    count, first, bits = (int(part) for part in descriptor[:3])
    count = count or 0x10000
    if entries.size < count <= entries.size * 2 and bits <= 8:  # noqa: PLR2004 - packed bytes
        order = "<u2" if little else ">u2"
        entries = np.frombuffer(entries.astype(order).tobytes(), np.uint8).astype(np.int64)
    table = entries[:count].astype(np.float64)
    # Some writers state 16 bits for tables that end at 4095, some fewer than their entries have:
    # the entries themselves decide.
    needed = max(1, int(table.max()).bit_length())
    return _Lut(first, table, float((1 << needed) - 1))


def _sixteen_bits(item: Dataset, keyword: str, *, little: bool) -> NDArray[np.int64]:
    """Return an element of 16-bit words (OW, US, or either, as the standard leaves it)."""
    try:
        element = item.get_item(keyword)
    except KeyError:
        return np.zeros(0, np.int64)
    raw = element.value if isinstance(element, RawDataElement) else None
    if isinstance(raw, bytes):
        order = "<u2" if little else ">u2"
        return np.frombuffer(raw[: len(raw) // 2 * 2], order).astype(np.int64)
    return np.asarray(values(item, keyword), np.int64).ravel() & 0xFFFF


def unsigned_words(stored: NDArray[Any]) -> NDArray[Any]:
    """Return the bits as they are, unsigned and in this machine's byte order."""
    native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    return native.view(np.dtype(f"u{stored.dtype.itemsize}"))
