"""Hostile files: each ends in a refusal with its code, never in another error or in much memory."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import made_dicom
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate, generate_frames

from mura_batch import untrusted
from mura_batch.errors import Transient, UnreadableImage
from mura_batch.radiograph import read_luminance
from mura_batch.study import SourceFile, peek, read_study

DATA = Path(__file__).parent / "data"
SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
FILM = np.arange(4096, dtype=np.uint16).reshape(64, 64)
NOISE = zlib.compress(np.random.default_rng(5).bytes(400_000))
EXPLICIT = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
JPEG_LS = "1.2.840.10008.1.2.4.80"
RLE = "1.2.840.10008.1.2.5"


def png(
    width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 0
) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (header, *chunks, (b"IEND", b""))
    )


def film_png() -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in FILM.astype(np.uint8))
    return png(64, 64, (b"IDAT", zlib.compress(rows)))


def jpeg_claiming(width: int, height: int) -> bytes:
    content = bytearray((DATA / "hand_grey.jpg").read_bytes())
    at = next(
        i for i in range(len(content)) if bytes(content[i : i + 2]) in {b"\xff\xc0", b"\xff\xc2"}
    )
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def dicom(folder: Path, syntax: str = EXPLICIT, **elements: object) -> bytes:
    return made_dicom.write(folder / "made", FILM, syntax, **elements).read_bytes()


def without_syntax(folder: Path) -> bytes:
    content = dicom(folder, JPEG_2000)
    start = content.index(b"\x02\x00\x10\x00UI")
    return content[:start] + content[start + 8 + content[start + 6] :]


def with_syntax(content: bytes, old: str, new: str) -> bytes:
    before, after = (
        b"UI" + struct.pack("<H", len(uid) + len(uid) % 2) + uid.encode() + b"\0" * (len(uid) % 2)
        for uid in (old, new)
    )
    assert content.count(before) == 1
    return content.replace(before, after)


def nested(depth: int) -> bytes:
    """Sequences of undefined length in one another, none of them closed."""
    start = b"\x08\x00\x18\x22SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
    return b"\0" * 128 + b"DICM" + meta + start * depth


def deflate_bomb(folder: Path, frames: int = 1, rows: int = 8000, columns: int = 6000) -> bytes:
    """A header that claims more than a deflate stream of 64 MiB of zeros holds."""
    content = renamed_size(dicom(folder, NumberOfFrames=frames), rows, columns)
    start = content.index(b"\x08\x00\x16\x00UI")
    meta = with_syntax(content[:start], EXPLICIT, DEFLATED)
    length = content.index(b"\xe0\x7f\x10\x00OW") + 8
    body = content[start:length] + struct.pack("<I", 0xFFFFFFFE) + content[length + 4 :]
    engine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = (engine.compress(b"\0" * (1 << 24)) for _ in range(4))
    return meta + engine.compress(body) + b"".join(zeros) + engine.flush()


def damaged_deflate(folder: Path) -> bytes:
    """Deflated pixels that are damaged further in than the header is searched for."""
    noise = np.random.default_rng(4).integers(0, 65536, (3000, 3000), np.uint16)
    content = bytearray(made_dicom.write(folder / "made", noise, DEFLATED).read_bytes())
    content[-100_000:-50_000] = b"\xff" * 50_000
    return bytes(content)


def items_without_end() -> bytes:
    start = b"\x40\x00\x75\x02SQ\0\0\xff\xff\xff\xff"
    meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
    return b"\0" * 128 + b"DICM" + meta + start + b"\xfe\xff\x00\xe0\0\0\0\0" * 1_500_000


def renamed_size(content: bytes, rows: int, columns: int) -> bytes:
    rows_at = content.index(b"\x28\x00\x10\x00US\x02\x00") + 8
    columns_at = content.index(b"\x28\x00\x11\x00US\x02\x00") + 8
    changed = bytearray(content)
    changed[rows_at : rows_at + 2] = struct.pack("<H", rows)
    changed[columns_at : columns_at + 2] = struct.pack("<H", columns)
    return bytes(changed)


def j2k_claiming(folder: Path, size: int) -> bytes:
    content = dicom(folder, JPEG_2000)
    at = content.index(b"\xff\x4f\xff\x51") + 8
    return content[:at] + struct.pack(">II", size, size) + content[at + 8 :]


def endless_jp2(folder: Path) -> bytes:
    """A JP2 box of length 0 before the code stream: a parser that trusts it stands still."""
    content = dicom(folder, JPEG_2000)
    at = content.index(b"\xff\x4f\xff\x51")
    boxes = b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\0" * 8
    return content[:at] + boxes + content[at + len(boxes) :]


def indexed(folder: Path, dtype: type) -> bytes:
    """Pixels of ``dtype`` that are indices into a palette of 256 colours."""
    palette: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = bytes(512)
    return made_dicom.write(folder / "made", FILM.astype(dtype), **palette).read_bytes()


def run_lengths(folder: Path, packed_bytes: int) -> bytes:
    """An RLE frame of 64 x 64 bytes whose one segment expands to 64 times ``packed_bytes``."""
    segment = b"\x81\x2a" * (packed_bytes // 2)
    packed = struct.pack("<16I", 1, 64, *(0,) * 14) + segment
    made = made_dicom.write(folder / "made", FILM.astype(np.uint8), RLE)
    content = pydicom.dcmread(made)
    content.PixelData = encapsulate([packed])
    content.save_as(made)
    return made.read_bytes()


HOSTILE: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "zero bytes": ("empty", lambda _: b""),
    "one byte": ("not_an_image", lambda _: b"\x89"),
    "a text called png": ("not_an_image", lambda _: b"the hand of the patient\n" * 20),
    "a gif": ("not_an_image", lambda _: b"GIF89a" + b"\0" * 300),
    "cut-off png": ("truncated", lambda _: film_png()[:-90]),
    "cut-off jpeg": ("truncated", lambda _: (DATA / "cut_off.jpg").read_bytes()),
    "half a jpeg": ("truncated", lambda _: (DATA / "hand_grey.jpg").read_bytes()[:5000]),
    "png header alone": ("corrupt", lambda _: film_png()[:12]),
    "jpeg header alone": ("corrupt", lambda _: b"\xff\xd8\xff\xe0"),
    "png with a broken checksum": ("corrupt", lambda _: film_png().replace(b"IDAT", b"IDAS")),
    "png bomb": ("too_large", lambda _: png(60000, 60000, (b"IDAT", zlib.compress(b"\0" * 9)))),
    "png bomb below the limit": (
        "too_large",
        lambda _: png(13000, 13000, (b"IDAT", zlib.compress(b"\0" * 13001 * 130, 9))),
    ),
    "png of more samples than any film": (
        "too_large",
        lambda _: png(13300, 13300, (b"IDAT", NOISE), depth=16, colour=6),
    ),
    "png whose palette takes more than any film": (
        "too_large",
        lambda _: png(13300, 13300, (b"PLTE", bytes(3)), (b"IDAT", NOISE), colour=3),
    ),
    "png of one line": (
        "shape",
        lambda _: png(100_000, 1, (b"IDAT", zlib.compress(bytes(100_001)))),
    ),
    "png of one column": (
        "shape",
        lambda _: png(1, 100_000, (b"IDAT", zlib.compress(bytes(200_000)))),
    ),
    "jpeg of a few lines": ("shape", lambda _: jpeg_claiming(60000, 8)),
    "dicom of one line": ("shape", lambda folder: renamed_size(dicom(folder), 1, 4096)),
    "png without pixels": ("corrupt", lambda _: png(0, 64)),
    "png text bomb": (
        "corrupt",
        lambda _: png(64, 64, (b"zTXt", b"k\0\0" + zlib.compress(b"\0" * (1 << 26), 9))),
    ),
    "png international text bomb": (
        "corrupt",
        lambda _: png(64, 64, (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"\0" * (1 << 26), 9))),
    ),
    "jpeg bomb": ("too_large", lambda _: jpeg_claiming(65000, 65000)),
    "dicom without pixels": (
        "no_pixels",
        lambda folder: made_dicom.write(folder / "made", None).read_bytes(),
    ),
    "a structured report": ("no_pixels", lambda _: (SAMPLES / "test-SR.dcm").read_bytes()),
    "dicom preamble alone": ("no_pixels", lambda _: b"\0" * 128 + b"DICM"),
    "cut-off dicom": ("truncated", lambda folder: dicom(folder)[:-4000]),
    "cut-off dicom header": ("no_pixels", lambda folder: dicom(folder)[:420]),
    "cut-off jpeg 2000 frame": ("truncated", lambda folder: dicom(folder, JPEG_2000)[:-40]),
    "cut-off deflated": ("truncated", lambda folder: dicom(folder, DEFLATED)[:-1000]),
    "compressed without transfer syntax": ("transfer_syntax", without_syntax),
    "unknown transfer syntax": (
        "transfer_syntax",
        lambda folder: with_syntax(dicom(folder), EXPLICIT, "1.2.3.4.5"),
    ),
    "compressed syntax, plain pixels": (
        "transfer_syntax",
        lambda folder: with_syntax(dicom(folder, RLE), RLE, "1.2.840.10008.1.2"),
    ),
    "another codec's syntax": (
        "transfer_syntax",
        lambda folder: with_syntax(dicom(folder, JPEG_2000), JPEG_2000, JPEG_LS),
    ),
    "a video": (
        "transfer_syntax",
        lambda folder: with_syntax(dicom(folder, JPEG_2000), JPEG_2000, "1.2.840.10008.1.2.4.102"),
    ),
    "claimed four gigabytes": (
        "too_large",
        lambda folder: renamed_size(dicom(folder), 65535, 65535),
    ),
    "claimed a hundred megapixels": (
        "too_large",
        lambda folder: renamed_size(dicom(folder), 10000, 10000),
    ),
    "claimed more than is there": (
        "truncated",
        lambda folder: renamed_size(dicom(folder), 5000, 5000),
    ),
    "rle of little for much": (
        "corrupt",
        lambda folder: renamed_size(dicom(folder, RLE), 6000, 6000),
    ),
    "no rows": ("corrupt", lambda folder: renamed_size(dicom(folder), 0, 64)),
    "code stream larger than its header": ("corrupt", lambda folder: j2k_claiming(folder, 60000)),
    "endless jp2 box": ("truncated", endless_jp2),
    "nested sequences": ("too_deep", lambda _: nested(5000)),
    "items without end": ("corrupt", lambda _: items_without_end()),
    "damaged deflate": ("corrupt", damaged_deflate),
    "deflate bomb": ("truncated", deflate_bomb),
    "deflated frames out of next to nothing": (
        "too_large",
        lambda folder: deflate_bomb(folder, 1000, 1000, 1000),
    ),
    "deflated frames without end": (
        "too_large",
        lambda folder: deflate_bomb(folder, 1000, 1000, 1000) + NOISE * 6,
    ),
    "deflated frames, tiny and without end": (
        "too_large",
        lambda folder: deflate_bomb(folder, 100_000, 100, 100) + NOISE * 6,
    ),
    "words of 32 bits by the million": (
        "too_large",
        lambda folder: renamed_size(
            made_dicom.write(folder / "made", FILM.astype(np.uint32)).read_bytes(), 6000, 6000
        ),
    ),
    "floating point pixels": (
        "unsupported_pixels",
        lambda folder: dicom(folder).replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x08\x00OF"),
    ),
    "bits that cannot be": (
        "unsupported_pixels",
        lambda folder: dicom(folder, BitsStored=40, HighBit=39),
    ),
    "a palette of four billion colours": (
        "unsupported_pixels",
        lambda folder: indexed(folder, np.uint32),
    ),
    "run lengths of more than any frame": (
        "too_large",
        lambda folder: run_lengths(folder, 4_000_000),
    ),
    "a rescale beyond all numbers": (
        "corrupt",
        lambda folder: dicom(folder, RescaleSlope="1e307", RescaleIntercept="0"),
    ),
    "a rescale as wide as all numbers": (
        "corrupt",
        lambda folder: dicom(folder, RescaleSlope="8e304", RescaleIntercept="-1.7e308"),
    ),
    "no photometric interpretation": (
        "unsupported_pixels",
        lambda folder: dicom(folder, PhotometricInterpretation=None),
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_its_code(tmp_path, case):
    code, make = HOSTILE[case]
    path = tmp_path / "hand.png"
    path.write_bytes(make(tmp_path))
    started = time.process_time()
    peek(path)
    study = read_study([SourceFile(path, path.name, "0" * 64, 1)])
    assert study.views
    with pytest.raises(UnreadableImage) as caught:
        read_luminance(path)
    assert caught.value.code == code
    assert time.process_time() - started < 5
    if study.views[0].problem is not None:
        assert study.views[0].problem.code == code


def test_hostile_files_take_little_memory(tmp_path):
    names = []
    for number, (_, make) in enumerate(HOSTILE.values()):
        names.append(tmp_path / f"{number}.png")
        names[-1].write_bytes(make(tmp_path))
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from mura_batch.errors import Transient, UnreadableImage\n"
        "from mura_batch.radiograph import read_luminance\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "for name in sys.argv[1:]:\n"
        "    try: read_luminance(Path(name))\n"
        "    except UnreadableImage: pass\n"
        "    else: raise SystemExit(name + ' was read')\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, names)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert int(done.stdout) < 300
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("width", "height", "pixel_bytes"),
    [
        (10_000, 10_000, 2),
        (14_000, 14_000, 2),
        (8_600, 7_100, 6),  # 14 x 17 inches at 50 µm in 16-bit colour
        (7_100, 18_300, 3),  # 14 x 36 inches
        (2_000, 40_000, 1),
    ],
)
def test_the_largest_films_are_within_the_limits(width, height, pixel_bytes):
    payload = width * height * pixel_bytes // 200
    untrusted.check_size(width, height, payload, pixel_bytes=pixel_bytes)
    untrusted.check_size(height, width, payload, pixel_bytes=pixel_bytes)


def test_honest_deflated_frames_are_within_the_limits():
    untrusted.check_size(3000, 2500, 100_000_000, pixel_bytes=2, frames=30)


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail where Python objects and arrays take more than 16 MB at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_run_lengths_are_not_expanded_beyond_the_last_pixel(tmp_path):
    path = tmp_path / "film"
    path.write_bytes(run_lengths(tmp_path, 1_000_000))
    with little_memory():
        film = read_luminance(path)
    assert film.shape == (64, 64)
    assert (film == 0x2A).all()


@pytest.mark.parametrize("fragments", [1, 8])
@pytest.mark.parametrize("frames", [1, 2])
def test_fragments_larger_than_a_frame_are_refused_unread(tmp_path, fragments, frames):
    path = tmp_path / "film"
    content = dicom(tmp_path, JPEG_2000, NumberOfFrames=1)
    assert content.count(b"(\0\x08\0IS\x02\x001 ") == 1
    content = content.replace(b"(\0\x08\0IS\x02\x001 ", b"(\0\x08\0IS\x02\x00%d " % frames)
    start = content.index(b"\xe0\x7f\x10\x00OB") + 12
    length = (1 << 28) // fragments
    with path.open("wb") as film:
        film.write(content[:start] + b"\xfe\xff\x00\xe0\0\0\0\0")
        for _ in range(fragments):
            film.write(b"\xfe\xff\x00\xe0" + struct.pack("<I", length))
            film.seek(length, os.SEEK_CUR)  # a hole: no room on the disk
        film.write(b"\xfe\xff\xdd\xe0\0\0\0\0")
    with little_memory(), pytest.raises(UnreadableImage) as caught:
        read_luminance(path)
    assert caught.value.code == "too_large"


def test_dicom_without_preamble_or_transfer_syntax_is_read(tmp_path):
    whole = tmp_path / "whole"
    whole.write_bytes(dicom(tmp_path))
    expected = read_luminance(whole)
    content = whole.read_bytes()
    bare = tmp_path / "bare"
    bare.write_bytes(content[132:])
    assert np.array_equal(read_luminance(bare), expected)
    bare.write_bytes(content[content.index(b"\x08\x00\x16\x00UI") :])
    assert np.array_equal(read_luminance(bare), expected)
    # An implicit data set behind a header that says explicit: what is there is read.
    implicit = dicom(tmp_path, "1.2.840.10008.1.2")
    bare.write_bytes(with_syntax(implicit, "1.2.840.10008.1.2", EXPLICIT))
    assert np.array_equal(read_luminance(bare), expected)


@pytest.mark.parametrize(
    "uid", ["../../etc/passwd", "/etc/passwd", "..", "1.2\n3", "1.2\0/x", "", " ", "1" * 200]
)
def test_path_tricks_in_uids_are_no_uids(tmp_path, uid):
    content = dicom(tmp_path)
    raw = uid.encode() + b"\0" * (len(uid) % 2)
    for plain in (made_dicom.STUDY_UID, made_dicom.SOP_UID):
        old = struct.pack("<H", 10) + plain.encode() + b"\0"
        content = content.replace(b"UI" + old, b"UI" + struct.pack("<H", len(raw)) + raw)
    path = tmp_path / "film"
    path.write_bytes(content)
    assert peek(path).study_uid is None
    study = read_study([SourceFile(path, "film", "0" * 64, 1)])
    assert study.study_uid is None
    assert study.views[0].sop_instance_uid is None
    assert read_luminance(path).shape == (64, 64)


@pytest.mark.parametrize(
    "name", [b"a\nb.png", b"\"quo'te.png", b"x" * 251 + b".png", b"\xff\xfe hand.png", b"-rf.png"]
)
def test_odd_names_are_read_like_any_other(tmp_path, name):
    path = Path(str(tmp_path)) / name.decode("utf-8", "surrogateescape")
    path.write_bytes(film_png())
    digest = hashlib.sha256(film_png()).hexdigest()
    study = read_study([SourceFile(path, path.name, digest, 1)])
    assert study.views[0].problem is None
    assert peek(path).kind == "raster"
    assert np.array_equal(read_luminance(path), FILM.astype(np.uint8))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, code in ((tmp_path / "gone.png", "unreadable"), (tmp_path, "unreadable")):
        with pytest.raises(UnreadableImage) as caught:
            read_luminance(path)
        assert caught.value.code == code


def test_a_disk_that_fails_is_no_broken_image():
    broken = Path("/proc/self/mem")  # opens like a file, and reading it is an input/output error
    if not broken.exists():
        pytest.skip("this system has no file whose reading fails")
    with pytest.raises(Transient):
        read_luminance(broken)
    assert peek(broken).kind == "other"


class Failing(io.BufferedReader):
    """A file on a disk that fails once, when it has been read ``good`` times."""

    def __init__(self, raw: io.FileIO, good: int) -> None:
        super().__init__(raw)
        self.left = good

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("fragments", [1, 3])
def test_a_disk_that_fails_between_fragments_is_no_broken_image(tmp_path, monkeypatch, fragments):
    path = made_dicom.write(tmp_path / "film", FILM, JPEG_2000)
    made = pydicom.dcmread(path)
    (packed,) = generate_frames(made.PixelData, number_of_frames=1)
    made.PixelData = encapsulate([packed], fragments_per_frame=fragments, has_bot=False)
    made.save_as(path)
    expected = read_luminance(path)
    failed = 0
    while True:
        film = Failing(io.FileIO(path), failed)
        monkeypatch.setattr(untrusted, "open", lambda *_, film=film, **__: film, raising=False)
        try:
            shown = read_luminance(path)
        except Transient:
            failed += 1
            continue
        break
    assert np.array_equal(shown, expected)
    assert film.left >= 0  # every read there is has failed once
    assert failed > 4 * fragments


SEEDS: list[bytes] = []


def seeds(folder: Path) -> list[bytes]:
    if not SEEDS:
        SEEDS.extend([film_png(), (DATA / "hand_grey.jpg").read_bytes()])
        SEEDS.extend(dicom(folder, s) for s in (EXPLICIT, DEFLATED, RLE, JPEG_LS))
        SEEDS.extend([dicom(folder, JPEG_2000), (SAMPLES / "JPGExtended.dcm").read_bytes()])
    return SEEDS


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_files_are_read_or_refused(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(seeds(tmp_path))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(len(content), 3000) - 1))
        content[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.none(), st.integers(1, len(content))))
    path = tmp_path / "film"
    path.write_bytes(content[:end])
    peek(path)
    for view in read_study([SourceFile(path, "film", "0" * 64, 1)]).views[:2]:
        try:
            film = read_luminance(path, view.frame)
        except UnreadableImage:
            continue
        assert film.dtype == np.uint8
        assert film.ndim == 2
