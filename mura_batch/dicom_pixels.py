"""One frame of a DICOM file to luminance: what its header claims is checked, then decoded.

DICOM PS3.3 C.7.6.3 (image pixels); PS3.5 section 8 and annex A (encodings).
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, convert_color_space
from pydicom.uid import UID, AllTransferSyntaxes, DeflatedExplicitVRLittleEndian, RLELossless

from mura_batch import dicom_grey
from mura_batch.dicom_file import (
    Header,
    PixelElement,
    integer,
    native_bytes,
    read_header,
    text,
    values,
)
from mura_batch.dicom_grey import GreyTable, unsigned_words
from mura_batch.errors import Transient, UnreadableImage
from mura_batch.greyscale import grey_of_colour, spare_halvings
from mura_batch.untrusted import DECODER_ERRORS, LATER, check_size, hush, size_of

_PALETTES = [
    f"{kind}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
]
_KEYWORDS = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    *_PALETTES,
    *dicom_grey.KEYWORDS,
)


_WORD = 16  # bits of the widest values that are usual, and that Pillow reads of JPEG 2000


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the header says that one frame is stored (PS3.3 C.7.6.3)."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    photometric: str
    planar: int
    frames: int

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame."""
        size = self.rows * self.columns * self.samples * self.allocated // 8
        return size // 3 * 2 if self.photometric == "YBR_FULL_422" else size

    @property
    def pixel_bytes(self) -> int:
        """Bytes that a pixel takes on its way to grey.

        A palette makes three 16-bit samples of it. 32-bit words, which no radiograph needs, are
        sorted for their table and have an entry each in it: as much as eight 16-bit samples.
        """
        if self.photometric == "PALETTE COLOR":
            return 6
        return 16 if self.allocated > _WORD else self.samples * self.allocated // 8


def read_dicom(stream: BinaryIO, frame: int, enough: int | None) -> tuple[NDArray[np.uint8], bool]:
    """Return luminance (H, W), 0–255, bone bright, of one frame (from 0) of an opened file.

    The second value tells whether it was decoded smaller than it is: grey JPEG 2000, where a
    longer side of ``enough`` pixels will do.

    Grey: stored value → Modality LUT or rescale → first VOI LUT, else first window, else the
    robust range of :func:`mura_batch.greyscale.stretched` → 0–255 → inverted for MONOCHROME1.
    Pixel padding is left out of the range and is black. Colour must be grey within
    :func:`mura_batch.greyscale.grey_of_colour`'s measure.

    Raises:
        UnreadableImage: ``corrupt``, ``too_deep``, ``no_pixels``, ``truncated``, ``too_large``,
            ``shape``, ``transfer_syntax``, ``unsupported_pixels`` or ``colour``.
        Transient: the file system failed between the fragments of compressed pixels.
        OSError: it failed elsewhere.
    """
    hush()
    header = read_header(stream, _KEYWORDS)
    pixels = _pixels(header)
    layout = _layout(header.dataset)
    check_size(
        layout.columns,
        layout.rows,
        size_of(stream),
        pixel_bytes=layout.pixel_bytes,
        frames=layout.frames if _in_one_stream(header) else 1,
    )
    if not 0 <= frame < layout.frames:
        raise UnreadableImage(
            "truncated", f"it has no frame {frame + 1}: {layout.frames} are stated"
        )
    if pixels.length is None:
        stored, precision = _decompressed(stream, header, layout, frame, enough)
    else:
        stored, precision = _uncompressed(stream, header, layout, frame), layout.stored
    reduced = stored.shape[:2] != (layout.rows, layout.columns)
    try:
        if layout.samples > 1:
            return _grey_of_channels(stored, precision), reduced
        if layout.photometric == "PALETTE COLOR":
            return _grey_of_channels(*_painted(stored, header.dataset)), reduced
        return _grey_table(header, layout, frame, precision).rendered(stored), reduced
    except DECODER_ERRORS as exc:
        raise UnreadableImage(
            "corrupt", "its tables of grey values contradict its header: export the study again"
        ) from exc


def _in_one_stream(header: Header) -> bool:
    """Tell whether a frame is reached through those before it only."""
    return header.transfer_syntax == DeflatedExplicitVRLittleEndian


def _pixels(header: Header) -> PixelElement:
    pixels = header.pixels
    if pixels is None:
        raise UnreadableImage(
            "no_pixels",
            "this DICOM object holds no image, or was cut off before its pixels: send the image",
        )
    if pixels.keyword != "PixelData":
        raise UnreadableImage(
            "unsupported_pixels", "its pixels are floating point: export it as a radiograph"
        )
    syntax = UID(header.transfer_syntax)
    if syntax not in AllTransferSyntaxes:
        raise _wrong_syntax("is unknown")
    if (pixels.length is None) != syntax.is_encapsulated:
        raise _wrong_syntax("does not fit how its pixels are stored")
    return pixels


def _wrong_syntax(why: str) -> UnreadableImage:
    return UnreadableImage(
        "transfer_syntax", f"its transfer syntax {why}: export it uncompressed or as JPEG 2000"
    )


def _layout(dataset: Dataset) -> _Layout:
    allocated = integer(dataset, "BitsAllocated", 0)
    stored = integer(dataset, "BitsStored", allocated)
    layout = _Layout(
        rows=integer(dataset, "Rows", 0),
        columns=integer(dataset, "Columns", 0),
        samples=integer(dataset, "SamplesPerPixel", 1),
        allocated=allocated,
        stored=stored,
        high_bit=integer(dataset, "HighBit", stored - 1),
        signed=integer(dataset, "PixelRepresentation", 0) == 1,
        photometric=text(dataset, "PhotometricInterpretation"),
        planar=integer(dataset, "PlanarConfiguration", 0),
        frames=max(1, integer(dataset, "NumberOfFrames", 1)),
    )
    palette = layout.photometric == "PALETTE COLOR"
    grey = palette or layout.photometric in {"MONOCHROME1", "MONOCHROME2"}
    if (
        layout.allocated not in ({8, 16} if palette else {8, 16, 32})
        or not 1 <= layout.stored <= layout.allocated
        or layout.samples != (1 if grey else 3)
        or not (grey or layout.photometric.startswith(("RGB", "YBR_")))
    ):
        raise UnreadableImage(
            "unsupported_pixels",
            "its pixels are stored in a way that radiographs are not: export it again in grey",
        )
    return layout


def _options(layout: _Layout) -> dict[str, Any]:
    return {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": int(layout.signed and layout.samples == 1),
        "photometric_interpretation": layout.photometric,
        "planar_configuration": layout.planar,
        "pixel_keyword": "PixelData",
        "number_of_frames": 1,
        # Unused high bits and signs are settled in the table of grey values instead, where
        # they cost 65,536 steps and not one for each pixel.
        "correct_unused_bits": False,
        "apply_j2k_sign_correction": False,
        "apply_jls_sign_correction": False,
    }


def _uncompressed(stream: BinaryIO, header: Header, layout: _Layout, frame: int) -> NDArray[Any]:
    size = layout.frame_bytes
    if header.pixels is None or header.pixels.length is None:
        raise _wrong_syntax("does not fit how its pixels are stored")
    cut_off = UnreadableImage("truncated", "its pixels end early: send or export the image again")
    if (frame + 1) * size > header.pixels.length:
        raise cut_off
    raw = native_bytes(stream, header, frame * size, size + size % 2)  # padded to even length
    if len(raw) < size:
        raise cut_off
    try:
        decoder = get_decoder(UID(header.transfer_syntax))
        options = _options(layout) | {
            "pixel_vr": header.pixels.vr,
            "view_only": layout.samples == 1,
        }
        array, _ = decoder.as_array(raw, **options)
    except DECODER_ERRORS as exc:
        raise UnreadableImage(
            "corrupt", "its pixels do not fit its header: export the image again"
        ) from exc
    return np.asarray(array)


def _decompressed(
    stream: BinaryIO, header: Header, layout: _Layout, frame: int, enough: int | None
) -> tuple[NDArray[Any], int]:
    """Return a compressed frame and how many bits of its values count."""
    try:
        packed = _codestream(_packed_frame(stream, header, layout, frame))
    except DECODER_ERRORS as exc:
        raise UnreadableImage(
            "truncated", "its compressed pixels are cut off or disordered: send it again"
        ) from exc
    if not packed:
        raise UnreadableImage("truncated", "it ends before its pixels: send the image again")
    syntax = UID(header.transfer_syntax)
    precision = 0 if syntax == RLELossless else _check_codestream(packed, layout, syntax)
    try:
        if syntax == RLELossless:
            return _run_lengths(packed, layout), layout.stored
        array = None
        if packed.startswith(_J2K_START) and _is_plain_grey(layout, header.dataset):
            array = _smaller(packed, layout, precision, enough)
        if array is None:
            decoder = get_decoder(syntax)
            array, _ = decoder.as_array(encapsulate([packed]), **_options(layout))
    except (NotImplementedError, KeyError) as exc:
        raise _wrong_syntax("has no decoder here") from exc
    except DECODER_ERRORS as exc:
        if "plugins are missing" in str(exc):
            raise _wrong_syntax("has no decoder here") from exc
        raise UnreadableImage(
            "corrupt",
            "its compressed pixels cannot be decoded (cut off, damaged, or written by a faulty"
            " encoder): export it uncompressed",
        ) from exc
    if layout.signed:
        precision = min(precision, layout.stored)
    return np.asarray(array), precision


_ITEM_HEADER = 8  # bytes: looked for once more where the last delimiter was left out
_HEADROOM = 1 << 20  # bytes that tables and markers may take beside a frame
_END_OF_IMAGE = b"\xff\xd9"


class _Clipped:
    """A file whose reads ask neither for more than is there nor for more than one frame takes.

    pydicom takes any exception in the wrong place for the end of the pixels: a file that failed
    once fails at every further read.

    Attributes:
        joined: images follow each other in fragments that no table assigns to them: ``largest``
            bytes are allowed for each, and not in all.
        failure: what the first read that failed has raised.
    """

    def __init__(self, stream: BinaryIO, largest: int) -> None:
        self._stream = stream
        self._size = size_of(stream)
        self._largest = self._allowed = largest
        self.joined = False
        self.failure: Exception | None = None
        self.seek = stream.seek
        self.tell = stream.tell

    def read(self, size: int = -1, /) -> bytes:
        if self.failure is not None:
            raise self.failure
        try:
            return self._read(size)
        except OSError as exc:
            self.failure = Transient(LATER)
            raise self.failure from exc
        except (EOFError, UnreadableImage) as exc:
            self.failure = exc
            raise

    def _read(self, size: int) -> bytes:
        left = max(0, self._size - self._stream.tell())
        if size > max(left, _ITEM_HEADER):
            raise EOFError
        size = left if size < 0 else min(size, left)
        self._allowed -= size
        if self._allowed < 0:
            raise UnreadableImage(
                "too_large", "its compressed pixels are larger than plain ones: export it again"
            )
        data = self._stream.read(size)
        if self.joined and _END_OF_IMAGE in data[-10:]:  # where pydicom looks for it
            self._allowed = self._largest
        return data


def _packed_frame(stream: BinaryIO, header: Header, layout: _Layout, frame: int) -> bytes:
    start = header.pixels.offset if header.pixels else 0
    tables = [values(header.dataset, f"ExtendedOffsetTable{part}")[:1] for part in ("", "Lengths")]
    extended = (tables[0][0], tables[1][0]) if all(tables) else None
    clipped: Any = _Clipped(stream, 2 * layout.frame_bytes + _HEADROOM)
    clipped.seek(start)
    basic = any(clipped.read(_ITEM_HEADER)[4:])
    clipped.joined = layout.frames > 1 and not (extended or basic)
    clipped.seek(start)
    try:
        return bytes(
            get_frame(clipped, frame, extended_offsets=extended, number_of_frames=layout.frames)
        )
    finally:
        if clipped.failure is not None:
            raise clipped.failure


_RLE_HEADER = 64  # bytes


def _run_lengths(packed: bytes, layout: _Layout) -> NDArray[Any]:
    """Decode an RLE frame (PS3.5 annex G): a segment for each byte of each sample, high byte first.

    Runs are expanded by Pillow, which stops at the last pixel: the decoders of pydicom and its
    plugins expand whatever a segment holds, up to 64 times its size, before they look at it.
    """
    size = layout.allocated // 8
    count, *offsets = struct.unpack_from("<16I", packed)
    if count != size * layout.samples:
        raise ValueError("as many segments as bytes of a pixel are expected")
    ends = [*offsets[1:count], len(packed)]
    pixels = layout.rows * layout.columns
    mode = "L" if pixels % 4 else "RGBA"  # Pillow hands over four bytes sooner than single ones
    samples = np.zeros((pixels, layout.samples), f"u{size}")
    for segment, (start, end) in enumerate(zip(offsets[:count], ends, strict=True)):
        if not _RLE_HEADER <= start < end:
            raise ValueError("segments follow each other and are not empty")
        runs = packed[start:end]
        plane = Image.frombytes(mode, (pixels // len(mode), 1), runs, "packbits", mode)
        sample = samples[:, segment // size]
        sample <<= 8
        sample |= np.asarray(plane).ravel()
    if layout.samples == 1:
        return samples.reshape(layout.rows, layout.columns)
    frame = samples.reshape(layout.rows, layout.columns, layout.samples)
    in_rgb = layout.photometric == "RGB"
    return frame if in_rgb else convert_color_space(frame, layout.photometric, "RGB")


def _is_plain_grey(layout: _Layout, dataset: Dataset) -> bool:
    """Tell whether means of neighbouring values mean something: no palette, no padding."""
    grey = layout.photometric in {"MONOCHROME1", "MONOCHROME2"}
    return grey and layout.allocated <= _WORD and "PixelPaddingValue" not in dataset


def _smaller(
    packed: bytes, layout: _Layout, precision: int, enough: int | None
) -> NDArray[Any] | None:
    """Decode a grey JPEG 2000 frame without the finest levels of detail that can be spared.

    By Pillow, since pydicom's plugins have no way to ask for it. It scales values up to 8 or 16
    bits, and makes signed ones positive. None where nothing can be spared, or Pillow fails.
    """
    sides = layout.columns, layout.rows
    halvings = spare_halvings(*sides, enough)
    while any(_pillow_rounds_otherwise(side, halvings) for side in sides):
        halvings -= 1
    if halvings == 0:
        return None
    try:
        with Image.open(io.BytesIO(packed), formats=("JPEG2000",)) as film:
            # The plugin keeps the number of halvings under a name that its base has for a method.
            film.reduce = halvings  # type: ignore[assignment,method-assign]  # typed as the method of its base
            scaled = np.asarray(film)
    except (*DECODER_ERRORS, Image.DecompressionBombError):  # fewer levels than halvings, say
        return None
    words = scaled >> (8 * scaled.itemsize - precision)
    if packed[_J2K_DEPTH] & 0x80:  # of signed values
        words ^= words.dtype.type(1 << (precision - 1))
    return words


def _pillow_rounds_otherwise(side: int, halvings: int) -> bool:
    """Tell whether Pillow expects another length than OpenJPEG gives, and refuses the film."""
    return halvings > 0 and (side + (1 << halvings >> 1)) >> halvings != -(-side >> halvings)


_J2K_DEPTH = 42  # offset of Ssiz in a code stream (ISO 15444-1, A.5.1)
_J2K_START = b"\xff\x4f\xff\x51"


def _codestream(packed: bytes) -> bytes:
    """Return a frame without the JP2 boxes around its code stream, which do not belong there."""
    if packed.startswith(b"\x00\x00\x00\x0cjP  "):
        return packed[packed.index(_J2K_START) :]
    return packed


def _check_codestream(packed: bytes, layout: _Layout, syntax: UID) -> int:
    """Compare what the code stream claims with the header before a decoder believes it.

    Returns the precision: bits of a value in the code stream.
    """
    if packed.startswith(_J2K_START):
        claimed = _j2k_claims(packed)
    elif packed.startswith(b"\xff\xd8"):
        claimed = _jpeg_claims(packed)
    else:
        raise _wrong_syntax("does not fit its compressed pixels")
    if ("JPEG 2000" in syntax.name) != packed.startswith(_J2K_START):
        raise _wrong_syntax("does not fit its compressed pixels")
    columns, rows, samples, precision = claimed
    if (columns, rows, samples) != (layout.columns, layout.rows, layout.samples):
        raise UnreadableImage(
            "corrupt",
            "its header and its compressed pixels state different sizes: export it again",
        )
    return precision


def _j2k_claims(packed: bytes) -> tuple[int, int, int, int]:
    """Return columns, rows, samples and precision of a JPEG 2000 SIZ (ISO 15444-1, A.5.1)."""
    try:
        right, bottom, left, top = struct.unpack_from(">4I", packed, 8)
        samples, depth = struct.unpack_from(">HB", packed, 40)
    except struct.error as exc:
        raise UnreadableImage("truncated", "it ends inside its pixels: send it again") from exc
    return right - left, bottom - top, samples, (depth & 0x7F) + 1


_FRAME_STARTS = (set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {0xF7}


def _jpeg_claims(packed: bytes) -> tuple[int, int, int, int]:
    """Return columns, rows, samples and precision of the first JPEG or JPEG-LS frame header."""
    at = 2
    try:
        while packed[at + 1] not in _FRAME_STARTS:
            (length,) = struct.unpack_from(">H", packed, at + 2)
            at += 2 + length if packed[at + 1] != 0xFF else 1  # noqa: PLR2004 - fill byte
        precision, rows, columns, samples = struct.unpack_from(">BHHB", packed, at + 4)
    except (IndexError, struct.error) as exc:
        raise UnreadableImage("truncated", "it ends inside its pixels: send it again") from exc
    return columns, rows, samples, precision


def _grey_table(header: Header, layout: _Layout, frame: int, bits: int) -> GreyTable:
    native = header.pixels is not None and header.pixels.length is not None
    return GreyTable(
        dataset=header.dataset,
        frame=frame,
        bits=bits,
        shift=max(0, layout.high_bit + 1 - bits) if native else 0,
        signed=layout.signed,
        inverted=layout.photometric == "MONOCHROME1",
        little_endian=header.little_endian,
    )


def _painted(stored: NDArray[Any], dataset: Dataset) -> tuple[NDArray[Any], int]:
    """Return the colours (H, W, 3) that palette indices (H, W) stand for, and their bits."""
    index = unsigned_words(stored)
    domain = np.arange(np.iinfo(index.dtype).max + 1)
    palette = apply_color_lut(domain.reshape(1, -1), dataset)[0, :, :3]
    bits = 16 if palette.dtype == np.uint16 and palette.max() > np.iinfo(np.uint8).max else 8
    return palette[index], bits


def _grey_of_channels(channels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if channels.dtype.itemsize > 1:
        channels = channels >> max(0, bits - 8)
    return grey_of_colour(
        Image.fromarray(np.ascontiguousarray(channels.astype(np.uint8, copy=False)))
    )
