"""MURA v1.1 as Stanford publishes it.

``MURA-v1.1/{train,valid}/XR_AREA/patientNNNNN/studyN_{positive|negative}/imageK.png`` beside
``{train,valid}_image_paths.csv`` and ``{train,valid}_labeled_studies.csv``. What its tables list is
what it holds; without them the tree itself is read. Source: P. Rajpurkar et al., "MURA: Large
Dataset for Abnormality Detection in Musculoskeletal Radiographs", MIDL 2018.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from training.dataset import Dataset, Film, Problem
from training.sources.tables import Row, gather, present

_SPLITS = ("train", "valid")
_FOLDER = re.compile(r"(?P<study>study\d+)_(?P<label>positive|negative)")
_PATIENT = re.compile(r"patient\d+")

# Studies without and with an abnormality, as in table 1 of the paper; images as the tables of the
# published archive list them.
PUBLISHED_STUDIES: dict[str, dict[str, tuple[int, int]]] = {
    "train": {
        "XR_ELBOW": (1094, 660),
        "XR_FINGER": (1280, 655),
        "XR_FOREARM": (590, 287),
        "XR_HAND": (1497, 521),
        "XR_HUMERUS": (321, 271),
        "XR_SHOULDER": (1364, 1457),
        "XR_WRIST": (2134, 1326),
    },
    "valid": {
        "XR_ELBOW": (92, 66),
        "XR_FINGER": (92, 83),
        "XR_FOREARM": (69, 64),
        "XR_HAND": (101, 66),
        "XR_HUMERUS": (68, 67),
        "XR_SHOULDER": (99, 95),
        "XR_WRIST": (140, 97),
    },
}
PUBLISHED_IMAGES: dict[str, dict[str, int]] = {
    "train": {
        "XR_ELBOW": 4931,
        "XR_FINGER": 5106,
        "XR_FOREARM": 1825,
        "XR_HAND": 5543,
        "XR_HUMERUS": 1272,
        "XR_SHOULDER": 8379,
        "XR_WRIST": 9752,
    },
    "valid": {
        "XR_ELBOW": 465,
        "XR_FINGER": 461,
        "XR_FOREARM": 301,
        "XR_HAND": 460,
        "XR_HUMERUS": 288,
        "XR_SHOULDER": 563,
        "XR_WRIST": 659,
    },
}


def is_one(folder: Path) -> bool:
    """Say whether a folder looks like MURA, or like what holds ``MURA-v1.1``."""
    return any(next((_root(folder) / split).glob("XR_*"), None) for split in _SPLITS)


def read(folder: Path) -> Dataset:
    """Return MURA's films, of both splits or of the one that is there."""
    root = _root(folder)
    films: list[Film] = []
    problems: list[Problem] = []
    for split in _SPLITS:
        if (root / split).is_dir():
            labels = _study_labels(root, split, problems)
            found, wrong = gather(_images(root, split), partial(_films, root / split, labels))
            films += found
            problems += wrong
            problems += _left_out(root, split, labels, found)
    return Dataset(tuple(films), tuple(problems))


def _root(folder: Path) -> Path:
    inner = folder / "MURA-v1.1"
    return inner if inner.is_dir() else folder


def _films(split: Path, labels: dict[str, tuple[int, str]], row: Row) -> Iterator[Film]:
    """Return the film at ``XR_AREA/patientNNNNN/studyN_…/imageK.png``; ValueError."""
    inside = row["path"]
    parts = inside.split("/")
    named = _FOLDER.fullmatch(parts[2]) if len(parts) == 4 else None  # noqa: PLR2004 - see above
    if named is None or not _PATIENT.fullmatch(parts[1]):
        raise ValueError(f"{inside} is no path of MURA")
    if parts[0] not in set(Area):
        raise ValueError(f"{parts[0]} is none of {', '.join(Area)}")
    of_folder = int(named["label"] == "positive")
    stated, at = labels.get("/".join(parts[:3]), (of_folder, row.where))
    if stated != of_folder:
        raise ValueError(f"{inside} has the label {stated} at {at}")
    yield Film(
        present(split / inside),
        study=f"{parts[0]}/{parts[1]}/{named['study']}",
        patient=parts[1],
        area=parts[0],
        label=of_folder,
        split=split.name,
        where=row.where,
    )


def _images(root: Path, split: str) -> Iterator[Row]:
    """Yield a row an image, with its path from the area's folder on."""
    table = root / f"{split}_image_paths.csv"
    if table.is_file():
        yield from _lines(table, split)
        return
    folder = root / split
    for path in sorted(folder.glob("*/*/*/*.png")):
        if not path.name.startswith("."):
            yield Row(str(path), {"path": path.relative_to(folder).as_posix()})


def _left_out(
    root: Path, split: str, labels: dict[str, tuple[int, str]], films: list[Film]
) -> Iterator[Problem]:
    """Yield labelled studies without an image, and how many images no table lists."""
    with_images = {str(film.path.parent.relative_to(root / split)) for film in films}
    for study, (_, where) in labels.items():
        if study not in with_images:
            yield Problem(where, f"{study} has no image")
    table = root / f"{split}_image_paths.csv"
    if table.is_file():
        listed = {film.path for film in films}
        more = sum(
            path not in listed and not path.name.startswith(".")
            for path in (root / split).glob("*/*/*/*.png")
        )
        if more:
            yield Problem(str(table), f"{more} images of the tree are not listed, or not usable")


def _study_labels(root: Path, split: str, problems: list[Problem]) -> dict[str, tuple[int, str]]:
    """Return each study folder's label and where it stands."""
    found: dict[str, tuple[int, str]] = {}

    def note(row: Row) -> tuple[()]:
        stated = row.label("label")
        before, at = found.setdefault(row["path"], (stated, row.where))
        if before != stated:
            raise ValueError(f"{row['path']} has the label {before} at {at} and {stated} here")
        return ()

    table = root / f"{split}_labeled_studies.csv"
    if table.is_file():
        problems += gather(_lines(table, split), note)[1]
    return found


def _lines(table: Path, split: str) -> Iterator[Row]:
    """Yield a table's paths, from the area's folder on, and labels; a header names no path."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            for cells in reader:
                if cells and ("/" in cells[0] or reader.line_num > 1):
                    path, stated = (*(cell.strip() for cell in cells), "")[:2]
                    inside = path.rstrip("/").rpartition(f"{split}/")[2]
                    yield Row(f"{table}:{reader.line_num}", {"path": inside, "label": stated})
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise Misconfigured(f"{table} cannot be read ({exc}).") from exc
