from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import made_dicom
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_dicom import SYNTAXES, windowed
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from torchvision.transforms import Resize

from mura_batch.errors import UnreadableImage
from mura_batch.network_input import prepare
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_luminance

HERE = Path(__file__).parent
SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = arrays.arrays(np.uint16, (6, 5), elements=st.integers(0, 65535))


def refusal(path: Path, frame: int = 0) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_luminance(path, frame)
    return caught.value.code


def ramp(levels: int, dtype: type = np.uint16) -> np.ndarray:
    return np.arange(levels, dtype=dtype).reshape(-1, 32)


# PNG and JPEG


@pytest.mark.parametrize("name", ["hand_grey.jpg", "forearm_rgb.jpg"])
def test_a_plain_jpeg_is_exactly_pillows_grey(name):
    film = HERE / "data" / name
    assert np.array_equal(read_luminance(film), np.asarray(Image.open(film).convert("L")))


def test_published_films_are_exactly_pillows_grey(shared_data):
    films = sorted((shared_data / "fracatlas" / "images").iterdir(), key=lambda f: f.stat().st_size)
    for film in films[:40]:
        assert np.array_equal(read_luminance(film), np.asarray(Image.open(film).convert("L")))


def test_the_content_decides_not_the_name(tmp_path):
    film = tmp_path / "scan.dcm"
    film.write_bytes((HERE / "data" / "hand_grey.jpg").read_bytes())
    assert read_luminance(film).shape == (454, 373)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_as_pillow_does(tmp_path, orientation):
    pixels = np.random.default_rng(1).integers(0, 255, (24, 40), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("film.jpg", "film.png"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as film:
            upright = film.copy()
            method = {
                2: Image.Transpose.FLIP_LEFT_RIGHT,
                3: Image.Transpose.ROTATE_180,
                4: Image.Transpose.FLIP_TOP_BOTTOM,
                5: Image.Transpose.TRANSPOSE,
                6: Image.Transpose.ROTATE_270,
                7: Image.Transpose.TRANSVERSE,
                8: Image.Transpose.ROTATE_90,
            }.get(orientation)
            upright = upright.transpose(method) if method is not None else upright
        assert np.array_equal(read_luminance(tmp_path / name), np.asarray(upright))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGB", "RGBA", "1"])
def test_grey_is_kept_in_every_png_mode(tmp_path, mode):
    grey = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (16, 1)))
    if mode == "1":
        grey = grey.convert("1")
    grey.convert(mode).save(tmp_path / "film.png")
    assert np.array_equal(read_luminance(tmp_path / "film.png"), np.asarray(grey.convert("L")))


def test_transparency_is_black_but_a_wholly_clear_film_is_shown(tmp_path):
    pixels = np.full((4, 4, 2), 200, np.uint8)
    pixels[..., 1] = 255
    pixels[0, :, 1] = 0
    Image.fromarray(pixels, "LA").save(tmp_path / "film.png")
    film = read_luminance(tmp_path / "film.png")
    assert (film[0] == 0).all()
    assert (film[1:] == 200).all()
    pixels[..., 1] = 0
    Image.fromarray(pixels, "LA").save(tmp_path / "film.png")
    assert (read_luminance(tmp_path / "film.png") == 200).all()


def png_of(samples: np.ndarray, colour_type: int) -> bytes:
    """Return a 16-bit PNG of samples (H, W, C), which Pillow cannot write in colour."""
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").reshape(height, -1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_sixteen_bits_that_use_a_tenth_of_the_range_keep_their_contrast(
    tmp_path, colour_type, channels
):
    grey = np.linspace(20000, 26000, 64 * 64).astype(np.uint16).reshape(64, 64)
    samples = np.repeat(grey[..., None], channels, axis=-1)
    if channels in {2, 4}:
        samples[..., -1] = 65535
    (tmp_path / "film.png").write_bytes(png_of(samples, colour_type))
    film = read_luminance(tmp_path / "film.png")
    assert (film.min(), film.max()) == (0, 255)
    assert np.unique(film).size == 256  # the low bytes count, in colour channels too
    assert (np.diff(film.ravel().astype(int)) >= 0).all()


@contextmanager
def memory_of(samples: np.ndarray) -> Iterator[None]:
    """Fail where arrays take more than four times the samples, and some steps' own, at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4 * samples.nbytes + (20 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_sixteen_bits_take_a_few_times_their_own_memory(tmp_path, colour_type, channels):
    samples = np.full((3000, 4000, channels), 30000, np.uint16)
    samples[:1000] = 29000
    (tmp_path / "film.png").write_bytes(png_of(samples, colour_type))
    with memory_of(samples):
        assert read_luminance(tmp_path / "film.png").shape == (3000, 4000)


def test_sixteen_bits_of_dicom_take_a_few_times_their_own_memory(tmp_path):
    samples = np.full((3000, 4000), 30000, np.uint16)
    made_dicom.write(tmp_path / "film.dcm", samples)
    with memory_of(samples):
        assert read_luminance(tmp_path / "film.dcm").shape == (3000, 4000)


def test_sixteen_bit_colours_are_weighted_before_they_lose_bits(tmp_path):
    grey = np.linspace(0, 65000, 600 * 32).astype(np.uint16).reshape(600, 32, 1)
    samples = grey + np.random.default_rng(6).integers(0, 500, (600, 32, 3), np.uint16)
    samples[0, :2] = [[0] * 3, [65535] * 3]
    (tmp_path / "film.png").write_bytes(png_of(samples, 2))
    weighted = (samples.astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16
    Image.fromarray(weighted.astype(np.uint16)).save(tmp_path / "grey.png")
    expected = read_luminance(tmp_path / "grey.png")
    assert np.array_equal(read_luminance(tmp_path / "film.png"), expected)


def test_a_bright_marker_does_not_take_the_contrast(tmp_path):
    grey = np.linspace(1000, 5000, 100 * 100).astype(np.uint16).reshape(100, 100)
    grey[:5, :9] = 65535
    Image.fromarray(grey).save(tmp_path / "film.png")
    assert np.ptp(read_luminance(tmp_path / "film.png")[10:]) > 225


def test_sixteen_bits_over_the_whole_range_equal_the_eight_bit_film(tmp_path):
    eight = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "film.png")
    assert np.array_equal(read_luminance(tmp_path / "film.png"), eight)


def test_colour_photographs_are_refused(tmp_path):
    samples = pytest.importorskip("sklearn.datasets")
    for name in ("china.jpg", "flower.jpg"):
        Image.fromarray(samples.load_sample_image(name)).save(tmp_path / name)
        assert refusal(tmp_path / name) == "colour"
    # A hand on a black table: one skin tone at every brightness, and no film base.
    film = np.asarray(Image.open(HERE / "data" / "hand_grey.jpg")) / 255.0
    for skin in ([224, 172, 150], [150, 100, 75]):
        hand = np.rint(film[..., None] ** 0.5 * skin).astype(np.uint8)
        Image.fromarray(hand).save(tmp_path / "hand.jpg")
        assert refusal(tmp_path / "hand.jpg") == "colour"


@pytest.mark.parametrize("tint", [(0.78, 0.9, 1.0), (0.66, 0.8, 1.0), (1.0, 0.95, 0.85)])
def test_tinted_films_pass(tmp_path, tint):
    film = np.asarray(Image.open(HERE / "data" / "hand_grey.jpg"))
    tinted = Image.fromarray(np.rint(film[..., None] * np.array(tint)).astype(np.uint8))
    tinted.save(tmp_path / "film.jpg", quality=85)
    assert read_luminance(tmp_path / "film.jpg").shape == film.shape


def test_a_coloured_arrow_on_a_film_passes(tmp_path):
    film = Image.open(HERE / "data" / "hand_grey.jpg").convert("RGB")
    film.paste((255, 0, 0), (20, 20, 60, 60))
    film.save(tmp_path / "film.png")
    assert read_luminance(tmp_path / "film.png").shape == (454, 373)


# Preprocessing


@SETTINGS
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 90), st.integers(1, 90))))
def test_the_default_preprocessing_is_torchvisions_resize(luminance):
    expected = np.asarray(Resize((224, 224))(Image.fromarray(luminance)))
    assert np.array_equal(prepare(luminance, Preprocessing()).pixels, expected)


def test_the_default_preprocessing_is_torchvisions_resize_on_a_film():
    luminance = read_luminance(HERE / "data" / "hand_grey.jpg")
    expected = np.asarray(Resize((224, 224))(Image.fromarray(luminance)))
    assert np.array_equal(prepare(luminance, Preprocessing()).pixels, expected)


@SETTINGS
@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 2200), st.integers(1, 40))),
    st.booleans(),
    st.sampled_from(["none", "foreground"]),
)
def test_padding_is_a_resize_of_the_black_square_around_the_region(luminance, turned, crop):
    luminance = np.ascontiguousarray(luminance.T) if turned else luminance
    made = prepare(luminance, Preprocessing(size=64, crop=crop, fit="pad"))
    box = (made.box.left, made.box.top, made.box.right, made.box.bottom)
    square = Image.fromarray(luminance).crop(box)
    assert square.width == square.height
    expected = np.asarray(square.resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(made.pixels, expected)


@pytest.mark.parametrize("shape", [(20_000, 1_500), (1_500, 20_000)])
def test_the_square_around_a_long_film_may_be_more_than_pillow_crops(shape):
    film = prepare(np.full(shape, 200, np.uint8), Preprocessing(fit="pad")).pixels
    assert film.shape == (224, 224)
    assert film[112, 112] == 200
    assert film[0, 0] == 0


# Grey values of DICOM


@SETTINGS
@given(
    WORDS,
    st.floats(-100, 66000),
    st.floats(1.5, 66000),
    st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
)
def test_a_window_is_monotonic_and_monochrome1_its_inverse(
    tmp_path, words, center, width, function
):
    window = {"WindowCenter": round(center, 2), "WindowWidth": round(width, 2)}
    film, negative = (
        read_luminance(
            made_dicom.write(
                tmp_path / "film.dcm",
                words,
                PhotometricInterpretation=kind,
                VOILUTFunction=function,
                **window,
            )
        )
        for kind in ("MONOCHROME2", "MONOCHROME1")
    )
    order = np.argsort(words.ravel(), kind="stable")
    assert (np.diff(film.ravel()[order].astype(int)) >= 0).all()
    assert np.array_equal(negative, 255 - film)


@SETTINGS
@given(
    arrays.arrays(np.int16, (4, 4), elements=st.integers(-2048, 2047)),
    st.integers(-500, 500),
    st.integers(1, 3000),
)
def test_signed_values_go_through_rescale_and_then_the_window(tmp_path, pixels, center, width):
    path = made_dicom.write(
        tmp_path / "film.dcm",
        pixels,
        BitsStored=12,
        HighBit=11,
        RescaleSlope=2,
        RescaleIntercept=-1024,
        WindowCenter=[center, 40],
        WindowWidth=[width, 400],
    )
    assert np.array_equal(read_luminance(path), windowed(pixels * 2.0 - 1024, center, width))


def test_bits_above_bits_stored_do_not_count(tmp_path):
    clean = ramp(4096)
    window = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 2048, "WindowWidth": 4096}
    expected = read_luminance(made_dicom.write(tmp_path / "clean.dcm", clean, **window))
    overlay = clean | 0xF000
    shown = read_luminance(made_dicom.write(tmp_path / "overlay.dcm", overlay, **window))
    assert np.array_equal(shown, expected)
    shifted = window | {"HighBit": 15}
    high = read_luminance(made_dicom.write(tmp_path / "high.dcm", clean << 4 | 5, **shifted))
    assert np.array_equal(high, expected)


def test_without_a_window_a_robust_range_is_shown(tmp_path):
    pixels = np.linspace(300, 700, 10_000).astype(np.uint16).reshape(100, 100)
    pixels[0, :20] = 4000  # a marker
    path = made_dicom.write(tmp_path / "film.dcm", pixels, BitsStored=12, HighBit=11)
    film = read_luminance(path)
    assert film[0, 0] == 255
    assert np.ptp(film[1:].astype(int)) >= 253


def test_eight_bits_without_a_window_are_shown_as_they_are(tmp_path):
    pixels = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
    assert np.array_equal(read_luminance(made_dicom.write(tmp_path / "film.dcm", pixels)), pixels)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_left_out_of_the_range_and_black(tmp_path, kind):
    pixels = np.linspace(-900, 900, 10_000).astype(np.int16).reshape(100, 100)
    plain = read_luminance(
        made_dicom.write(tmp_path / "plain.dcm", pixels[20:], PhotometricInterpretation=kind)
    )
    pixels[:20] = np.linspace(-32768, -30000, 2000).astype(np.int16).reshape(20, 100)
    padded = read_luminance(
        made_dicom.write(
            tmp_path / "padded.dcm",
            pixels,
            PhotometricInterpretation=kind,
            PixelPaddingValue=-32768,
            PixelPaddingRangeLimit=-30000,
        )
    )
    assert (padded[:20] == 0).all()
    assert np.array_equal(padded[20:], plain)


def lut(first: int, entries: np.ndarray, bits: int) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [entries.size % 65536, first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return Sequence([item])


def test_a_voi_lut_is_taken_before_a_window_and_clamps_outside(tmp_path):
    pixels = ramp(1024)
    curve = (np.arange(512) ** 2 // 64).astype(np.uint16)  # 0 … 4080, 12 bits
    path = made_dicom.write(
        tmp_path / "film.dcm",
        pixels,
        VOILUTSequence=lut(256, curve, 12),
        WindowCenter=100,
        WindowWidth=10,
    )
    expected = np.rint(curve[np.clip(pixels.astype(int) - 256, 0, 511)] / 4095 * 255)
    assert np.array_equal(read_luminance(path), expected)


def test_a_voi_lut_that_states_too_many_bits_is_not_dark(tmp_path):
    path = made_dicom.write(
        tmp_path / "film.dcm", ramp(4096), VOILUTSequence=lut(0, np.arange(4096), 16)
    )
    assert read_luminance(path).max() == 255


@pytest.mark.parametrize("bits", [0, 8, 10])
def test_a_voi_lut_that_states_too_few_bits_does_not_wrap_around(tmp_path, bits):
    few, right = (
        read_luminance(
            made_dicom.write(
                tmp_path / "film.dcm", ramp(4096), VOILUTSequence=lut(0, np.arange(4096), stated)
            )
        )
        for stated in (bits, 12)
    )
    assert np.array_equal(few, right)


def test_a_modality_lut_comes_before_the_window(tmp_path):
    curve = np.arange(256, dtype=np.uint16)[::-1] * 10
    path = made_dicom.write(
        tmp_path / "film.dcm",
        np.tile(np.arange(256, dtype=np.uint8), (16, 1)),
        ModalityLUTSequence=lut(0, curve, 16),
        WindowCenter=1000,
        WindowWidth=500,
    )
    assert np.array_equal(read_luminance(path)[0], windowed(curve * 1.0, 1000, 500))


def test_each_frame_is_read_with_its_own_window(tmp_path):
    frames = np.stack([ramp(1024), ramp(1024)[::-1], ramp(1024)])
    groups = []
    for center in (200, 500, 800):
        window = Dataset()
        window.WindowCenter, window.WindowWidth = center, 100
        group = Dataset()
        group.FrameVOILUTSequence = Sequence([window])
        groups.append(group)
    path = made_dicom.write(
        tmp_path / "film.dcm", frames, PerFrameFunctionalGroupsSequence=Sequence(groups)
    )
    for index, center in enumerate((200, 500, 800)):
        expected = windowed(frames[index].astype(float), center, 100)
        assert np.array_equal(read_luminance(path, index), expected)
    assert refusal(path, 3) == "truncated"


# Habits


def test_nothing_of_a_header_reaches_standard_error(tmp_path):
    made = made_dicom.write(tmp_path / "film.dcm", ramp(1024), BodyPartExamined="HANDLINKS")
    # No value that a CS may have, in a charset that does not exist: pydicom warns and quotes both.
    content = made.read_bytes().replace(b"HANDLINKS", b"S\xe9CR\xe9T^na")
    made.write_bytes(content)
    script = (
        "import logging, sys; logging.basicConfig(level=0)\n"
        "from pathlib import Path\n"
        "from mura_batch.radiograph import read_luminance\n"
        "from mura_batch.study import SourceFile, peek, read_study\n"
        "for name in sys.argv[1:]:\n"
        "    path = Path(name); peek(path)\n"
        "    read_study([SourceFile(path, 'x', 'a', 1)])\n"
        "    try: read_luminance(path)\n"
        "    except Exception: pass\n"
    )
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    odd = ["badVR.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG-lossy.dcm", "SC_rgb_jpeg.dcm"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(made), *(str(folder / name) for name in odd)],
        capture_output=True,
        text=True,
        check=True,
        cwd=HERE.parent,
        env=os.environ | {"PYTHONWARNINGS": "always", "PYTHONPATH": str(HERE.parent)},
    )
    assert "CR" not in done.stderr
    assert "pydicom" not in done.stderr


def test_an_unknown_character_set_says_nothing_on_standard_error(tmp_path):
    path = made_dicom.write(tmp_path / "film.dcm", ramp(1024), StudyDescription="HANDLINKS")
    charset = b"\x08\0\x05\0CS\x0a\0ISO_IR 999"
    content = path.read_bytes().replace(b"HANDLINKS", b"S\xe9CR\xe9T^na")
    at = content.index(b"\x08\0\x16\0UI")  # the first element of the data set
    path.write_bytes(content[:at] + charset + content[at:])
    script = (
        "import sys, warnings\n"
        "from pathlib import Path\n"
        "from mura_batch.radiograph import read_luminance\n"
        "from mura_batch.study import SourceFile, peek, read_study\n"
        "path = Path(sys.argv[1])\n"
        "for action in ('default', 'always'):\n"
        "    peek(path)\n"
        "    read_study([SourceFile(path, 'x', 'a', 1)])\n"
        "    read_luminance(path)\n"
        "    warnings.simplefilter(action)  # as a library does that is imported later\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )
    assert done.stderr == ""


def test_threads_read_the_same(tmp_path):
    path = made_dicom.write(tmp_path / "film.dcm", ramp(4096), SYNTAXES["jpeg_2000"])
    expected, seen = read_luminance(path), []
    threads = [threading.Thread(target=lambda: seen.append(read_luminance(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert all(np.array_equal(film, expected) for film in seen)
