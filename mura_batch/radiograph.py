"""A radiograph file, PNG, JPEG or DICOM, to luminance."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from mura_batch.dicom_pixels import read_dicom
from mura_batch.errors import UnreadableImage
from mura_batch.greyscale import (
    check_colour,
    counted,
    eight_bits,
    gathered,
    grey_of_colour,
    spare_halvings,
    stretched,
    strips,
)
from mura_batch.network_input import Luminance, NetworkInput, Resize, prepare, resized
from mura_batch.preprocessing import Preprocessing
from mura_batch.untrusted import DECODER_ERRORS, check_size, hush, opened, size_of, sniff


def read_luminance(path: Path, frame: int = 0) -> Luminance:
    """Return luminance of shape (H, W), 0–255, bone bright, of a PNG, JPEG or DICOM file.

    The content decides what it is, not the name. ``frame`` counts from 0 and is above 0 for
    multi-frame DICOM only. 8-bit grey is kept as it is, and grey in colour channels is weighted
    as Pillow's ``convert("L")`` does. EXIF orientation is applied, transparency is put on black.
    16-bit images: see :func:`mura_batch.greyscale.stretched`, with 0–65535 as the full range.

    Raises:
        UnreadableImage: with the code ``empty``, ``not_an_image``, ``truncated``, ``corrupt``,
            ``too_large``, ``shape``, ``colour``, ``unreadable``, ``not_a_file``, or of DICOM
            ``no_pixels``, ``transfer_syntax``, ``unsupported_pixels`` or ``too_deep``.
        Transient: the file system or the memory failed, not the file.
    """
    return _read(path, frame, None)[0]


_ROOM = 1.75  # with less, other crops of reduced films changed probabilities by up to 0.2


def read_film(
    path: Path, frame: int, spec: Preprocessing, resize: Resize = resized
) -> tuple[Luminance, NetworkInput]:
    """Return a film as :func:`read_luminance` does, and what a network sees of it.

    Where ``spec.decode`` is ``reduced``, the film is smaller than in its file if what the network
    sees of it is still ``_ROOM`` times as large as its input; else it is read again, in full.

    Raises:
        UnreadableImage, Transient: as for :func:`read_luminance`.
    """
    luminance, reduced = _read(path, frame, spec.enough)
    seen = prepare(luminance, spec, resize)
    side = min(seen.box.right - seen.box.left, seen.box.bottom - seen.box.top)
    if reduced and side < _ROOM * spec.size:
        luminance, _ = _read(path, frame, None)
        seen = prepare(luminance, spec, resize)
    return luminance, seen


def _read(path: Path, frame: int, enough: int | None) -> tuple[Luminance, bool]:
    """Return a film, and whether it was decoded smaller than it is.

    Where a longer side of ``enough`` pixels will do, JPEG and grey JPEG 2000 may come out 2, 4 or
    8 times smaller, but no smaller than that.
    """
    with opened(path) as stream:
        head = stream.read(132)
        kind = sniff(head)
        if not head:
            raise UnreadableImage("empty", "the file has no content: copy it again")
        if kind == "dicom":
            return read_dicom(stream, frame, enough=enough)
        if kind == "other":
            raise UnreadableImage(
                "not_an_image", "this is no PNG, JPEG or DICOM image: remove or convert it"
            )
        if frame != 0:
            raise UnreadableImage("truncated", f"it has one image and no frame {frame + 1}")
        return _read_raster(stream, enough)


_LARGEST_RASTER = 1 << 30  # bytes of a PNG or JPEG file


def _read_raster(stream: BinaryIO, enough: int | None) -> tuple[Luminance, bool]:
    hush()
    size = size_of(stream)
    if size > _LARGEST_RASTER:
        raise UnreadableImage("too_large", "the file is larger than any film: export it again")
    stream.seek(0)
    content = stream.read()  # before decoding, so that a lost share is no broken image
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as film:
            check_size(film.width, film.height, size, pixel_bytes=_pixel_bytes(film))
            smaller = _halved(film, content, enough)
            grey = _grey(film, content) if smaller is None else smaller
            upright = np.ascontiguousarray(_upright(grey, _orientation(film)))
            return upright, smaller is not None
    except Image.DecompressionBombError as exc:
        raise UnreadableImage(
            "too_large", "the header claims more pixels than any film has: export it again"
        ) from exc
    except UnreadableImage:
        raise
    except DECODER_ERRORS as exc:
        if isinstance(exc, EOFError) or "truncated" in str(exc).lower():
            raise UnreadableImage(
                "truncated", "the image is cut off: copy or export it again"
            ) from exc
        raise UnreadableImage("corrupt", "the image is damaged: copy or export it again") from exc


def _halved(film: ImageFile.ImageFile, content: bytes, enough: int | None) -> Luminance | None:
    """Return a JPEG without the detail that can be spared; None where that cannot be had."""
    halvings = spare_halvings(film.width, film.height, enough)
    if film.format != "JPEG" or halvings == 0:
        return None
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as smaller:
            smaller.draft(None, (max(1, film.width >> halvings), max(1, film.height >> halvings)))
            return _grey(smaller, content)
    except (UnreadableImage, *DECODER_ERRORS):  # lossless JPEG has but one size, say
        return None


def _pixel_bytes(film: ImageFile.ImageFile) -> int:
    """Return the bytes that a pixel takes unpacked; Pillow gives 8-bit colour a fourth one."""
    raw = _raw_mode(film)
    if ";16" in raw:
        clear = film.has_transparency_data and raw not in _BYTE_MODES
        return 2 * (len(raw.partition(";")[0]) + clear)
    return 1 if film.mode in {"L", "1"} and not film.has_transparency_data else 4


def _grey(film: ImageFile.ImageFile, content: bytes) -> Luminance:
    raw = _raw_mode(film)
    if ";16" in raw:
        return _grey_of_16_bits(_channels_of_16_bits(film, content, raw))
    if film.has_transparency_data:
        return grey_of_colour(_on_black(film.convert("RGBA")))
    if film.mode in {"L", "1"}:
        return np.asarray(film if film.mode == "L" else film.convert("L"))
    return grey_of_colour(film.convert("RGB"))


def _on_black(film: Image.Image) -> Image.Image:
    """Return an RGBA image on black; alpha that hides all of it is a writer's mistake."""
    if film.getchannel("A").getextrema() != (0, 0):
        film = Image.alpha_composite(Image.new("RGBA", film.size, (0, 0, 0, 255)), film)
    return film.convert("RGB")


def _raw_mode(film: ImageFile.ImageFile) -> str:
    """Return how Pillow will unpack a file's samples, such as ``RGB;16B``."""
    arguments: Any = film.tile[0].args if film.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


_BYTE_MODES = {
    # What Pillow makes 8-bit by dropping the low byte is unpacked once for the high and once for
    # the low bytes; two 16-bit samples are four 8-bit ones.
    "RGB;16B": ("RGB;16B", "RGB;16L"),
    "RGBA;16B": ("RGBA;16B", "RGBA;16L"),
    "LA;16B": ("RGBA",),
}


def _channels_of_16_bits(film: Image.Image, content: bytes, raw: str) -> NDArray[np.uint16]:
    """Return the samples (H, W, C) of a 16-bit PNG, all their bits kept."""
    if raw not in _BYTE_MODES:
        grey = np.asarray(film).astype(np.uint16, copy=False)
        clear = film.info.get("transparency")
        if isinstance(clear, int):
            return np.stack([grey, np.where(grey == clear, 0, 0xFFFF).astype(np.uint16)], -1)
        return grey[..., np.newaxis]
    samples = np.empty((film.height, film.width, len(raw.partition(";")[0])), "<u2")
    octets = samples[..., np.newaxis].view(np.uint8)[..., ::-1]  # of a sample the high one first
    modes = _BYTE_MODES[raw]
    for place, mode in enumerate(modes):
        into = octets[..., place :: len(modes)]
        with Image.open(io.BytesIO(content), formats=("PNG",)) as again:
            again.tile = [tile._replace(args=_with_mode(tile.args, mode)) for tile in again.tile]
            for rows in strips(film.height):
                top, bottom, _ = rows.indices(film.height)
                part = np.asarray(again.crop((0, top, film.width, bottom)))
                into[rows] = part.reshape(into[rows].shape)
    return samples.astype(np.uint16, copy=False)


def _with_mode(arguments: Any, mode: str) -> Any:
    return (mode, *arguments[1:]) if isinstance(arguments, tuple) else mode


_WEIGHTS = np.array([19595, 38470, 7471], np.uint32)  # ITU-R BT.601 in 1/65536, as Pillow has them


def _grey_of_16_bits(channels: NDArray[np.uint16]) -> Luminance:
    """Return luminance of 16-bit grey, grey-alpha, RGB or RGBA samples (H, W, C)."""
    count = channels.shape[-1]
    opacity = channels[..., -1] if count in {2, 4} else None
    if opacity is not None and not opacity.any():
        opacity = None
    colours = channels[..., : 1 if count < 3 else 3]  # noqa: PLR2004 - RGB
    deep = colours[..., 0]
    if colours.shape[-1] > 1:
        deep = np.empty(colours.shape[:2], np.uint16)
        for rows in strips(len(deep)):
            deep[rows] = (colours[rows] @ _WEIGHTS + 0x8000) >> 16
    counts = counted(deep if opacity is None else deep[opacity > 0], 1 << 16)
    table = eight_bits(stretched(np.arange(1 << 16, dtype=np.float64), counts, (0.0, 65535.0)))
    if colours.shape[-1] > 1:
        check_colour(Image.fromarray(gathered(table, colours)))
    luminance = gathered(table, deep)
    if opacity is not None:  # on black
        for rows in strips(len(deep)):
            luminance[rows] = np.rint(luminance[rows] * (opacity[rows] / 65535.0))
    return luminance


_ORIENTATION = 0x0112  # EXIF tag


def _orientation(film: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        return int(film.getexif().get(_ORIENTATION, 1))
    except DECODER_ERRORS:
        return 1


def _upright(pixels: Luminance, orientation: int) -> Luminance:
    """Turn pixels as EXIF 2.3, 4.6.4 A, says of their orientation (1–8)."""
    if orientation in {5, 6, 7, 8}:
        pixels = pixels.T
    if orientation in {2, 3, 6, 7}:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in {3, 4, 7, 8} else pixels
