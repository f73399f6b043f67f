"""A table of one's own.

``image, study, patient, area, label[, split, boxes, hardware, weight]``: a label, or whether there
is hardware, is 0 or 1 (or negative, positive); boxes are ``x y width height; …``, of each its
centre and its size in shares of the film's width and height.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mura_batch.area import Area
from training.dataset import Dataset, Film
from training.sources.tables import Row, gather, present, read_table

ENDINGS = (".csv", ".parquet")
_WEIGHTS = (1e-3, 1e3)
_NEEDED = ("image", "study", "patient", "area", "label")


def read(table: Path) -> Dataset:
    """Return the films of a CSV or Parquet table; images count from its folder.

    Raises:
        Misconfigured: the table cannot be read, or lacks a column.
    """
    rows = read_table(table, _NEEDED)
    films, problems = gather(rows, partial(_films, table.parent))
    return Dataset(tuple(films), tuple(problems))


def _films(folder: Path, row: Row) -> Iterator[Film]:
    area = row.need("area").upper()
    if area not in set(Area):
        raise ValueError(f"the area {row['area']!r} is none of {', '.join(Area)}")
    label, boxes = row.label("label"), row.boxes("boxes")
    if boxes and not label:
        raise ValueError("there is a box on a film with the label 0")
    yield Film(
        present(folder / row.need("image")),
        study=row.need("study"),
        patient=row.need("patient"),
        area=area,
        label=label,
        split=row["split"],
        boxes=boxes,
        hardware=row.flag("hardware"),
        weight=_weight(row),
        where=row.where,
    )


def _weight(row: Row) -> float:
    weight = row.number("weight", 1.0)
    least, most = _WEIGHTS
    if not least <= weight <= most:
        raise ValueError(f"the weight {weight:g} is not from {least:g} to {most:g}")
    return weight
