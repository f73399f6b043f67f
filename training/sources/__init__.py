"""What people have, read into a :class:`training.dataset.Dataset`.

MURA as published (``mura``), FracAtlas as described beside it (``fracatlas``), a table of one's
own (``manifest``), a folder of DICOM with a CSV of labels (``dicom``), a site's stored labels
(``site``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mura_batch.errors import Misconfigured
from training.dataset import Dataset
from training.sources import dicom, fracatlas, manifest, mura, site


def read(data: Path, labels: Path | None = None) -> Dataset:
    """Return the labelled films of ``data``, which says by its looks what it is.

    Args:
        data: a manifest (``.csv``, ``.parquet``), the folder of MURA or of FracAtlas, a folder of
            DICOM files, or a site's home with the labels that people stored.
        labels: the CSV of labels of a folder of DICOM files.

    Raises:
        Misconfigured: it is none of these.
    """
    return replace(_read(data, labels), source=str(data))


def is_known(folder: Path) -> bool:
    """Whether a folder says by its looks where its labels are."""
    return any(kind.is_one(folder) for kind in (mura, fracatlas, site))


def _read(data: Path, labels: Path | None) -> Dataset:
    if labels is not None:
        return dicom.read(data, labels)
    if data.suffix.lower() in manifest.ENDINGS:
        return manifest.read(data)
    if not data.is_dir():
        raise Misconfigured(f"{data}: no such folder, and no .csv or .parquet table.")
    if mura.is_one(data):
        return mura.read(data)
    if fracatlas.is_one(data):
        return fracatlas.read(data)
    if site.is_one(data):
        return site.read(data)
    raise Misconfigured(
        f"{data} is no MURA tree (train/XR_…), no FracAtlas folder (labels.csv, other.csv) and no"
        " home (results.db). For a folder of DICOM files name their labels with --labels; for"
        " anything else write a manifest."
    )
