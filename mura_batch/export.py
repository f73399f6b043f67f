"""``mura-batch export``: rows to CSV, Parquet or JSON lines, streamed and written whole."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured
from mura_batch.records import IMAGE_FIELDS, STUDY_FIELDS, Filters
from mura_batch.results import Block, Results

_GROUP = 20  # blocks of a Parquet row group
_END = "\r\n"
_FORMULA = frozenset("=+-@\t\r\n＝＋－＠")  # what a cell that is one begins with
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
    blocks = _Counted(results.blocks(filters, images=images))
    write_atomic(
        target, lambda stream: writer(blocks, IMAGE_FIELDS if images else STUDY_FIELDS, stream)
    )
    return blocks.rows


def write_csv(blocks: Iterable[Block], fields: tuple[str, ...], stream: TextIO) -> None:
    """Write rows as CSV with a header (RFC 4180); text cells are safe for spreadsheets.

    A column at a time, which is faster than a writer of rows.
    """
    stream.write(",".join(fields) + _END)
    for block in blocks:
        columns = [_cells(name, block[name]) for name in fields]
        lines = map(",".join, zip(*columns, strict=True))
        stream.write(_END.join(lines) + _END)


class _Counted:
    """Blocks, whose rows are counted as they pass."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self.rows = 0
        self._blocks = blocks

    def __iter__(self) -> Iterator[Block]:
        for block in self._blocks:
            self.rows += len(next(iter(block.values())))
            yield block


def _cells(name: str, column: Sequence[Any]) -> Sequence[str]:
    """Return a column as it stands in a CSV."""
    if name in _NUMBERS | _WHOLE_NUMBERS:
        return ["" if value is None else repr(value) for value in column]
    cells: Sequence[str] = column
    try:
        together = "".join(cells)
    except TypeError:  # some are None
        cells = [text or "" for text in column]
        together = "".join(cells)
    if name in _FREE and not _FORMULA.isdisjoint(text[:1] for text in cells):
        cells = ["'" + text if text[:1] in _FORMULA else text for text in cells]
    if _needs_quotes(together):
        quoted = {
            text: '"' + text.replace('"', '""') + '"' if _needs_quotes(text) else text
            for text in set(cells)
        }
        cells = [quoted[text] for text in cells]
    return cells


def _needs_quotes(text: str) -> bool:
    return "," in text or '"' in text or "\n" in text or "\r" in text


def _csv(blocks: Iterable[Block], fields: tuple[str, ...], stream: BinaryIO) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    write_csv(blocks, fields, text)
    text.detach()  # flushes; the stream stays open for its owner


def _json_lines(blocks: Iterable[Block], fields: tuple[str, ...], stream: BinaryIO) -> None:
    for block in blocks:
        for row in zip(*(block[name] for name in fields), strict=True):
            line = json.dumps(dict(zip(fields, row, strict=True)), ensure_ascii=False)
            stream.write(line.encode() + b"\n")


def _parquet(blocks: Iterable[Block], fields: tuple[str, ...], stream: BinaryIO) -> None:
    import pyarrow as pa  # noqa: PLC0415 - costs a fifth of a second that the others need not pay
    import pyarrow.parquet as pq  # noqa: PLC0415 - slow to import, and only this form is written by it

    types = {name: pa.int64() for name in _WHOLE_NUMBERS}
    types |= {name: pa.float64() for name in _NUMBERS}
    moments = pa.timestamp("us", tz="UTC")
    types |= dict.fromkeys(_TIMES, moments)
    kinds = [types.get(name, pa.string()) for name in fields]
    schema = pa.schema(zip(fields, kinds, strict=True))
    batches = (
        pa.record_batch(
            [
                pa.array(block[name], pa.string()).cast(kind)
                if kind == moments
                else pa.array(block[name], kind)
                for name, kind in zip(fields, kinds, strict=True)
            ],
            schema=schema,
        )
        for block in blocks
    )
    with pq.ParquetWriter(stream, schema) as writer:
        while group := list(islice(batches, _GROUP)):
            writer.write_table(pa.Table.from_batches(group))


_Writer = Callable[[Iterable[Block], tuple[str, ...], BinaryIO], None]
_WRITERS: dict[str, _Writer] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}
