"""A radiograph file to luminance, and luminance to the network's input.

Preprocessing belongs to the weights: :class:`Preprocessing` travels in their card, and
training and scoring call the same :func:`prepare`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from mura_batch.dicom_pixels import read_dicom
from mura_batch.errors import UnreadableImage
from mura_batch.greyscale import eight_bits, grey_of_colour, stretched
from mura_batch.untrusted import DECODER_ERRORS, check_size, hush, opened, size_of, sniff

Luminance = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How weights want their input; the default is that of the published models.

    Attributes:
        size: side of the square network input, in pixels.
        crop: ``none`` keeps the whole film; ``foreground`` keeps what is brighter than the
            film's background (Otsu's threshold), with a margin.
        fit: ``squash`` resizes the kept region to the square whatever its shape; ``pad``
            widens it to a square first, with black outside the film.
        mean, std: per RGB channel, on a 0–1 scale.
    """

    size: int = 224
    crop: Literal["none", "foreground"] = "none"
    fit: Literal["squash", "pad"] = "squash"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a radiograph in its pixels; it may reach outside the film."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class NetworkInput:
    """What the network sees of one view.

    Attributes:
        pixels: uint8 luminance of shape (size, size).
        box: the region of the radiograph that ``pixels`` show.
    """

    pixels: Luminance
    box: Box


def read_luminance(path: Path, frame: int = 0) -> Luminance:
    """Return luminance of shape (H, W), 0–255, bone bright, of a PNG, JPEG or DICOM file.

    The content decides what it is, not the name. ``frame`` counts from 0 and is above 0 for
    multi-frame DICOM only. 8-bit grey is kept as it is, and grey in colour channels is weighted
    as Pillow's ``convert("L")`` does. EXIF orientation is applied, transparency is put on black.
    16-bit images: see :func:`mura_batch.greyscale.stretched`, with 0–65535 as the full range.

    Raises:
        UnreadableImage: with the code ``empty``, ``not_an_image``, ``truncated``, ``corrupt``,
            ``too_large``, ``colour``, ``unreadable``, ``not_a_file``, or of DICOM ``no_pixels``,
            ``transfer_syntax``, ``unsupported_pixels`` or ``too_deep``.
        Transient: the file system or the memory failed, not the file.
    """
    with opened(path) as stream:
        head = stream.read(132)
        kind = sniff(head)
        if not head:
            raise UnreadableImage("empty", "the file has no content: copy it again")
        if kind == "dicom":
            return read_dicom(stream, frame)
        if kind == "other" or frame != 0:
            raise UnreadableImage(
                "not_an_image", "this is no PNG, JPEG or DICOM image: remove or convert it"
            )
        return _read_raster(stream)


_LARGEST_RASTER = 1 << 30  # bytes of a PNG or JPEG file


def _read_raster(stream: BinaryIO) -> Luminance:
    hush()
    size = size_of(stream)
    if size > _LARGEST_RASTER:
        raise UnreadableImage("too_large", "the file is larger than any film: export it again")
    stream.seek(0)
    content = stream.read()  # before decoding, so that a lost share is no broken image
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as film:
            check_size(film.width, film.height, size)
            return np.ascontiguousarray(_upright(_grey(film, content), _orientation(film)))
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


def _grey(film: ImageFile.ImageFile, content: bytes) -> Luminance:
    raw = _raw_mode(film)
    if ";16" in raw:
        return _grey_of_16_bits(_channels_of_16_bits(film, content, raw))
    if film.has_transparency_data:
        return grey_of_colour(_on_black(film.convert("RGBA")))
    if film.mode in {"L", "1"}:
        return np.asarray(film.convert("L"))
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
        grey = np.asarray(film).astype(np.uint16)
        clear = film.info.get("transparency")
        if isinstance(clear, int):
            return np.stack([grey, np.where(grey == clear, 0, 0xFFFF).astype(np.uint16)], -1)
        return grey[..., np.newaxis]
    parts = []
    for mode in _BYTE_MODES[raw]:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as again:
            again.tile = [tile._replace(args=_with_mode(tile.args, mode)) for tile in again.tile]
            parts.append(np.asarray(again).astype(np.uint16))
    high, low = parts if len(parts) > 1 else (parts[0][..., 0::2], parts[0][..., 1::2])
    return np.asarray(high * 256 + low, np.uint16)


def _with_mode(arguments: Any, mode: str) -> Any:
    return (mode, *arguments[1:]) if isinstance(arguments, tuple) else mode


_WEIGHTS = np.array([19595, 38470, 7471], np.uint64)  # ITU-R BT.601 in 1/65536, as Pillow has them


def _grey_of_16_bits(channels: NDArray[np.uint16]) -> Luminance:
    """Return luminance of 16-bit grey, grey-alpha, RGB or RGBA samples (H, W, C)."""
    count = channels.shape[-1]
    opacity = channels[..., -1] if count in {2, 4} else None
    if opacity is not None and not opacity.any():
        opacity = None
    colours = channels[..., : 1 if count < 3 else 3]  # noqa: PLR2004 - RGB
    deep = colours[..., 0]
    if colours.shape[-1] > 1:
        deep = ((colours @ _WEIGHTS + 0x8000) >> 16).astype(np.uint16)
    counted = deep if opacity is None else deep[opacity > 0]
    counts = np.bincount(counted.ravel(), minlength=1 << 16)
    table = eight_bits(stretched(np.arange(1 << 16, dtype=np.float64), counts, (0.0, 65535.0)))
    if colours.shape[-1] > 1:
        grey_of_colour(Image.fromarray(table[colours]))  # refused where it is a photograph
    luminance = table[deep]
    if opacity is not None:  # on black
        luminance = np.rint(luminance * (opacity / 65535.0)).astype(np.uint8)
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


def prepare(luminance: Luminance, spec: Preprocessing) -> NetworkInput:
    """Return the network input for luminance of shape (H, W).

    The resize is PIL's bilinear with antialiasing, so with the default ``spec`` the result is
    bit-equal to torchvision's ``Resize((224, 224))`` on the PIL image.
    """
    box = _region(luminance, spec)
    film = Image.fromarray(luminance)
    if (box.left, box.top, box.right, box.bottom) != (0, 0, film.width, film.height):
        film = film.crop((box.left, box.top, box.right, box.bottom))
    resized = film.resize((spec.size, spec.size), Image.Resampling.BILINEAR)
    return NetworkInput(np.asarray(resized), box)


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
