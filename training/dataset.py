"""Labelled radiographs for training: which film, which exam, which label, which fold."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from mura_batch.errors import Misconfigured


@dataclass(frozen=True, slots=True)
class Film:
    """One labelled radiograph.

    Attributes:
        exam: films with the same exam belong to one study and one patient; no exam may
            stand on both sides of a split.
        area: ``XR_ELBOW`` …, or the region's name for films outside the upper limb.
        label: 1 where the target (a fracture) is there, else 0.
        fold: 0–4, or None for films that are only ever trained on.
    """

    path: Path
    exam: str
    area: str
    label: int
    fold: int | None


def read_fracatlas(root: Path) -> list[Film]:
    """Return the films of the FracAtlas folder: upper limb with folds, other limbs without.

    Films that show no upper limb although the data set counts them there are left out.

    Raises:
        Misconfigured: the folder is not laid out as described in its README.
    """
    films = []
    for row in _rows(root / "labels.csv"):
        if row["area"] != "NONE":
            path = root / "images" / row["image_id"]
            label = int(row["fractured"])
            films.append(Film(path, row["exam"], row["area"], label, int(row["fold"])))
    for row in _rows(root / "other.csv"):
        path = root / "other" / row["image_id"]
        films.append(Film(path, row["image_id"], row["region"], int(row["fractured"]), None))
    return films


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except FileNotFoundError as exc:
        msg = f"{table} is missing: give the folder that holds labels.csv and other.csv"
        raise Misconfigured(msg) from exc
