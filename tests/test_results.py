"""Reading: rows, images, counts, and what a reader may not do."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
from ledger import (
    NOON,
    done,
    finish,
    folder,
    new_result,
    record,
    sha,
    waiting,
)
from sqlalchemy import update

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from mura_batch.records import (
    FileProblem,
    Filters,
    State,
    ViewOutcome,
)
from mura_batch.results import Results
from mura_batch.schema import studies
from mura_batch.store import Store


def rows(store, **filters):
    return list(store.query(Filters(**filters)))


FIELDS = ["study", "digest", "revision", "state", "area", "area_source", "logit", "probability"]
FIELDS += ["calibrated", "decision", "threshold", "operating_point", "target", "views"]
FIELDS += ["views_failed", "weights", "study_uid", "accession", "source", "received_at"]
FIELDS += ["scored_at", "reason", "notice"]


def test_a_row_has_the_promised_fields_in_their_order(store):
    record(store, folder("hand", "a"))
    finish(store)
    row = rows(store)[0].to_dict()
    assert list(row) == FIELDS
    assert row["received_at"] == "2026-11-20T12:00:00+00:00"
    assert row["notice"] == "research use only, not a medical device"
    assert row["area_source"] == "folder"
    (image,) = store.images()
    added = ["image", "overlay", "error"]
    assert list(image.to_dict()) == FIELDS + added


@pytest.fixture(scope="module")
def filled(new_url):
    """a: hand, 0.9, weights aa; b: wrist, 0.2, weights bb, a bad view; c: bad; d: queued."""
    with Store.open(new_url()) as store:
        for hours, name in enumerate("abcd"):
            record(store, folder(name, name, f"{name}2", hours=hours))
        finish(store, done(result=new_result(probability=0.9)))
        seen = (
            ViewOutcome(sha("b"), 0, "b/b.png", logit=-1.4, probability=0.2, overlay="o/1.png"),
            ViewOutcome(sha("b2"), 0, "b/b2.png", error_code="truncated", error="it ends early"),
        )
        finish(store, done(Area.XR_WRIST, new_result("bb", 0.2, seen)))
        problem = FileProblem(sha("c"), "bomb", "too many pixels")
        finish(store, waiting(State.QUARANTINED, None, "bomb"), problems=(problem,))
        yield store


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "dcba"),
        ({"limit": 2}, "dc"),
        ({"area": Area.XR_HAND}, "a"),
        ({"state": State.DONE}, "ba"),
        ({"state": State.QUEUED}, "d"),
        ({"state": State.QUARANTINED}, "c"),
        ({"decision": "positive"}, "a"),
        ({"since": NOON + timedelta(hours=1)}, "dcb"),
        ({"until": NOON + timedelta(hours=1)}, "a"),
        ({"min_probability": 0.2}, "ba"),
        ({"max_probability": 0.5}, "b"),
        ({"min_probability": 0.21, "max_probability": 0.89}, ""),
        ({"weights": "bb"}, "b"),
        ({"weights": "%"}, ""),
        ({"reason": "bomb"}, "c"),
        ({"study": "nothing"}, ""),
        ({"history": True, "state": State.DONE}, "ba"),
    ],
)
def test_every_filter_chooses(filled, filters, expected):
    assert "".join(row.source for row in filled.query(Filters(**filters))) == expected


def test_images_have_a_row_a_view_and_a_row_a_file_where_nothing_was_scored(filled):
    def images(**filters):
        return [(i.image, i.probability, i.error) for i in filled.images(Filters(**filters))]

    assert images(area=Area.XR_WRIST) == [
        ("b/b.png", 0.2, None),
        ("b/b2.png", None, "truncated: it ends early"),
    ]
    assert images(state=State.QUARANTINED) == [
        ("c/c.png", None, "bomb: too many pixels"),
        ("c/c2.png", None, None),
    ]
    assert images(reason="truncated") == [("b/b2.png", None, "truncated: it ends early")]
    assert images(max_probability=0.5) == [("b/b.png", 0.2, None)]
    assert len(images(history=True)) == 7
    (view,) = filled.images(Filters(max_probability=0.5))
    assert view.study.views_failed == 1
    assert view.to_dict()["overlay"] == "o/1.png"


def test_counts_are_those_of_status(filled):
    counts = filled.counts(NOON)
    assert dict(counts.states) == {State.DONE: 2, State.QUARANTINED: 1, State.QUEUED: 1}
    assert (counts.studies, counts.queued, counts.running) == (4, 1, 0)
    assert counts.oldest == NOON + timedelta(hours=3)
    assert (counts.results, counts.views) == (2, 3)
    assert counts.last_scored_at == NOON + timedelta(hours=1)
    assert filled.counts(NOON + timedelta(hours=2)).results == 0


def test_readers_do_not_wait_for_a_writer(store, url):
    record(store, folder("hand", "a"))
    with Results.open(url) as reader, store._write() as writer:
        writer.execute(update(studies).values(accession="unfinished"))
        assert [row.accession for row in reader.query()] == [None]


def test_a_reader_cannot_write(url):
    change = "DELETE FROM files" if url.startswith("sqlite") else "SELECT 1 FROM files FOR UPDATE"
    with (
        Results.open(url) as reader,
        pytest.raises(Exception, match="read.?only|cannot execute"),
        reader._reader.reading() as ask,
    ):
        list(ask(change, {}))


def test_what_is_missing_or_no_database_says_what_to_do(tmp_path):
    missing = f"sqlite:///{tmp_path / 'none.db'}"
    (tmp_path / "text.db").write_text("this is no database, whatever its name says" * 99)
    for opened in (Results, Store):
        with pytest.raises(Misconfigured, match="mura-batch db upgrade"):
            opened.open(missing)
        with pytest.raises(Misconfigured, match="not a database"):
            opened.open(f"sqlite:///{tmp_path / 'text.db'}")
        with pytest.raises(Misconfigured, match="sqlite:///FILE or postgresql"):
            opened.open("mysql://u:secret@h/db")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(Misconfigured, match="cannot be opened") as refused:
        Results.open("postgresql://u:secret@/db?host=/nowhere")
    assert "secret" not in str(refused.value)


def test_reading_imports_nothing_heavy():
    script = "import sys, mura_batch.results; print(*sys.modules, sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "numpy", "pandas", "pyarrow", "alembic", "pydicom", "sqlalchemy", "PIL"}
    assert heavy & set(found.stdout.split()) == set()
