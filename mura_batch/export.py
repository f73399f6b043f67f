"""``mura-batch export``: rows to CSV, Parquet or JSON lines, streamed and written whole."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured
from mura_batch.records import IMAGE_FIELDS, STUDY_FIELDS, Filters
from mura_batch.results import Results

Row = Sequence[Any]  # JSON values in the order of the fields

_GROUP = 5000  # rows of a Parquet row group: what is in memory at a time
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_FREE = {"study_uid", "accession", "source", "reason", "image", "error"}  # may hold any text
_WHOLE_NUMBERS = {"revision", "views", "views_failed"}
_NUMBERS = {"logit", "probability", "calibrated", "threshold"}
_TIMES = {"received_at", "scored_at"}


def export(
    results: Results, target: Path, filters: Filters, level: Literal["study", "image"] = "study"
) -> int:
    """Write the rows that ``filters`` choose to ``target`` and return how many.

    The ending says the format: ``.csv`` (text that a spreadsheet would take for a formula gets a
    leading apostrophe), ``.parquet``, ``.jsonl`` or ``.ndjson``. Memory does not grow with the
    number of rows; the file appears whole.

    Raises:
        Misconfigured: another ending, or no such folder.
        Transient: the database does not answer.
    """
    writer = _WRITERS.get(target.suffix.lower())
    if writer is None:
        raise Misconfigured(f"{target.name}: name a file that ends in {', '.join(_WRITERS)}.")
    if not target.absolute().parent.is_dir():
        raise Misconfigured(f"{target.absolute().parent}: no such folder; make it first.")
    images = level == "image"
    rows = _Counted(results.values(filters, images=images))
    write_atomic(
        target, lambda stream: writer(rows, IMAGE_FIELDS if images else STUDY_FIELDS, stream)
    )
    return rows.count


def write_csv(rows: Iterable[Row], fields: tuple[str, ...], stream: TextIO) -> None:
    """Write rows as CSV with a header (RFC 4180); text cells are safe for spreadsheets."""
    writer = csv.writer(stream)
    writer.writerow(fields)
    free = [place for place, name in enumerate(fields) if name in _FREE]
    writer.writerows(_safe(row, free) for row in rows)


class _Counted:
    """Rows, counted as they pass."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self.count = 0
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.count += 1
            yield row


def _safe(row: Row, free: Sequence[int]) -> Row:
    """Put an apostrophe before what a spreadsheet would take for a formula."""
    if not any(row[place] and row[place].startswith(_FORMULA) for place in free):
        return row
    cells = list(row)
    for place in free:
        if cells[place] and cells[place].startswith(_FORMULA):
            cells[place] = "'" + cells[place]
    return cells


def _csv(rows: Iterable[Row], fields: tuple[str, ...], stream: BinaryIO) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    write_csv(rows, fields, text)
    text.detach()  # flushes; the stream stays open for its owner


def _json_lines(rows: Iterable[Row], fields: tuple[str, ...], stream: BinaryIO) -> None:
    for row in rows:
        line = json.dumps(dict(zip(fields, row, strict=True)), ensure_ascii=False)
        stream.write(line.encode() + b"\n")


def _parquet(rows: Iterable[Row], fields: tuple[str, ...], stream: BinaryIO) -> None:
    import pyarrow as pa  # noqa: PLC0415 - costs a fifth of a second that the others need not pay
    import pyarrow.parquet as pq  # noqa: PLC0415 - likewise

    types = {name: pa.int64() for name in _WHOLE_NUMBERS}
    types |= {name: pa.float64() for name in _NUMBERS}
    moments = pa.timestamp("us", tz="UTC")
    types |= dict.fromkeys(_TIMES, moments)
    kinds = [types.get(name, pa.string()) for name in fields]
    schema = pa.schema(zip(fields, kinds, strict=True))
    with pq.ParquetWriter(stream, schema) as writer:
        following = iter(rows)
        while group := list(islice(following, _GROUP)):
            columns = [
                pa.array(column, pa.string()).cast(kind)
                if kind == moments
                else pa.array(column, kind)
                for column, kind in zip(zip(*group, strict=True), kinds, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


_Writer = Callable[[Iterable[Row], tuple[str, ...], BinaryIO], None]
_WRITERS: dict[str, _Writer] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}
