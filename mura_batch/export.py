"""``mura-batch export``: rows to CSV, Parquet or JSON lines, streamed and written whole."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured
from mura_batch.records import IMAGE_FIELDS, STUDY_FIELDS, Filters, ImageRow, Json, StudyRow
from mura_batch.results import Results

_GROUP = 5000  # rows of a Parquet row group: what is in memory at a time
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
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
    fields = STUDY_FIELDS if level == "study" else IMAGE_FIELDS
    rows = _Counted(results.query(filters) if level == "study" else results.images(filters))
    write_atomic(target, lambda stream: writer(rows, fields, stream))
    return rows.count


def write_csv(rows: Iterable[Mapping[str, Any]], fields: tuple[str, ...], stream: TextIO) -> None:
    """Write rows as CSV with a header (RFC 4180); text cells are safe for spreadsheets."""
    writer = csv.writer(stream)
    writer.writerow(fields)
    writer.writerows([_cell(row[name]) for name in fields] for row in rows)


class _Counted:
    """Rows as JSON values, counted as they pass."""

    def __init__(self, rows: Iterator[StudyRow] | Iterator[ImageRow]) -> None:
        self.count = 0
        self._rows = rows

    def __iter__(self) -> Iterator[Json]:
        for row in self._rows:
            self.count += 1
            yield row.to_dict()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return value


def _csv(rows: Iterable[Json], fields: tuple[str, ...], stream: BinaryIO) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    write_csv(rows, fields, text)
    text.detach()  # flushes; the stream stays open for its owner


def _json_lines(rows: Iterable[Json], fields: tuple[str, ...], stream: BinaryIO) -> None:
    for row in rows:
        line = json.dumps({name: row[name] for name in fields}, ensure_ascii=False)
        stream.write(line.encode() + b"\n")


def _parquet(rows: Iterable[Json], fields: tuple[str, ...], stream: BinaryIO) -> None:
    import pyarrow as pa  # noqa: PLC0415 - costs a fifth of a second that the others need not pay
    import pyarrow.parquet as pq  # noqa: PLC0415 - likewise

    types = {name: pa.int64() for name in _WHOLE_NUMBERS}
    types |= {name: pa.float64() for name in _NUMBERS}
    types |= {name: pa.timestamp("us", tz="UTC") for name in _TIMES}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in fields])
    with pq.ParquetWriter(stream, schema) as writer:
        following = iter(rows)
        while group := list(islice(following, _GROUP)):
            for row in group:
                row |= {name: row[name] and datetime.fromisoformat(row[name]) for name in _TIMES}
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


_Writer = Callable[[Iterable[Json], tuple[str, ...], BinaryIO], None]
_WRITERS: dict[str, _Writer] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}
