"""Exports: three formats with the same rows, safe in a spreadsheet, whole, in flat memory."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger import claim, done, finish, folder, new_result, record, sha, waiting

from mura_batch import database
from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from mura_batch.export import export, write_csv
from mura_batch.records import (
    IMAGE_FIELDS,
    STUDY_FIELDS,
    ClaimedFile,
    Filters,
    State,
    ViewOutcome,
)
from mura_batch.results import Results
from mura_batch.store import Store
from mura_batch.study import Kind


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    url = f"sqlite:///{tmp_path_factory.mktemp('export') / 'results.db'}"
    database.upgrade(url)
    with Store.open(url) as store:
        hostile = ClaimedFile("=1+1.png", sha("h"), 1, 1, 1)
        record(store, claim(Kind.FILE, "=1+1.png", (hostile,), accession='-2+3,"x"\n'))
        finish(store, waiting(State.QUARANTINED))
        record(store, folder("hand", "a", "b", hours=1))
        views = (
            ViewOutcome(sha("a"), 0, "hand/a.png", logit=-1.25, probability=0.2, overlay="o.png"),
            ViewOutcome(sha("b"), 0, "hand/b.png", error_code="truncated", error="ends early"),
        )
        finish(store, done(result=new_result(probability=0.2, views=views)))
        record(store, folder("wrist", "c", hours=2))
        finish(store, done(Area.XR_WRIST, new_result(probability=0.9)))
    with Results.open(url) as results:
        yield results


def read(file):
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "parquet", "csv"])
@pytest.mark.parametrize("level", ["study", "image"])
def test_every_format_has_the_rows_and_fields_of_query(stored, tmp_path, ending, level):
    file = tmp_path / f"out.{ending}"
    rows = stored.query() if level == "study" else stored.images()
    expected = [row.to_dict() for row in rows]
    assert export(stored, file, Filters(), level) == len(expected) == 3 + (level == "image")
    found = read(file)
    fields = list(STUDY_FIELDS if level == "study" else IMAGE_FIELDS)
    assert [list(row) for row in found] == [fields] * len(expected)
    for have, want in zip(found, expected, strict=True):
        assert same(have, want)


def same(have, want):
    """One row equals another once times, CSV's texts and its apostrophes are read back."""
    for name, wanted in want.items():
        value = have[name]
        if hasattr(value, "isoformat"):
            value = value.isoformat()
        if isinstance(value, str) and isinstance(wanted, (float, int)):
            value = type(wanted)(value)
        if isinstance(value, str) and value.startswith("'"):
            value = value[1:]
        if value != (wanted if value != "" else wanted or ""):
            return False
    return True


def test_filters_choose_and_types_are_kept(stored, tmp_path):
    file = tmp_path / "out.parquet"
    assert export(stored, file, Filters(decision="negative")) == 1
    schema = pq.read_schema(file)
    assert str(schema.field("received_at").type) == "timestamp[us, tz=UTC]"
    assert str(schema.field("probability").type) == "double"
    assert str(schema.field("views").type) == "int64"
    assert read(file)[0]["logit"] == 0.8


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_nothing_chosen_is_a_readable_empty_file(stored, tmp_path, ending):
    file = tmp_path / f"out.{ending}"
    assert export(stored, file, Filters(area=Area.XR_ELBOW)) == 0
    assert read(file) == []


def test_spreadsheets_get_no_formulas(stored, tmp_path):
    export(stored, tmp_path / "out.csv", Filters(), "image")
    row = read(tmp_path / "out.csv")[-1]
    assert row["source"] == "'=1+1.png"
    assert row["image"] == "'=1+1.png"
    assert row["accession"] == '\'-2+3,"x"\n'
    negative = read(tmp_path / "out.csv")[1]
    assert negative["logit"] == "-1.25"  # numbers stay numbers


@given(st.text())
def test_no_text_starts_a_formula(text):
    stream = io.StringIO(newline="")
    write_csv([{"source": [text], "logit": [1.5]}], ("source", "logit"), stream)
    stream.seek(0)
    _, (cell, _) = csv.reader(stream)
    assert cell[:1] not in {"=", "+", "-", "@", "\t", "\r", "\n"}
    assert cell in {text, "'" + text}


@pytest.mark.parametrize("images", [False, True])
def test_blocks_are_what_the_records_say(stored, images):
    records = stored.images() if images else stored.query()
    fields = IMAGE_FIELDS if images else STUDY_FIELDS
    (block,) = stored.blocks(images=images)
    assert tuple(block) == fields
    told = [dict(zip(fields, row, strict=True)) for row in zip(*block.values(), strict=True)]
    assert told == [record.to_dict() for record in records]
    assert len(told) >= 3


def test_another_ending_is_refused_and_nothing_written(stored, tmp_path):
    with pytest.raises(Misconfigured, match=r"\.csv, \.parquet, \.jsonl"):
        export(stored, tmp_path / "out.xlsx", Filters())
    assert list(tmp_path.iterdir()) == []


class Broken(Results):
    """Gives a block and fails."""

    def blocks(self, filters=Filters(), *, images=False):  # noqa: B008 - as the real one
        yield next(super().blocks(filters, images=images))
        raise OSError("the disk is gone")


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_an_export_that_fails_leaves_the_old_file(stored, tmp_path, ending):
    file = tmp_path / f"out.{ending}"
    file.write_text("old")
    with pytest.raises(OSError, match="disk"):
        export(Broken(stored._reader), file, Filters())
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


class Many(Results):
    """The same row again and again, as the database gives it."""

    count = 0

    def _rows(self, filters=Filters(), *, images=False):  # noqa: B008 - as the real one
        (row,) = super()._rows(filters, images=images)
        yield from (row for _ in range(self.count))


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_memory_does_not_grow_with_the_rows(stored, tmp_path, monkeypatch, ending):
    monkeypatch.setattr("mura_batch.results._BLOCK", 100)
    peaks = []
    for count in (4000, 40_000):  # enough for the collector to have come in both
        many = Many(stored._reader)
        many.count = count
        tracemalloc.start()
        assert export(many, tmp_path / f"out.{ending}", Filters(decision="negative")) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
