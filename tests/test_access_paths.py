"""How SQLite gets at rows: by an index and in their order, however many are stored."""

from __future__ import annotations

import re
from contextlib import closing, contextmanager
from datetime import timedelta

import pytest
from ledger import NOON, archived, done, finish, folder, new_result, record, take, waiting
from sqlalchemy import event

from mura_batch import database
from mura_batch.area import Area
from mura_batch.reader import sqlite_connection, sqlite_path
from mura_batch.records import FileProblem, Filters, Rerun, State
from mura_batch.store import Store

FEW = {"weights", "alembic_version", "ix_readings_not_done"}  # stay small
ALL_ROWS = "SCAN readings USING INDEX ix_readings_rows"


class Watched:
    """A store, and the plans of what it asks of SQLite."""

    def __init__(self, store, url):
        self.store = store
        self._file = sqlite_path(url)

    @contextmanager
    def plans(self):
        """Give a dict that has, in the end, each statement's plan: its steps in lines."""
        asked, plans = {}, {}

        def note(_connection, _cursor, statement, parameters, _context, many):
            asked[statement] = parameters[0] if many else parameters

        event.listen(self.store._engine, "before_cursor_execute", note)
        yield plans
        event.remove(self.store._engine, "before_cursor_execute", note)
        with closing(sqlite_connection(self._file, read_only=True)) as connection:
            for statement, values in asked.items():
                steps = connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)
                plans[statement] = "\n".join(step[3] for step in steps)


@pytest.fixture
def watched(tmp_path):
    url = f"sqlite:///{tmp_path / 'results.db'}"
    database.upgrade(url)
    with Store.open(url) as store:
        record(store, folder("hand", "a"))
        finish(store)
        yield Watched(store, url)


def scanned(plan):
    """Return the tables, or indexes, that a plan goes through from end to end."""
    steps = re.findall(r"^SCAN (\w+)(?: USING (?:COVERING )?INDEX (\w+))?", plan, re.MULTILINE)
    return {index or table for table, index in steps if FEW.isdisjoint({table, index})}


def test_no_statement_of_a_study_looks_through_a_table(watched):
    """Claim, worklist, commit, moves, retries, late images, reruns and the counts of status."""
    store = watched.store
    with watched.plans() as plans:
        store.recover(3)
        store.unsettled_custody()
        record(store, folder("wrist", "b", "c"))
        problem = FileProblem(store.study(take(store).id).files[0].sha256, "bomb", "too large")
        store.recover(3)
        study = finish(store, waiting(State.QUARANTINED), problems=(problem,))
        archived(store, study)
        record(store, folder("wrist", "b", "c", "late", hours=1))
        store.busy(NOON)
        retried = take(store)
        store.defer(retried.id, "no disk", NOON)
        late = take(store)
        store.fail(late.id, late.request, "bug", "an error", NOON)
        store.rerun(Rerun(studies=(late.id,)), Area.XR_WRIST)
        finish(store, done(Area.XR_WRIST, new_result("bb")), waiting(State.NO_WEIGHTS))
        store.requeue_no_weights([Area.XR_WRIST])
        store.resolve("wrist")
        store.events(study.id)
    assert len(plans) > 40
    looked_through = {sql: found for sql, plan in plans.items() if (found := scanned(plan))}
    assert looked_through == {}


def test_status_counts_what_is_few_and_pages_of_what_is_not(watched):
    with watched.plans() as plans:
        watched.store.counts(NOON)
        watched.store.stale({Area.XR_HAND: "bb" * 32})
    whole = [sql for sql, plan in plans.items() if scanned(plan)]
    (count,) = whole
    assert count == "SELECT (SELECT count(*) FROM studies), (SELECT count(*) FROM readings)"
    stale = next(plan for sql, plan in plans.items() if "FROM weights" in sql)
    assert "COVERING INDEX ix_readings_weights (weights=?)" in stale


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(
    ("chosen", "path"),
    [
        ({}, ALL_ROWS),
        ({"area": Area.XR_HAND}, ALL_ROWS),
        ({"decision": "positive", "area": Area.XR_HAND}, ALL_ROWS),
        ({"min_probability": 0.9, "max_probability": 0.95}, ALL_ROWS),
        ({"reason": "bomb"}, ALL_ROWS),
        ({"state": State.DONE}, ALL_ROWS),
        ({"state": State.FAILED}, "SCAN readings USING INDEX ix_readings_not_done"),
        (
            {"since": NOON, "until": NOON + timedelta(hours=1)},
            "SEARCH readings USING INDEX ix_readings_rows (received_at>? AND received_at<?)",
        ),
        ({"weights": "aa"}, "SEARCH readings USING INDEX ix_readings_weights (weights=?)"),
    ],
)
def test_a_query_walks_an_index_in_the_order_of_its_rows(watched, chosen, path, images):
    """So that it stops at its limit, and passes over what does not fit in the index alone."""
    filters = Filters(**chosen, limit=1)
    with watched.plans() as plans:
        list(watched.store.images(filters) if images else watched.store.query(filters))
    (plan,) = (plan for sql, plan in plans.items() if "readings" in sql)
    steps = [step for step in plan.splitlines() if step not in {"MERGE (UNION ALL)", "LEFT"}]
    assert steps[0] == path
    assert "TEMP B-TREE FOR ORDER BY" not in plan
    assert images or "TEMP B-TREE" not in plan
    for table in ("results", "studies"):  # looked up for the rows that the filters left
        by_key = f"SEARCH {table} USING "
        assert any(step.startswith(by_key) and step.endswith("LEFT-JOIN") for step in steps[1:])


@pytest.mark.parametrize(
    ("chosen", "index"),
    [
        ({"study": "abc"}, "sqlite_autoindex_readings_1 (study_id>? AND study_id<?)"),
        ({"state": State.QUEUED}, "ix_studies_work_rerun_received_at (work=?)"),
        ({"weights": "cc"}, "ix_readings_weights (weights>? AND weights<?)"),
    ],
)
def test_a_query_for_few_rows_finds_them_by_an_index(watched, chosen, index):
    with watched.plans() as plans:
        assert list(watched.store.query(Filters(**chosen))) == []
    (plan,) = (plan for sql, plan in plans.items() if "readings" in sql)
    assert index in plan
    assert scanned(plan) == set()
