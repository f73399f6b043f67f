"""DICOM headers from files that nobody vouches for: only the elements asked for, and bounded.

DICOM PS3.10 section 7 (file meta information), PS3.5 sections 7 and A (data set encodings).
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydicom.charset import convert_encodings, decode_bytes, default_encoding
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from mura_batch.errors import UnreadableImage
from mura_batch.untrusted import DECODER_ERRORS, hush

PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"} | {
    0x7FE00010: "PixelData"
}
_FIRST_PIXEL_TAG = min(PIXEL_TAGS)
_UNDEFINED = 0xFFFFFFFF
_HEAD_LIMITS = (1 << 16, 1 << 20, 1 << 24)  # bytes of header tried in turn
_MAX_READS = 100_000  # steps of the parser: what an object of a thousand frames takes
_INFLATE_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class PixelElement:
    """Where the pixels are.

    Attributes:
        keyword: ``PixelData``, or one of the two floating point kinds.
        vr: value representation, empty where it is implicit.
        offset: of the value, in bytes of the (inflated) file.
        length: bytes; None where it is undefined, that is, encapsulated.
    """

    keyword: str
    vr: str
    offset: int
    length: int | None


@dataclass(frozen=True, slots=True)
class Header:
    """A DICOM header.

    Attributes:
        dataset: the elements that were asked for and are there.
        transfer_syntax: UID; guessed from the encoding where the file states none.
        stated: whether the file itself stated the transfer syntax.
        pixels: None where the file has no pixel element.
        body: offset of the data set in the file, behind the file meta information.
    """

    dataset: Dataset
    transfer_syntax: str
    stated: bool
    pixels: PixelElement | None
    body: int

    @property
    def little_endian(self) -> bool:
        """Byte order of the data set."""
        return self.transfer_syntax != ExplicitVRBigEndian


def read_header(stream: BinaryIO, keywords: Collection[str], last: str | None = None) -> Header:
    """Read the elements ``keywords`` that stand before the pixels, or up to ``last``.

    Values that nobody asked for are skipped unread; at most 16 MiB of header are looked at.

    Raises:
        UnreadableImage: ``corrupt``, or ``too_deep`` for sequences nested beyond the
            interpreter's recursion limit.
    """
    hush()
    wanted = [Tag(keyword) for keyword in keywords]
    end = _FIRST_PIXEL_TAG if last is None else Tag(last) + 1
    meter = _Meter()
    for limit in _HEAD_LIMITS:
        stream.seek(0)
        head = stream.read(limit)
        whole = len(head) < limit
        try:
            header, found_end = _parse(head, wanted, end, meter)
        except DECODER_ERRORS as exc:
            if whole or limit == _HEAD_LIMITS[-1] or meter.left < 0:
                raise _refusal(exc) from exc
            continue
        if found_end or whole:
            break
    return header


def _refusal(exc: Exception) -> UnreadableImage:
    if isinstance(exc, RecursionError) or isinstance(exc.__context__, RecursionError):
        return UnreadableImage(
            "too_deep", "its sequences are nested without end: export the study again"
        )
    return UnreadableImage("corrupt", "its DICOM header cannot be read: export the study again")


@dataclass(slots=True)
class _Meter:
    """How many steps the parser may still take for one file."""

    left: int = _MAX_READS


class _Metered(io.BytesIO):
    """Bytes that can be read so often only: pydicom reads every element and item in steps."""

    def __init__(self, data: bytes, meter: _Meter) -> None:
        super().__init__(data)
        self._meter = meter

    def read(self, size: int | None = -1, /) -> bytes:
        self._meter.left -= 1
        if self._meter.left < 0:
            raise ValueError("this header has no end")
        return super().read(size)


def _parse(head: bytes, wanted: list[Any], end: int, meter: _Meter) -> tuple[Header, bool]:
    """Return the header in ``head``, and whether an element at or behind ``end`` was met."""
    stated, body = _file_meta(head)
    syntax = stated or _guessed_syntax(head[body : body + 6])
    offset = body
    if syntax == DeflatedExplicitVRLittleEndian:
        head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head[body:], _HEAD_LIMITS[-1])
        offset = 0
    implicit = syntax == ImplicitVRLittleEndian
    little = syntax != ExplicitVRBigEndian
    stream = _Metered(head, meter)
    stream.seek(offset)
    dataset = read_dataset(
        stream,
        implicit,
        little,
        stop_when=lambda tag, _vr, _length: tag >= end,
        specific_tags=wanted,
    )
    implicit = bool(dataset.original_encoding[0])  # what it really was
    rest = head[stream.tell() : stream.tell() + 12]
    pixels = _pixel_element(rest, stream.tell(), implicit=implicit, little=little)
    return Header(dataset, syntax, bool(stated), pixels, body), bool(rest)


def _file_meta(head: bytes) -> tuple[str, int]:
    """Return the stated transfer syntax (or nothing) and where the data set begins."""
    offset = 132 if head[128:132] == b"DICM" else 0
    syntax = ""
    while head[offset : offset + 2] == b"\x02\x00":
        (element,) = struct.unpack_from("<H", head, offset + 2)
        vr = head[offset + 4 : offset + 6]
        if vr in {b"OB", b"UN", b"UT", b"OW"}:
            (length,), start = struct.unpack_from("<I", head, offset + 8), offset + 12
        elif vr.isalpha() and vr.isupper():
            (length,), start = struct.unpack_from("<H", head, offset + 6), offset + 8
        else:  # written without VRs, against the standard
            (length,), start = struct.unpack_from("<I", head, offset + 4), offset + 8
        if element == 0x0010:  # noqa: PLR2004 - Transfer Syntax UID
            syntax = head[start : start + length].strip(b"\0 ").decode("ascii", "replace")
        offset = start + length
    return syntax, offset


def _guessed_syntax(first: bytes) -> str:
    """Return the uncompressed transfer syntax that the first six bytes of a data set show."""
    vr = first[4:6]
    if not (vr.isalpha() and vr.isupper()):
        return str(ImplicitVRLittleEndian)
    return str(ExplicitVRBigEndian if first[:1] == b"\0" else ExplicitVRLittleEndian)


def _pixel_element(
    rest: bytes, position: int, *, implicit: bool, little: bool
) -> PixelElement | None:
    """Parse the element header at the start of ``rest``, if it is one of pixels."""
    order = "<" if little else ">"
    if len(rest) < 8:  # noqa: PLR2004 - the shortest element header
        return None
    group, element = struct.unpack_from(f"{order}HH", rest)
    keyword = PIXEL_TAGS.get(group << 16 | element)
    if keyword is None:
        return None
    vr, at = ("", 4) if implicit else (rest[4:6].decode("ascii", "replace"), 8)
    if len(rest) < at + 4:
        return None
    (length,) = struct.unpack_from(f"{order}I", rest, at)
    return PixelElement(keyword, vr, position + at + 4, None if length == _UNDEFINED else length)


def native_bytes(stream: BinaryIO, header: Header, start: int, size: int) -> bytes:
    """Return ``size`` bytes (fewer at the file's end) of uncompressed pixels from ``start`` on."""
    pixels = header.pixels
    if pixels is None:
        return b""
    start += pixels.offset
    if header.transfer_syntax == DeflatedExplicitVRLittleEndian:
        stream.seek(header.body)
        return _inflated(stream, start, size)
    stream.seek(start)
    return stream.read(size)


def _inflated(stream: BinaryIO, skip: int, size: int) -> bytes:
    """Return a slice of a raw deflate stream without holding more than the slice.

    Raises:
        UnreadableImage: ``corrupt`` where the stream is damaged.
    """
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    kept = bytearray()
    while len(kept) < size and not engine.eof:
        packed = engine.unconsumed_tail or stream.read(_INFLATE_STEP)
        if not packed:
            break
        try:
            piece = engine.decompress(packed, _INFLATE_STEP)
        except zlib.error as exc:
            raise UnreadableImage(
                "corrupt", "its deflated pixels are damaged: send or export the image again"
            ) from exc
        kept += piece[skip:]
        skip = max(0, skip - len(piece))
    return bytes(kept[:size])


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Return a sequence's items; none where it is missing, or is no sequence."""
    return [item for item in values(dataset, keyword) if isinstance(item, Dataset)]


def values(dataset: Dataset, keyword: str) -> list[Any]:
    """Return an element's values, converted by pydicom; none where that fails."""
    try:
        value = dataset.get(keyword)
        if value is None or isinstance(value, str | bytes):
            return [] if value is None else [value]
        return list(value) if hasattr(value, "__iter__") else [value]
    except DECODER_ERRORS:
        return []


def number(dataset: Dataset, keyword: str) -> float | None:
    """Return the first value as a finite number; None where there is none."""
    for value in values(dataset, keyword)[:1]:
        try:
            result = float(value)
        except DECODER_ERRORS:
            return None
        return result if math.isfinite(result) else None
    return None


def integer(dataset: Dataset, keyword: str, default: int) -> int:
    """Return the first value as an integer."""
    value = number(dataset, keyword)
    return default if value is None else int(value)


_LONGEST_TEXT = 2000  # characters; what follows cannot name a body part any better
_UNICODE = "ISO_IR 192"
_BREAK = re.compile(r"[\\\s\0]+")


def text(dataset: Dataset, keyword: str) -> str:
    """Return an element's text, several values joined by blanks; a bad charset never stops it.

    Where the stated character set is missing, unknown, or does not fit the bytes, UTF-8 is tried,
    then Latin-1, which takes any byte.
    """
    try:
        element = dataset.get_item(keyword)
    except DECODER_ERRORS:
        return ""
    if not isinstance(element, RawDataElement):
        return _tidy(" ".join(map(str, values(dataset, keyword))))
    raw = element.value
    return _tidy(_decoded(raw, dataset)) if isinstance(raw, bytes) else ""


def _tidy(words: str) -> str:
    return _BREAK.sub(" ", words).strip()[:_LONGEST_TEXT]


def _decoded(raw: bytes, dataset: Dataset) -> str:
    if raw.isascii() and b"\x1b" not in raw:
        return raw.decode("ascii")
    encodings = dataset.original_character_set
    if isinstance(encodings, str):
        encodings = [encodings]
    candidates = [list(encodings)] if encodings and encodings != [default_encoding] else []
    for charset in (*candidates, convert_encodings(_UNICODE)):
        try:
            decoded = str(decode_bytes(raw, charset, {0x0A, 0x0C, 0x0D, 0x5C}))
        except DECODER_ERRORS:
            continue
        if "\ufffd" not in decoded:
            return decoded
    return raw.decode("latin-1")


_UID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


def uid(dataset: Dataset, keyword: str) -> str | None:
    """Return a UID; None where it is missing or holds what no UID holds (``../``, line breaks).

    Letters, underscores and up to 128 characters pass: anonymised studies have such UIDs.
    """
    stated = text(dataset, keyword)
    return stated if _UID.fullmatch(stated) else None
