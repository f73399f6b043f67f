"""FracAtlas, upper limb with exams, areas and folds, other limbs for pretraining.

``labels.csv`` with ``images/`` and ``other.csv`` with ``other/``. Source: I. Abedeen et al.,
"FracAtlas", Scientific Data 10, 521 (2023), CC BY 4.0. Labels are of films: an exam's view may
show the fracture that another does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mura_batch.area import Area
from training.dataset import Dataset, Film, Problem
from training.sources.tables import Row, gather, present, read_table

_TABLES = ("labels.csv", "other.csv")
_NO_LIMB = "NONE"  # the area of films that show no upper limb


def is_one(folder: Path) -> bool:
    """Say whether a folder is laid out as FracAtlas is here."""
    return all((folder / name).is_file() for name in _TABLES)


def read(folder: Path) -> Dataset:
    """Return the films; those that show no upper limb although they are listed as such are left
    out, those of other limbs are in no split.
    """
    films: list[Film] = []
    problems: list[Problem] = []
    for name, films_of in zip(_TABLES, (_upper_limb, _other), strict=True):
        rows = read_table(folder / name, ("image_id", "fractured"))
        found, wrong = gather(rows, partial(films_of, folder))
        films += [film for film in found if film.area != _NO_LIMB]
        problems += wrong
    return Dataset(tuple(films), tuple(problems), target="fracture", labels_of="film")


def _upper_limb(folder: Path, row: Row) -> Iterator[Film]:
    area = row.need("area")
    if area not in {*Area, _NO_LIMB}:
        raise ValueError(f"the area {area!r} is none of {', '.join(Area)}, {_NO_LIMB}")
    seen = [flag for flag in (row.flag("cast"), row.flag("hardware")) if flag is not None]
    yield Film(
        present(folder / "images" / row.need("image_id")),
        study=row.need("exam"),
        patient=row["exam"],
        area=area,
        label=row.label("fractured"),
        split=row["fold"],
        also=tuple(filter(None, row["also"].split(";"))),
        views=_views(row),
        boxes=row.boxes("boxes"),
        hardware=any(seen) if seen else None,
        where=row.where,
    )


def _other(folder: Path, row: Row) -> Iterator[Film]:
    name = row.need("image_id")
    yield Film(
        present(folder / "other" / name),
        study=name,
        patient=name,
        area=row.need("region"),
        label=row.label("fractured"),
        views=_views(row),
        boxes=row.boxes("boxes"),
        hardware=row.flag("hardware"),
        where=row.where,
    )


def _views(row: Row) -> tuple[str, ...]:
    return tuple(view for view in ("frontal", "lateral", "oblique") if row.flag(view))
