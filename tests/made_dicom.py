"""DICOM files made for a test around given pixels; every element can be set or left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import ExplicitVRLittleEndian

STUDY_UID = "2.25.1001"
SOP_UID = "2.25.1002"
SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "deflated": "1.2.840.10008.1.2.1.99",
    "rle": "1.2.840.10008.1.2.5",
    "jpeg_ls": "1.2.840.10008.1.2.4.80",
    "jpeg_2000": "1.2.840.10008.1.2.4.90",
}


def dataset(pixels: np.ndarray | None, **elements: Any) -> Dataset:
    """Return a radiograph's data set; an element given as None is left out."""
    made = Dataset()
    made.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    made.SOPInstanceUID = SOP_UID
    made.StudyInstanceUID = STUDY_UID
    made.Modality = "CR"
    if pixels is not None:
        bits = pixels.dtype.itemsize * 8
        colour = pixels.ndim == 3 and pixels.shape[-1] == 3
        made.SamplesPerPixel = 3 if colour else 1
        made.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        if colour:
            made.PlanarConfiguration = 0
        made.Rows, made.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
        if pixels.ndim == 3 and not colour:
            made.NumberOfFrames = len(pixels)
        made.BitsAllocated = made.BitsStored = bits
        made.HighBit = bits - 1
        made.PixelRepresentation = int(pixels.dtype.kind == "i")
        raw = pixels.tobytes()
        made.PixelData = raw + b"\0" * (len(raw) % 2)
        made["PixelData"].VR = "OW" if bits > 8 else "OB"
    for keyword, value in elements.items():
        if value is None:
            delattr(made, keyword)
        else:
            setattr(made, keyword, value)
    return made


def write(
    path: Path,
    pixels: np.ndarray | None,
    syntax: str = ExplicitVRLittleEndian,
    **elements: Any,
) -> Path:
    """Write a DICOM file of ``pixels``, compressed or swapped as ``syntax`` asks."""
    made = dataset(pixels, **elements)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = "2.25.1002"
    if syntax in {"1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80"}:
        made.compress(syntax, generate_instance_uid=False)
    made.file_meta.TransferSyntaxUID = syntax
    dcmwrite(path, made, enforce_file_format=True)
    return path


def windowed(value: np.ndarray, center: float, width: float) -> np.ndarray:
    """The pseudocode of PS3.3 C.11.2.1.2.1, line by line."""
    shown = np.empty(value.shape)
    for at, x in np.ndenumerate(value):
        if x <= center - 0.5 - (width - 1) / 2:
            shown[at] = 0
        elif x > center - 0.5 + (width - 1) / 2:
            shown[at] = 255
        else:
            shown[at] = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
    return np.rint(shown)
