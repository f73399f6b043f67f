"""A table of one's own.

``image, study, patient, area, label[, split, boxes, hardware, weight]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mura_batch.area import Area
from training.dataset import Dataset, Film
from training.sources.tables import Row, gather, present, read_table

ENDINGS = (".csv", ".parquet")
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
    yield Film(
        present(folder / row.need("image")),
        study=row.need("study"),
        patient=row.need("patient"),
        area=area,
        label=row.label("label"),
        split=row["split"],
        boxes=row.boxes("boxes"),
        hardware=row.flag("hardware"),
        weight=_weight(row["weight"]),
        where=row.where,
    )


def _weight(text: str) -> float:
    weight = float(text or 1)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"the weight {text!r} is not above 0")
    return weight
