"""An overlay shows the evidence where it belongs, in colours that mean the same everywhere."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mura_batch.area import Area
from mura_batch.config import NOTICE
from mura_batch.network_input import Box, prepare
from mura_batch.overlay import (
    _CANVAS,
    FIXED_BOUND,
    LARGEST,
    SMALLEST,
    Caption,
    _font,
    _legend,
    _line,
    _words,
    overlay_name,
    render,
    thumbnail,
    write_overlay,
)
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights_card import Card, OperatingPoint

CARD = Card(
    area=Area.XR_SHOULDER,
    target="abnormal",
    sha256="3fa94be0c1d2" + "0" * 52,
    operating_points=(OperatingPoint("balanced", 0.5),),
    training_data="none",
    licence="MIT",
    origin="trained",
)
CAPTION = Caption(CARD, 0.8731, calibrated=0.4127, decision="positive", threshold=0.3)
DIGEST = st.binary().map(lambda content: sha256(content).hexdigest())


def limb(height: int, width: int, *, bright: tuple[slice, slice] | None = None) -> np.ndarray:
    """A dark film with a brighter region, all of it where none is given."""
    film = np.full((height, width), 20, np.uint8)
    film[bright or np.s_[:, :]] = 120
    return film


def hot(row: int, column: int, cells: int = 5, value: float = FIXED_BOUND) -> np.ndarray:
    evidence = np.full((cells, cells), -0.1, np.float32)
    evidence[row, column] = value
    return evidence


def drawn(film: np.ndarray, box: Box, evidence: np.ndarray, scale: str = "fixed") -> np.ndarray:
    """The film's part of the picture, RGB int (h, w, 3)."""
    picture = thumbnail(film, box)
    high, wide = picture.pixels.shape
    image = np.asarray(render(picture, evidence, CAPTION, scale).convert("RGB")).astype(int)
    left = (image.shape[1] - wide) // 2
    return image[:high, left : left + wide]


def saturation(rgb: np.ndarray) -> np.ndarray:
    return rgb.max(axis=-1) - rgb.min(axis=-1)


def warmest(rgb: np.ndarray) -> tuple[float, float]:
    """Centre of the coloured region as shares of height and width."""
    rows, columns = np.nonzero(saturation(rgb) > 20)
    return (rows.mean() + 0.5) / rgb.shape[0], (columns.mean() + 0.5) / rgb.shape[1]


SQUASH = Preprocessing(size=160)
PAD = Preprocessing(size=160, fit="pad")
CROP = Preprocessing(size=160, crop="foreground", fit="pad")


@pytest.mark.parametrize("shape", [(400, 300), (300, 420), (90, 60), (1500, 700)])
@pytest.mark.parametrize("spec", [SQUASH, PAD, CROP], ids=["squash", "pad", "crop"])
def test_a_hot_cell_colours_its_own_place_on_the_film(
    shape: tuple[int, int], spec: Preprocessing
) -> None:
    high, wide = shape
    region = np.s_[high // 3 :, : 2 * wide // 3]
    film = limb(high, wide, bright=region)
    box = prepare(film, spec).box
    for row, column in [(1, 2), (2, 3), (3, 1)]:
        place = (
            (box.top + (row + 0.5) / 5 * (box.bottom - box.top)) / high,
            (box.left + (column + 0.5) / 5 * (box.right - box.left)) / wide,
        )
        rgb = drawn(film, box, hot(row, column))
        inside = [0.2 < at < 0.8 for at in place]
        for found, expected, whole in zip(warmest(rgb), place, inside, strict=True):
            if whole:  # near the rim the film cuts the spot off, and its centre moves
                assert found == pytest.approx(expected, abs=0.04)
        y, x = (int(at * side) for at, side in zip(place, rgb.shape, strict=False))
        if 0 <= y < rgb.shape[0] and 0 <= x < rgb.shape[1]:
            assert saturation(rgb)[y, x] > 80


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 4), (4, 0), (4, 4)])
def test_a_hot_corner_colours_that_corner_and_no_other(row: int, column: int) -> None:
    film = limb(300, 300)
    rgb = drawn(film, Box(0, 0, 300, 300), hot(row, column))
    corners = saturation(rgb)[:: len(rgb) - 1, :: len(rgb) - 1] > 20
    expected = np.zeros((2, 2), bool)
    expected[row // 4, column // 4] = True
    np.testing.assert_array_equal(corners, expected)


def test_nothing_is_coloured_outside_what_the_network_saw() -> None:
    film = limb(400, 400)
    rgb = drawn(film, Box(100, 200, 300, 400), np.full((5, 5), 1, np.float32))
    coloured = saturation(rgb) > 0
    quarter = len(rgb) // 4
    assert coloured[2 * quarter + 4 : -4, quarter + 4 : 3 * quarter - 4].all()
    assert not coloured[: 2 * quarter - 2].any()
    assert not coloured[:, : quarter - 2].any()
    assert not coloured[:, 3 * quarter + 2 :].any()


def test_a_part_of_the_map_beyond_the_film_falls_on_nothing() -> None:
    film = limb(400, 100)
    box = prepare(film, PAD).box
    assert (box.left, box.right) == (-150, 250)
    assert not saturation(drawn(film, box, hot(2, 0))).any()
    assert saturation(drawn(film, box, hot(2, 2))).any()


@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.floats(-5, 0, width=32), min_size=49, max_size=49),
    scale=st.sampled_from(["fixed", "image"]),
)
def test_evidence_against_leaves_the_film_as_it_is(values: list[float], scale: str) -> None:
    ramp = np.tile(np.linspace(0, 255, 200).astype(np.uint8), (150, 1))
    box = Box(0, 0, 200, 150)
    rgb = drawn(ramp, box, np.array(values, np.float32).reshape(7, 7), scale)
    np.testing.assert_array_equal(saturation(rgb), 0)
    expected = thumbnail(ramp, box).pixels
    assert np.abs(rgb[..., 0] - expected).max() <= 2  # the palette's greys


def mean_colour(film: np.ndarray, value: float, cells: int, scale: str = "fixed") -> np.ndarray:
    """The colour of a film that is covered with ``value`` but for one hotter cell below."""
    evidence = np.full((cells, cells), value, np.float32)
    evidence[-1, :] = 2 * value
    height, width = film.shape
    rgb = drawn(film, Box(0, 0, width, height), evidence, scale)
    return rgb[8:64, 8:64].reshape(-1, 3).mean(axis=0)


def test_one_value_has_one_colour_in_all_pictures() -> None:
    first = mean_colour(limb(300, 200), 0.1, 7)
    other = mean_colour(limb(900, 1200), 0.1, 5)
    np.testing.assert_allclose(first, other, atol=2)
    assert np.abs(first - mean_colour(limb(300, 200), 0.2, 7)).max() > 20


def test_scaled_to_the_image_only_shares_of_its_own_peak_count() -> None:
    film = limb(300, 200)
    weak, strong = (mean_colour(film, value, 7, "image") for value in (0.001, 3.0))
    np.testing.assert_allclose(weak, strong, atol=2)
    fixed = mean_colour(film, 0.001, 7)
    assert np.abs(weak - fixed).max() > 20


def test_more_evidence_is_redder_and_further_from_grey_all_along_the_scale() -> None:
    film = limb(300, 200)
    values = np.linspace(0.02, FIXED_BOUND, 8)
    colours = np.array([mean_colour(film, value, 5) for value in values])
    assert (np.diff(colours[:, 0]) > 2).all()
    assert (np.diff(np.linalg.norm(colours - 120, axis=1)) > 2).all()


def test_above_the_scale_the_film_still_shows_through_and_the_legend_tells() -> None:
    ramp = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (400, 1))
    rgb = drawn(ramp, Box(0, 0, 400, 400), np.full((5, 5), 1000, np.float32))
    brightness = rgb.sum(axis=-1)
    assert brightness[:, -60:].mean() - brightness[:, :60].mean() > 150
    assert (_legend(FIXED_BOUND, 1000.0) != _legend(FIXED_BOUND, 0.1)).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (2000, 3), (40, 30), (2880, 2304)])
@pytest.mark.parametrize("cells", [1, 2, 7])
def test_films_of_any_shape_are_drawn_at_a_readable_size(
    shape: tuple[int, int], cells: int
) -> None:
    film = limb(*shape)
    picture = thumbnail(film, prepare(film, PAD).box)
    image = render(picture, np.ones((cells, cells), np.float32), CAPTION)
    assert SMALLEST <= max(picture.pixels.shape) <= LARGEST
    assert image.width >= _CANVAS
    assert image.height >= picture.pixels.shape[0] + 100


def test_a_thumbnail_keeps_nothing_of_the_large_film() -> None:
    film = limb(2880, 2304)
    pixels = thumbnail(film, Box(0, 0, 2304, 2880)).pixels
    owner = pixels
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    assert owner.nbytes <= LARGEST * LARGEST
    assert not np.shares_memory(pixels, film)


def test_a_film_of_the_pictures_own_size_is_not_aliased() -> None:
    film = limb(LARGEST, LARGEST)
    picture = thumbnail(film, Box(10, 10, 300, 300))
    render(picture, hot(2, 2), CAPTION)
    np.testing.assert_array_equal(picture.pixels, limb(LARGEST, LARGEST))
    np.testing.assert_array_equal(film, limb(LARGEST, LARGEST))


# The widest that each line can become.
LONGEST = [
    replace(CAPTION, card=replace(CARD, area=area, target=target))
    for area in Area
    for target in ("abnormal", "fracture")
]


@pytest.mark.parametrize("caption", LONGEST, ids=lambda c: f"{c.card.area}-{c.card.target}")
def test_no_line_of_text_is_cut_off(caption: Caption) -> None:
    for line in [*_words(caption, framed=True), *_words(caption, framed=False), NOTICE]:
        assert _font(14).getlength(line) < _CANVAS - 20, line
        assert not _line(line)[:, -8:].any()


@pytest.mark.parametrize("peak", [0.0, 8.88e-05, 0.0888, 0.888, 88.8, 8.88e5])
@pytest.mark.parametrize("bound", [FIXED_BOUND, 8.88e-06])
def test_the_legend_is_not_cut_off(peak: float, bound: float) -> None:
    legend = _legend(bound, peak)
    assert not legend[:, -8:].any()
    assert not legend[-1].any()


def test_the_words_name_numbers_weights_and_what_was_seen() -> None:
    text = "\n".join(_words(CAPTION, framed=True))
    for part in (
        "XR_SHOULDER",
        "abnormal probability 0.873",
        "calibrated 0.413",
        "positive",
        "threshold 0.300",
        "weights 3fa94be0c1d2",
        "dashed: what the network saw",
    ):
        assert part in text
    bare = "\n".join(_words(Caption(CARD, 0.5), framed=False))
    assert "calibrated" not in bare
    assert "threshold" not in bare
    assert "whole film" in bare


def test_a_crop_is_outlined_and_the_whole_film_is_not() -> None:
    film = limb(400, 400)
    against = hot(0, 0, value=-1)
    cropped = drawn(film, Box(100, 100, 300, 300), against)
    whole = drawn(film, Box(-50, -50, 450, 450), against)
    assert (cropped[100] != whole[100]).any()
    assert len(np.unique(whole)) == 1


def encoded(film: np.ndarray, evidence: np.ndarray) -> bytes:
    stream = io.BytesIO()
    box = prepare(film, CROP).box
    render(thumbnail(film, box), evidence, CAPTION).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def test_the_same_view_gives_the_same_bytes() -> None:
    film = np.random.default_rng(3).integers(0, 256, (500, 400), dtype=np.uint8)
    evidence = np.random.default_rng(4).normal(0, 0.1, (5, 5)).astype(np.float32)
    first = encoded(film, evidence)
    encoded(film[::-1].copy(), evidence * 2)  # nothing stays behind from another picture
    assert encoded(film, evidence) == first
    assert encoded(film, evidence * 2) != first


def test_the_file_is_a_png_that_says_what_it_is_not_for(tmp_path: Path) -> None:
    film = limb(300, 200)
    image = render(thumbnail(film, Box(0, 0, 200, 300)), hot(2, 2), CAPTION)
    target = tmp_path / "ab" / "cd" / "overlay.png"
    write_overlay(target, image)
    with Image.open(target) as read:
        assert read.format == "PNG"
        assert read.info["Disclaimer"] == NOTICE
        np.testing.assert_array_equal(read.convert("RGB"), image.convert("RGB"))
    assert [file.name for file in target.parent.iterdir()] == ["overlay.png"]
    before = target.read_bytes()
    write_overlay(target, image)
    assert target.read_bytes() == before


@given(study=DIGEST, view=DIGEST, weights=DIGEST, frame=st.integers(0, 9999))
def test_names_are_digests_and_the_frame_and_nothing_else(
    study: str, view: str, weights: str, frame: int
) -> None:
    name = overlay_name(study, view, frame, weights)
    assert re.fullmatch(
        rf"[0-9a-f]{{2}}/[0-9a-f]{{32}}/[0-9a-f]{{16}}-{frame}-[0-9a-f]{{16}}\.png", name
    )
    assert "XR" not in overlay_name(study, view, frame, weights, Area.XR_HAND)


def test_each_study_view_frame_weights_and_area_has_a_name_of_its_own() -> None:
    a, b = (sha256(content).hexdigest() for content in (b"a", b"b"))
    names = {
        overlay_name(study, view, frame, weights, area)
        for study in (a, b)
        for view in (a, b)
        for frame in (0, 1)
        for weights in (a, b)
        for area in (None, *Area)
    }
    assert len(names) == 2 * 2 * 2 * 2 * 8
