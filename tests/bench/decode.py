"""What reading a large DICOM film costs beside what it cannot do without.

    python tests/bench/decode.py [--rounds 9]

Films of 2500 × 2048 pixels in 12 bits with a window, made of a sample film with the grain of a
detector. Compressed ones are held against the bare call of the codec, uncompressed ones against one
gather from a NumPy table and one resize by Pillow. The network's input is 224 × 224, as published
weights see films, decoded in full. JPEG is written by dcmcjpeg (dcmtk) where it is installed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import libjpeg.utils
import numpy as np
import openjpeg.utils
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import get_frame
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film

ROWS, COLUMNS = 2500, 2048
SAMPLE = Path(__file__).parents[2] / "mura_batch/samples/elbow_lateral.png"
SPEC = Preprocessing()
SAYS = "{:16} read {:6.1f} ms, without it {:6.1f} ms: {:.2f} times the time"
TABLE = np.arange(1 << 16, dtype=np.uint16).astype(np.uint8)


def main() -> None:
    """Measure each kind of file in turns with what it is held against."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        plain, packed, lossless = (Path(folder) / f"{name}.dcm" for name in ("plain", "j2k", "jpg"))
        made = write(plain)
        made.compress(JPEG2000Lossless, generate_instance_uid=False)
        made.save_as(packed, enforce_file_format=True)
        tell("uncompressed", plain, lambda: gather_and_resize(plain), rounds)
        frame = one_frame(packed)
        tell(
            "JPEG 2000", packed, lambda: openjpeg.utils.decode_pixel_data(frame, version=2), rounds
        )
        if not shutil.which("dcmcjpeg"):
            click.echo("JPEG lossless: dcmcjpeg is not installed")
            return
        subprocess.run(["dcmcjpeg", "--encode-lossless-sv1", plain, lossless], check=True)
        other = one_frame(lossless)
        tell(
            "JPEG lossless",
            lossless,
            lambda: libjpeg.utils.decode_pixel_data(other, version=2),
            rounds,
        )


def tell(name: str, file: Path, bare: Callable[[], object], rounds: int) -> None:
    """Print the medians of both and their ratio."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(timed(lambda: read_film(file, 0, SPEC)))
        theirs.append(timed(bare))
    a, b = statistics.median(ours), statistics.median(theirs)
    click.echo(SAYS.format(name, 1000 * a, 1000 * b, a / b))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def gather_and_resize(file: Path) -> NDArray[np.uint8]:
    """Return what cannot be left out for an uncompressed film."""
    words = np.fromfile(
        file, "<u2", ROWS * COLUMNS, offset=file.stat().st_size - 2 * ROWS * COLUMNS
    )
    film = Image.fromarray(TABLE[words].reshape(ROWS, COLUMNS))
    return np.asarray(film.resize((SPEC.size, SPEC.size), Image.Resampling.BILINEAR))


def one_frame(file: Path) -> bytes:
    """Return the compressed pixels of a file with one frame."""
    made = pydicom.dcmread(file)
    return get_frame(made.PixelData, 0, number_of_frames=1)


def write(file: Path) -> pydicom.Dataset:
    """Write and return the film, uncompressed."""
    with Image.open(SAMPLE) as sample:
        film = np.asarray(sample.convert("L").resize((COLUMNS, ROWS), Image.Resampling.BICUBIC))
    grain = np.random.default_rng(0).normal(0, 12, film.shape)
    pixels = np.clip(film * 14.0 + 200 + grain, 0, 4095).astype("<u2")
    made = pydicom.Dataset()
    made.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    made.SOPInstanceUID, made.StudyInstanceUID, made.Modality = "2.25.1", "2.25.2", "CR"
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Rows, made.Columns = ROWS, COLUMNS
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.WindowCenter, made.WindowWidth = 2048, 3500
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW"
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.save_as(file, enforce_file_format=True)
    return made


if __name__ == "__main__":
    main()
