"""Films decoded smaller, where their weights' card allows it, show the same."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import made_dicom
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless
from site_home import SAMPLES

from mura_batch import radiograph
from mura_batch.errors import UnreadableImage
from mura_batch.greyscale import spare_halvings
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film, read_luminance


def reduced(path: Path, enough: int | None) -> np.ndarray:
    return radiograph._read(path, 0, enough)[0]


HALF = np.add.outer(np.arange(96), np.arange(64)) * 20  # a slope: means of its pixels lie on it


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_2000_at_half_size_shows_the_same_film(tmp_path, bits, signed):
    slope = HALF if bits > 8 else HALF // 20
    kind = np.dtype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")
    pixels = (slope - (slope.max() // 2 if signed else 0)).astype(kind)
    window = {"WindowCenter": float(np.median(pixels)), "WindowWidth": float(np.ptp(pixels) + 1)}
    path = made_dicom.write(
        tmp_path / "film", pixels, JPEG2000Lossless, BitsStored=bits, HighBit=bits - 1, **window
    )
    whole, half = read_luminance(path), reduced(path, 40)
    assert whole.shape == (96, 64)
    assert half.shape == (48, 32)
    means = whole.reshape(48, 2, 32, 2).mean(axis=(1, 3))
    assert np.abs(half[2:-2, 2:-2] - means[2:-2, 2:-2]).max() <= 3
    np.testing.assert_array_equal(reduced(path, 49), whole)


def packed_film(path, height, width, **how):
    """Write a JPEG 2000 film of a smooth pattern, 8 bits, with settings of the encoder."""
    rows, columns = np.mgrid[:height, :width]
    pixels = ((np.sin(rows / 37) + np.cos(columns / 53) + 2) * 63).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True, **how)
    made = made_dicom.dataset(pixels, PixelData=encapsulate([stream.getvalue()]))
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = JPEG2000Lossless
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.save_as(path, enforce_file_format=True)
    return path


@given(height=st.integers(100, 500), width=st.integers(100, 500), enough=st.integers(40, 120))
@settings(max_examples=40, deadline=None)
def test_jpeg_2000_of_any_size_comes_out_smaller(tmp_path_factory, height, width, enough):
    path = packed_film(tmp_path_factory.mktemp("odd") / "film", height, width)
    whole, small = read_luminance(path), reduced(path, enough)
    assert max(small.shape) >= min(enough, max(whole.shape))
    if max(whole.shape) >= 2 * enough:
        assert max(small.shape) < max(whole.shape)
    again = np.asarray(Image.fromarray(whole).resize(small.shape[::-1], Image.Resampling.BOX))
    assert np.abs(small.astype(int) - again).mean() < 6  # of 255


@pytest.mark.parametrize("levels", [0, 1, 2, 5])
def test_jpeg_2000_with_fewer_levels_than_wanted_is_read(tmp_path, levels):
    path = packed_film(tmp_path / "film", 900, 700, num_resolutions=levels + 1)
    small = reduced(path, 100)
    assert small.shape == ((113, 88) if levels >= 3 else (900, 700))


def test_a_damaged_jpeg_2000_is_refused_at_any_size(tmp_path):
    path = packed_film(tmp_path / "film", 900, 700)
    made = pydicom.dcmread(path)
    made.PixelData = made.PixelData[:-4000]
    made.save_as(path)
    for enough in (None, 100):
        with pytest.raises(UnreadableImage):
            reduced(path, enough)


@pytest.mark.parametrize(
    ("part", "is_smaller"), [(1.0, True), (0.8, True), (0.5, False), (0.1, False)]
)
def test_a_limb_that_is_small_on_its_film_is_read_in_full(tmp_path, part, is_smaller):
    spec = Preprocessing(size=96, crop="foreground", fit="pad", decode="reduced")
    with Image.open(SAMPLES / "elbow_lateral.png") as limb:
        grey = limb.convert("L").resize((round(2000 * part), round(2000 * part)))
    film = Image.new("L", (2000, 2000))
    film.paste(grey, (300, 300) if part < 0.5 else (0, 0))
    film.save(tmp_path / "film.jpg", quality=98)
    luminance, seen = read_film(tmp_path / "film.jpg", 0, spec)
    assert (luminance.shape != (2000, 2000)) == is_smaller
    assert seen.box.right - seen.box.left >= 1.75 * spec.size
    _, full = read_film(tmp_path / "film.jpg", 0, replace(spec, decode="full"))
    assert np.abs(seen.pixels.astype(int) - full.pixels).mean() < 6


def test_padding_and_palettes_are_not_decoded_smaller(tmp_path):
    pixels = HALF.astype(np.uint16)
    path = made_dicom.write(tmp_path / "film", pixels, JPEG2000Lossless, PixelPaddingValue=0)
    assert reduced(path, 10).shape == (96, 64)


@pytest.mark.parametrize(
    ("longer", "halvings"), [(447, 0), (448, 0), (895, 0), (896, 1), (1792, 2), (9000, 3)]
)
def test_a_film_is_halved_while_enough_stays(longer, halvings):
    assert spare_halvings(300, longer, 448) == halvings
    assert spare_halvings(longer, 1, 448) == halvings
    assert spare_halvings(longer, 300, None) == 0


@pytest.mark.parametrize(
    ("shape", "smaller"),
    [((1001, 517), (251, 130)), ((2000, 101), (250, 13)), ((449, 447), (225, 224))],
)
def test_a_jpeg_is_decoded_smaller_where_that_is_enough(tmp_path, shape, smaller):
    slope = np.add.outer(np.arange(shape[0]) // 8, np.arange(shape[1]) // 8).astype(np.uint8)
    Image.fromarray(slope).save(tmp_path / "film.jpg", quality=98)
    small = reduced(tmp_path / "film.jpg", 224)
    assert small.shape == smaller
    whole = read_luminance(tmp_path / "film.jpg")
    again = np.asarray(Image.fromarray(whole).resize(small.shape[::-1], Image.Resampling.BOX))
    assert np.abs(small.astype(int) - again).mean() < 2
