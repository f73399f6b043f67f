"""The evidence of one view as a picture: the radiograph, where the network saw its target, a scale.

The picture has a palette of 256 colours, greys for the film and ``_STEPS`` steps of the colour
scale, each over its own greys; ordered dithering (Bayer 1973) hides the steps. What makes it cheap:
one byte a pixel (PNG coding takes a sixth of the time that it takes in RGB), ISA-L's deflate (a
fifth of zlib's), and films that are reduced by whole numbers (a quarter of a resize).
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mura_batch.area import Area
from mura_batch.atomic import write_atomic
from mura_batch.config import NOTICE
from mura_batch.network_input import Box, Luminance
from mura_batch.weights_card import Card

LARGEST: Final = 640  # pixels of a film's longer side in its picture: larger films are reduced
SMALLEST: Final = 320  # smaller ones are enlarged to it

# Upper end of the fixed colour scale, in logit units per map cell. A cell that adds 0.25 raises
# the odds by 28 % (e^0.25) all by itself; above it the colour stays and the legend's "peak" tells.
FIXED_BOUND: Final = 0.25

Scale = Literal["fixed", "image"]
_Indices = NDArray[np.uint8]  # of the palette, (h, w)


@dataclass(frozen=True, slots=True, eq=False)
class Thumbnail:
    """What stays of a radiograph for its overlay.

    Attributes:
        pixels: uint8 luminance of shape (h, w), the longer side ``SMALLEST`` to ``LARGEST``.
        box: the region that the network saw, in pixels of the luminance it was made from.
        width, height: of that luminance, in pixels.
    """

    pixels: Luminance
    box: Box
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Caption:
    """What the picture says in words.

    Attributes:
        card: of the weights: area, target, digest.
        probability: of the target in this view, 0–1, the raw sigmoid.
        calibrated: the calibrated probability, where there is one.
        decision: ``positive`` or ``negative``, with its ``threshold``, where one was made.
    """

    card: Card
    probability: float
    calibrated: float | None = None
    decision: Literal["positive", "negative"] | None = None
    threshold: float | None = None


def thumbnail(luminance: Luminance, box: Box) -> Thumbnail:
    """Reduce luminance of shape (H, W) to what :func:`render` draws: means of n × n pixels."""
    height, width = luminance.shape
    longer = max(height, width)
    film = Image.fromarray(luminance)
    if longer > LARGEST:
        film = film.reduce(-(-longer // LARGEST))
    elif longer < SMALLEST:
        scale = SMALLEST / longer
        film = film.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    return Thumbnail(np.asarray(film), box, width, height)


def render(
    picture: Thumbnail, evidence: NDArray[np.float32], caption: Caption, scale: Scale = "fixed"
) -> Image.Image:
    """Draw a view's evidence over its radiograph; the same input gives the same pixels.

    Args:
        picture: the radiograph, from :func:`thumbnail`.
        evidence: float32 (h, w), signed, logit units per cell; ``picture.box`` is what it covers.
            Only its positive part, the Grad-CAM, is coloured.
        caption: what the picture says in words.
        scale: colours mean the same in all pictures (``fixed``: 0 to ``FIXED_BOUND``), or go up
            to this picture's own largest value (``image``).

    Returns:
        A palette image (mode ``P``): film above, legend and caption below, black around.
    """
    positive: NDArray[np.float32] = np.maximum(evidence, np.float32(0))
    peak = float(positive.max())
    bound = FIXED_BOUND if scale == "fixed" else max(peak, _SMALLEST_BOUND)
    film = _coloured(picture, np.minimum(positive / np.float32(bound), np.float32(1)) * _STEPS)
    _outline(film, picture)
    words = _words(caption, framed=_is_framed(picture))
    below = _legend(bound, peak), *(_line(text) for text in words), _line(NOTICE)
    return _stacked([film, *below])


def overlay_name(
    study_digest: str, view_sha256: str, frame: int, weights_digest: str, area: Area | None = None
) -> str:
    """Return the relative path of a view's overlay, made of digests and the frame's number only.

    ``area`` keeps two areas apart that share their weights.
    """
    weights = weights_digest
    if area is not None:
        weights = hashlib.sha256(f"{area} {weights_digest}".encode()).hexdigest()
    folder = f"{study_digest[:2]}/{study_digest[:32]}"
    return f"{folder}/{view_sha256[:16]}-{frame}-{weights[:16]}.png"


def write_overlay(path: Path, image: Image.Image) -> None:
    """Write what :func:`render` drew as a PNG, whole or not at all; the notice is in its texts."""
    content = _png(image)
    write_atomic(path, lambda stream: stream.write(content))


def _png(image: Image.Image) -> bytes:
    """Return a palette image as a PNG file (PNG specification, 3rd edition, sections 5 and 11).

    ISA-L compresses these pictures to the size that Pillow's fastest level gives, in a fifth of
    its time; it has no PNG of its own, and Pillow takes no other deflate.
    """
    rows = np.zeros((image.height, image.width + 1), np.uint8)  # each begins with its filter, none
    rows[:, 1:] = np.asarray(image)
    texts = {"Software": "mura-batch", "Disclaimer": NOTICE}  # keywords of section 11.3.3.1
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", image.width, image.height, 8, 3, 0, 0, 0)),
        (b"PLTE", _palette()),
        *((b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in texts.items()),
        (b"IDAT", isal_zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


# --- the map over the film -------------------------------------------------------------------

_SMALLEST_BOUND = 1e-6  # logit units: an image without positive evidence has a scale too
_STRIP = 256  # rows: a strip stays in the cache


def _coloured(picture: Thumbnail, steps: NDArray[np.float32]) -> _Indices:
    """Return the film in palette indices, under the map ``steps`` (of the colour scale).

    Between the centres of cells the map goes smoothly and never beyond their values; half a cell
    at the box's rim keeps the value of the nearest centre; there is none outside the box.
    """
    film = _greys(picture.pixels)
    high, wide = film.shape
    box = picture.box
    rows = _weights(len(steps), high, (box.top, box.bottom, picture.height))
    columns = _weights(steps.shape[1], wide, (box.left, box.right, picture.width))
    across = steps @ columns.T
    for top in range(0, high, _STRIP):
        strip = slice(top, top + _STRIP)
        heat = rows[strip] @ across
        if heat.any():
            _colour(film[strip], picture.pixels[strip], heat)
    return film


@lru_cache(maxsize=64)
def _weights(cells: int, pixels: int, span: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return each cell's share in each pixel along one side, float32 (pixels, cells).

    ``span`` is the box's first and last edge and the film's length, in pixels of its luminance.
    """
    first, last, length = span
    centres = (np.arange(pixels) + 0.5) * length / pixels
    place = (centres - first) / (last - first) * cells - 0.5
    near = np.clip(place, 0, cells - 1)
    lower = np.minimum(near.astype(int), max(cells - 2, 0))
    part = near - lower
    share = part**2 * (3 - 2 * part)  # smoothstep: flat at both centres
    weights = np.zeros((pixels, cells), np.float32)
    every = np.arange(pixels)
    weights[every, lower] = 1 - share
    weights[every, np.minimum(lower + 1, cells - 1)] += share
    weights[(centres < first) | (centres >= last)] = 0
    weights.setflags(write=False)
    return weights


def _is_framed(picture: Thumbnail) -> bool:
    """Whether the network saw less than the whole film."""
    box = picture.box
    return box.left > 0 or box.top > 0 or box.right < picture.width or box.bottom < picture.height


def _outline(film: _Indices, picture: Thumbnail) -> None:
    """Dash the edges of the box that lie inside the film."""
    high, wide = film.shape
    box = picture.box
    top, bottom = (edge * high // picture.height for edge in (box.top, box.bottom))
    left, right = (edge * wide // picture.width for edge in (box.left, box.right))
    rows = slice(max(top, 0), min(bottom, high))
    columns = slice(max(left, 0), min(right, wide))
    for edge in {top, bottom - 1} & set(range(1, high - 1)):
        _dash(film[edge, columns])
    for edge in {left, right - 1} & set(range(1, wide - 1)):
        _dash(film[rows, edge])


def _dash(line: _Indices) -> None:
    dashes = np.arange(len(line)) % 12
    line[dashes < 6] = _grey(190)  # noqa: PLR2004 - half of each twelve pixels
    line[(dashes == 6) | (dashes == 11)] = 0  # noqa: PLR2004 - dark ends show on bright bone


# --- palette ---------------------------------------------------------------------------------

_STEPS = 12  # of the colour scale
_SHADES = 12  # greys under each of them
_GREYS = 256 - _STEPS * _SHADES  # for the film without colour
# Colours of "plasma" (matplotlib, S. van der Walt and N. Smith, CC0) at equal distances.
_ANCHORS = np.array(
    [
        (104, 24, 178),
        (146, 20, 168),
        (185, 50, 137),
        (219, 92, 104),
        (244, 136, 73),
        (254, 188, 43),
    ],
)
_OPACITY = (0.22, 0.62)  # of the lowest and the highest step: the film stays visible


@cache
def _palette() -> bytes:
    """Return RGB of the 256 indices: the greys, then for each step its shades, dark to bright."""
    greys = np.repeat(np.linspace(0, 255, _GREYS)[:, None], 3, axis=1)
    steps = np.linspace(0, 1, _STEPS)
    places = np.linspace(0, 1, len(_ANCHORS))
    colours = np.stack([np.interp(steps, places, channel) for channel in _ANCHORS.T], axis=1)
    opacity = np.interp(steps, (0, 1), _OPACITY)[:, None, None]
    under = np.linspace(0, 255, _SHADES)[None, :, None]
    mixed = (1 - opacity) * under + opacity * colours[:, None]
    return np.concatenate([greys, mixed.reshape(-1, 3)]).round().astype(np.uint8).tobytes()


def _grey(luminance: int) -> int:
    """Return the palette's index of a grey 0–255."""
    return round(luminance * (_GREYS - 1) / 255)


@cache
def _grey_table() -> bytes:
    return bytes(map(_grey, range(256)))


def _greys(film: Luminance) -> _Indices:
    """Return the grey indices of a film, to be written on."""
    return _looked_up(film, _grey_table())


def _looked_up(values: Luminance, table: bytes) -> _Indices:
    """Return ``table[values]``; bytes do that in a quarter of numpy's or Pillow's time."""
    return np.frombuffer(bytearray(values).translate(table), np.uint8).reshape(values.shape)


@cache
def _dither() -> NDArray[np.float32]:
    """Return Bayer's 8×8 matrix, values in (0, 1), often enough for the largest picture."""
    matrix = np.zeros((1, 1))
    for _ in range(3):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    tiles = LARGEST // 8
    return np.tile((matrix.astype(np.float32) + 0.5) / 64, (tiles, tiles))


@cache
def _shade_dither() -> Luminance:
    """Return the luminance from one shade to the next, dithered.

    Mirrored, so that steps and shades do not round up at the same places.
    """
    return (_dither()[:, ::-1] * np.float32(255 / (_SHADES - 1))).astype(np.uint8)


@cache
def _shade_table() -> bytes:
    """Return for each luminance its shade's index under the step before the first."""
    return bytes(_GREYS - _SHADES + luminance * (_SHADES - 1) // 255 for luminance in range(256))


def _colour(film: _Indices, pixels: Luminance, heat: NDArray[np.float32]) -> None:
    """Lay the colours of ``heat``, in steps, over some rows of a film, (h, w) each."""
    high, wide = film.shape
    heat += _dither()[:high, :wide]
    index = heat.astype(np.uint8)  # of the step; 0 is no colour
    coloured = (index > 0).view(np.uint8) * np.uint8(255)
    index *= np.uint8(_SHADES)
    dither = _shade_dither()[:high, :wide]
    index += _looked_up(np.minimum(pixels, 255 - dither) + dither, _shade_table())
    film ^= (film ^ index) & coloured  # faster than `where`


# --- words and legend ------------------------------------------------------------------------

_MARGIN = 10
_CANVAS = 440  # pixels: every line of text fits
_LINE = 19  # pixels from line to line
_BAR = (170, 12)
_BAR_GREY = 80  # the film that the legend's colours lie on
_INK = 235


def _words(caption: Caption, *, framed: bool) -> list[str]:
    card = caption.card
    numbers = [f"{card.target} probability {caption.probability:.3f}"]
    if caption.calibrated is not None:
        numbers.append(f"calibrated {caption.calibrated:.3f}")
    lines = [f"{card.area}   " + "   ".join(numbers)]
    if caption.decision is not None and caption.threshold is not None:
        lines.append(f"{caption.decision}   threshold {caption.threshold:.3f}")
    seen = "dashed: what the network saw" if framed else "the network saw the whole film"
    lines.append(f"weights {card.short}   {seen}")
    return lines


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@lru_cache(maxsize=64)
def _line(text: str, size: int = 14) -> _Indices:
    """Return a line of text in palette greys, ``_LINE`` high and ``_CANVAS`` wide; not to write on.

    Digits stand alone, so that a new number costs no new drawing.
    """
    line = np.zeros((_LINE, _CANVAS), np.uint8)
    left = _MARGIN
    for part in re.findall(r"\d|\D+", text):
        drawn = _drawn(part, size)
        room = _CANVAS - left
        line[:, left : left + drawn.shape[1]] = drawn[:, :room]
        left += drawn.shape[1]
    return line


@lru_cache(maxsize=256)
def _drawn(text: str, size: int) -> _Indices:
    width = round(_font(size).getlength(text))
    strip = Image.new("L", (width, _LINE))
    ImageDraw.Draw(strip).text((0, 2), text, fill=_INK, font=_font(size))
    return _greys(np.asarray(strip))


def _legend(bound: float, peak: float) -> _Indices:
    """Return the colour bar, and beside it the image's own largest value."""
    over = ", off the scale" if peak > bound else ""
    largest = f"largest here {peak:.3g}{over}" if peak > 0 else "nothing speaks for it"
    legend = _colour_bar(bound).copy()
    left = _BAR[0] + 2 * _MARGIN
    legend[20 : 20 + _LINE, left:] = _line(largest, 13)[:, :-left]
    return legend


@lru_cache(maxsize=16)
def _colour_bar(bound: float) -> _Indices:
    """Return the colour bar with its unit above and its ticks below."""
    wide, high = _BAR
    strip = Image.new("L", (_CANVAS, 60))
    draw = ImageDraw.Draw(strip)
    draw.text((_MARGIN, 5), "logit contribution per map cell", fill=_INK, font=_font(13))
    for share in (0, 0.5, 1):
        x = _MARGIN + round(share * (wide - 1))
        draw.line([(x, 24 + high), (x, 27 + high)], fill=_INK)
        draw.text((x, 28 + high), f"{share * bound:.3g}", fill=_INK, font=_font(12), anchor="ma")
    legend = _greys(np.asarray(strip))
    bar = legend[24 : 24 + high, _MARGIN : _MARGIN + wide]
    bar[:] = _grey(_BAR_GREY)
    heat = np.repeat(np.linspace(0, _STEPS, wide, dtype=np.float32)[None], high, axis=0)
    _colour(bar, np.full((high, wide), _BAR_GREY, np.uint8), heat)
    return legend


def _stacked(parts: list[_Indices]) -> Image.Image:
    """Return the parts below each other, each centred on black, as a palette image."""
    wide = max(part.shape[1] for part in parts)
    canvas = np.zeros((sum(len(part) for part in parts) + _MARGIN, wide), np.uint8)
    top = 0
    for part in parts:
        left = (wide - part.shape[1]) // 2
        canvas[top : top + len(part), left : left + part.shape[1]] = part
        top += len(part)
    image = Image.frombuffer("P", (wide, len(canvas)), canvas, "raw", "P", 0, 1)
    image.putpalette(_palette())
    return image
