"""Every encoding of DICOM pixels gives the same film, and colour that is none passes."""

from __future__ import annotations

from pathlib import Path

import made_dicom
import numpy as np
import pydicom
import pytest
from made_dicom import SYNTAXES, windowed
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import get_decoder

from mura_batch.errors import UnreadableImage
from mura_batch.radiograph import read_luminance


def refusal(path: Path, frame: int = 0) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_luminance(path, frame)
    return caught.value.code


def ramp(levels: int, dtype: type = np.uint16) -> np.ndarray:
    return np.arange(levels, dtype=dtype).reshape(-1, 32)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_lossless_syntax_gives_the_same_film(tmp_path, syntax, dtype):
    frames = np.stack([ramp(2048), ramp(2048)[::-1]]).astype(dtype)
    elements = {"WindowCenter": 128, "WindowWidth": 256}
    made_dicom.write(tmp_path / "film.dcm", frames, SYNTAXES[syntax], **elements)
    for index, frame in enumerate(frames):
        film = read_luminance(tmp_path / "film.dcm", index)
        assert np.array_equal(film, windowed(frame.astype(float), 128, 256))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(64, 32), (33, 65), (1, 7)])
def test_run_lengths_give_every_byte_its_place(tmp_path, dtype, shape):
    pixels = np.random.default_rng(2).integers(0, np.iinfo(dtype).max, shape, dtype)
    window = {"WindowCenter": 1 << pixels.itemsize * 8 - 1, "WindowWidth": pixels.max()}
    plain, packed = (
        read_luminance(made_dicom.write(tmp_path / "film.dcm", pixels, SYNTAXES[name], **window))
        for name in ("explicit", "rle")
    )
    assert np.array_equal(plain, packed)


@pytest.mark.parametrize("table", [True, False])
def test_a_frame_in_many_fragments_is_read_whole(tmp_path, table):
    frames = np.stack([ramp(4096), ramp(4096)[::-1]])
    whole = made_dicom.write(tmp_path / "whole.dcm", frames, SYNTAXES["jpeg_2000"])
    made = pydicom.dcmread(whole)
    packed = list(generate_frames(made.PixelData, number_of_frames=2))
    made.PixelData = encapsulate(packed, fragments_per_frame=3, has_bot=table)
    made.save_as(tmp_path / "split.dcm")
    for index in range(2):
        film = read_luminance(tmp_path / "split.dcm", index)
        assert np.array_equal(film, read_luminance(whole, index))


@pytest.mark.parametrize("image", ["RG2", "RG3"])
def test_lossless_files_of_one_radiograph_are_one_luminance(shared_data, image):
    folder = shared_data / "dicom"
    films = [read_luminance(folder / f"{image}_{s}.dcm") for s in ("JPLL", "JLSL", "J2KR", "RLE")]
    assert all(np.array_equal(film, films[0]) for film in films)
    for lossy in ("JLSN", "J2KI"):
        film = read_luminance(folder / f"{image}_{lossy}.dcm").astype(int)
        assert np.abs(film - films[0]).mean() < 1


def test_a_faulty_jpeg_encoders_file_is_refused_clearly(shared_data):
    assert refusal(shared_data / "dicom" / "RG3_JPLY.dcm") == "corrupt"
    assert read_luminance(shared_data / "dicom" / "RG2_JPLY_fixed.dcm").shape == (2140, 1760)


@pytest.mark.parametrize(
    "syntax",
    ["50", "51", "57", "70", "80", "81", "90", "91", "201", "202", "203"],
)
def test_a_decoder_is_installed_for_every_syntax(syntax):
    assert get_decoder(f"1.2.840.10008.1.2.4.{syntax}").is_available


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("MR_small_expb.dcm", "MR_small.dcm"),
        ("MR_small_implicit.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
    ],
)
def test_pydicoms_own_samples_agree(name, like):
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    assert np.array_equal(read_luminance(folder / name), read_luminance(folder / like))


def test_a_signed_film_in_an_unsigned_code_stream_keeps_its_signs():
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    header = pydicom.dcmread(folder / "J2K_pixelrep_mismatch.dcm")
    value = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    center, width = (
        float(part[0] if isinstance(part, pydicom.multival.MultiValue) else part)
        for part in (header.WindowCenter, header.WindowWidth)
    )
    shown = np.clip((value - (center - 0.5)) / (width - 1) + 0.5, 0, 1) * 255
    assert np.array_equal(read_luminance(folder / "J2K_pixelrep_mismatch.dcm"), np.rint(shown))


# Colour in DICOM


@pytest.mark.parametrize("kind", ["RGB", "YBR_FULL", "planar", "PALETTE COLOR", "16 bits"])
def test_secondary_captures_in_grey_pass(tmp_path, kind):
    grey = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    path = tmp_path / "film.dcm"
    if kind == "PALETTE COLOR":
        table = np.arange(256, dtype=np.uint16)[::-1] * 257
        palette = {}
        for colour in ("Red", "Green", "Blue"):
            palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            palette[f"{colour}PaletteColorLookupTableData"] = table.astype("<u2").tobytes()
        made_dicom.write(path, grey, PhotometricInterpretation=kind, **palette)
        expected = grey[:, ::-1]
    elif kind == "planar":
        planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)).reshape(rgb.shape)
        made_dicom.write(path, planes, PlanarConfiguration=1)
        expected = grey
    elif kind == "YBR_FULL":
        ybr = np.stack([grey, np.full_like(grey, 128), np.full_like(grey, 128)], axis=-1)
        made_dicom.write(path, ybr, PhotometricInterpretation=kind)
        expected = grey
    elif kind == "16 bits":
        made_dicom.write(path, rgb.astype(np.uint16) * 16, BitsStored=12, HighBit=11)
        expected = grey
    else:
        made_dicom.write(path, rgb)
        expected = grey
    assert np.array_equal(read_luminance(path), expected)


def test_colour_in_dicom_is_refused(tmp_path):
    colours = np.random.default_rng(3).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    pixels = np.kron(colours, np.ones((16, 16, 1), np.uint8))
    assert refusal(made_dicom.write(tmp_path / "photo.dcm", pixels)) == "colour"
