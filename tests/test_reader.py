"""How a database is opened for reading: which file, which errors, and what is left behind."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger import NOON, finish, folder, record

from mura_batch import database
from mura_batch.config import Settings, load
from mura_batch.engine import EngineReader, open_engine
from mura_batch.errors import Misconfigured, Transient
from mura_batch.reader import sqlite_path, sqlite_url
from mura_batch.records import Filters
from mura_batch.results import Results
from mura_batch.store import Store

OPEN_FILES = Path("/proc/self/fd")
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1)


@given(st.lists(names, min_size=1))
def test_a_files_url_leads_back_to_it(parts):
    file = Path("/", *parts)
    assert sqlite_path(sqlite_url(file)) == file


@pytest.mark.parametrize("name", ["a%20b", "a b", "q?mode=ro", "h#1", "it's", "é", "x;y&z+w"])
def test_readers_and_writers_open_the_same_file_of_any_home(tmp_path, name):
    home = tmp_path / name
    url = Settings(home=home).database_url
    database.upgrade(url)
    assert [file.name for file in home.glob("*.db")] == ["results.db"]
    with Store.open(url) as store, Results.open(url) as results:
        study = record(store, folder("hand", "a")).study_id
        assert [row.study for row in results.query()] == [study]
    assert database.check(url) == []


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_a_path_may_begin_with_two_slashes(tmp_path, slashes):
    url = f"sqlite:///{slashes}{str(tmp_path).lstrip('/')}/results.db"
    database.upgrade(url)
    with Results.open(url) as results:
        assert list(results.query()) == []


def test_urls_that_are_no_plain_file_are_refused(tmp_path):
    for url in (
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite://host/x.db",
        "sqlite:///x.db?timeout=x",
    ):
        for opened in (Results, Store):
            with pytest.raises(Misconfigured, match="sqlite:///FILE"):
                opened.open(url)
    with pytest.raises(Misconfigured, match="not UTF-8"):
        load(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")), {})


def test_both_ways_to_read_give_the_same(store, url):
    for number in range(3):
        record(store, folder(f"XR_HAND/p{number}", f"{number}", hours=number))
    finish(store)
    with Results.open(url) as one, Results(EngineReader(open_engine(url, read_only=True))) as other:
        for filters in (Filters(), Filters(history=True, since=NOON + timedelta(hours=1), limit=1)):
            assert list(one.query(filters)) == list(other.query(filters)) != []
            assert list(one.images(filters)) == list(other.images(filters)) != []
        assert one.counts(NOON) == other.counts(NOON)


def test_times_count_in_any_zone_and_naive_ones_are_refused(store):
    record(store, folder("hand", "a"))
    elsewhere = NOON.astimezone(timezone(timedelta(hours=-9)))
    assert len(list(store.query(Filters(since=elsewhere)))) == 1
    assert list(store.query(Filters(until=elsewhere))) == []
    with pytest.raises(ValueError, match="naive"):
        list(store.query(Filters(since=datetime(2026, 1, 1))))  # noqa: DTZ001 - the point
    with pytest.raises(ValueError, match="naive"):
        store.counts(datetime(2026, 1, 1))  # noqa: DTZ001 - counts refuse it too


def test_text_that_no_database_holds_matches_nothing(store):
    record(store, folder("hand", "a"))
    for text in ("\udcff", "\0", "a'b", "%", ":x"):
        assert list(store.query(Filters(reason=text))) == []
        assert list(store.query(Filters(study=text))) == []
        with pytest.raises(Misconfigured, match="No study"):
            store.resolve(text)


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="no /proc here to count open files in")
def test_a_half_read_answer_leaves_nothing_open(tmp_path):
    url = sqlite_url(tmp_path / "results.db")
    database.upgrade(url)
    with Store.open(url) as store:
        for number in range(5):
            record(store, folder(f"hand{number}", f"{number}"))
    before = set(OPEN_FILES.iterdir())
    with Results.open(url) as results:
        rows = results.query()
        next(rows)
        rows.close()
        assert set(OPEN_FILES.iterdir()) == before


def test_a_locked_database_is_said_to_be_busy(tmp_path, monkeypatch):
    monkeypatch.setattr("mura_batch.reader.BUSY_SECONDS", 0.05)
    url = sqlite_url(tmp_path / "results.db")
    database.upgrade(url)
    with closing(sqlite3.connect(tmp_path / "results.db", isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Transient, match="locked"):
            Results.open(url)
