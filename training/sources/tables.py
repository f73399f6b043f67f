"""CSV and Parquet tables as rows of text that know their file and line."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from mura_batch.errors import Misconfigured
from training.dataset import Film, Problem, Region

_LABELS = {"0": 0, "0.0": 0, "negative": 0, "1": 1, "1.0": 1, "positive": 1}


@dataclass(frozen=True, slots=True)
class Row:
    """One row; a column that is absent reads as empty text."""

    where: str
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells.get(column, "")

    def need(self, column: str) -> str:
        """Return what may not be empty; ValueError."""
        if not self[column]:
            raise ValueError(f"the column {column} is empty")
        return self[column]

    def label(self, column: str) -> int:
        """Return 0 or 1; ValueError."""
        if (found := _LABELS.get(self[column].lower())) is None:
            raise ValueError(f"the {column} {self[column]!r} is neither 0 nor 1")
        return found

    def flag(self, column: str) -> bool | None:
        """Return a yes or no, None where nothing is said; ValueError."""
        return None if self[column] == "" else bool(self.label(column))

    def number(self, column: str, default: float) -> float:
        """Return a number, the default where nothing is said; ValueError."""
        try:
            return float(self[column] or default)
        except ValueError as exc:
            raise ValueError(f"the {column} {self[column]!r} is no number") from exc

    def boxes(self, column: str) -> tuple[Region, ...]:
        """Return boxes; ValueError."""
        return Region.parse(self[column])


def gather(
    rows: Iterable[Row], films_of: Callable[[Row], Iterable[Film]]
) -> tuple[list[Film], list[Problem]]:
    """Return the films that rows stand for; a ValueError of one is a problem at its place."""
    films: list[Film] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            films += tuple(films_of(row))
        except ValueError as exc:
            problems.append(Problem(row.where, str(exc)))
    return films, problems


def present(path: Path) -> Path:
    """Return a file's path; ValueError where there is none."""
    try:
        there = path.is_file()
    except OSError as exc:
        raise ValueError(f"{path}: {exc.strerror}") from exc
    if not there:
        raise ValueError(f"{path} is not there")
    return path


def read_table(file: Path, needed: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of a CSV or, by its ending, a Parquet file.

    Raises:
        Misconfigured: it cannot be read, or lacks a needed column.
    """
    rows = _parquet(file) if file.suffix.lower() == ".parquet" else _csv(file)
    first = next(rows, None)
    if first is None:
        raise Misconfigured(f"{file} has no rows.")
    if missing := [column for column in needed if column not in first.cells]:
        raise Misconfigured(f"{file} lacks the columns {', '.join(missing)}.")
    yield first
    yield from rows


def _csv(file: Path) -> Iterator[Row]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream, restval="")
            names = [name.strip() for name in table.fieldnames or () if name.strip()]
            if twice := {name for name in names if names.count(name) > 1}:
                raise Misconfigured(f"{file} has the columns {', '.join(sorted(twice))} twice.")
            for cells in table:
                named = {(k or "").strip(): (v or "").strip() for k, v in cells.items() if k}
                yield Row(f"{file}:{table.line_num}", named)
    except OSError as exc:
        raise Misconfigured(f"{file}: {exc.strerror}") from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise Misconfigured(f"{file} is no CSV in UTF-8 ({exc}): save it as such.") from exc


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa  # noqa: PLC0415 - a fifth of a second that a CSV need not wait for
    import pyarrow.parquet as pq  # noqa: PLC0415 - needed for Parquet alone, like pyarrow

    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as exc:
        raise Misconfigured(f"{file} is no readable Parquet file ({exc}).") from exc
    for number, cells in enumerate(table.to_pylist(), start=1):
        named = {key.strip(): _text(value) for key, value in cells.items()}
        yield Row(f"{file} row {number}", named)


def _text(value: object) -> str:
    """Return a cell as a CSV would have it: a whole number without its point, nothing for NaN."""
    number = float(value) if isinstance(value, (bool, float, Decimal)) else None
    if value is None or (number is not None and math.isnan(number)):
        return ""
    if number is not None and number.is_integer():
        return str(int(number))
    return str(value).strip()
