"""Any order of arrivals, passes, kills and reruns keeps the ledger's laws."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from ledger import (
    NOON,
    done,
    folder,
    new_result,
    outcome,
    record,
)
from sqlalchemy import delete, func, select

from mura_batch.area import Area
from mura_batch.engine import writing
from mura_batch.records import (
    Filters,
    Rerun,
    State,
    Work,
)
from mura_batch.schema import files, readings, results
from mura_batch.store import Store


class Ledger(RuleBasedStateMachine):
    """Any order of arrivals, passes, kills and reruns."""

    claims = Bundle("claims")

    def __init__(self):
        super().__init__()
        self.store = Store.open(Ledger.url)
        with writing(self.store._engine) as writer:
            for trigger in ("results", "views", "events"):
                writer.exec_driver_sql(f"DROP TRIGGER IF EXISTS {trigger}_no_delete")
            for table in reversed(results.metadata.sorted_tables):
                writer.execute(delete(table))
        self.files = {}
        self.keys = {}
        self.running = {}

    url = ""

    def teardown(self):
        self.store._engine.dispose()

    @rule(
        target=claims,
        key=st.sampled_from(["p1/hand", "p2/hand"]),
        contents=st.sets(st.sampled_from("abcd"), min_size=1, max_size=3),
        hours=st.sampled_from([0, 10, 40]),
    )
    def arrive(self, key, contents, hours):
        made = folder(key, *sorted(contents), hours=hours)
        recorded = record(self.store, made)
        assert recorded.outcome != "replayed"
        self.files |= {(made.id, f"{key}/{c}.png"): recorded.study_id for c in contents}
        return made

    @rule(made=claims)
    def replay(self, made):
        assert record(self.store, made).outcome == "replayed"

    @rule()
    def begin(self):
        for study in self.store.take(2, NOON + timedelta(days=9)):
            self.running[study.id] = study

    @rule(
        area=st.sampled_from([Area.XR_HAND, Area.XR_WRIST]), weights=st.sampled_from(["aa", "bb"])
    )
    def end(self, area, weights):
        if not self.running:
            return
        study = self.running.pop(min(self.running))
        asked = self.store.study(study.id)
        self.store.commit(outcome(study, done(area, new_result(weights))))
        key = (study.digest, area, weights)
        again = study.rerun and asked.request == study.request
        self.keys[key] = self.keys.get(key, 0) + 1 if again else max(1, self.keys.get(key, 0))
        settled = self.store.study(study.id).work is Work.SETTLED
        assert settled == (asked.request == study.request)

    @rule()
    def kill(self):
        self.running.clear()
        self.store.recover(10**6)

    @rule()
    def rerun(self):
        self.store.rerun(Rerun(filters=Filters(state=State.DONE)))

    @invariant()
    def every_file_is_recorded_once(self):
        with self.store._engine.connect() as connection:
            columns = select(files.c.claim, files.c.raw_name, files.c.study_id)
            found = [(c, os.fsdecode(n), s) for c, n, s in connection.execute(columns)]
        assert sorted(found) == sorted((*file, study) for file, study in self.files.items())

    @invariant()
    def a_key_has_a_row_for_its_first_pass_and_each_rerun(self):
        with self.store._engine.connect() as connection:
            columns = (results.c.digest, results.c.area, results.c.weights)
            counted = select(*columns, func.count()).group_by(*columns)
            found = {(d, a, w[:2]): n for d, a, w, n in connection.execute(counted)}
        assert found == self.keys

    @invariant()
    def revisions_count_up_along_what_they_supersede(self):
        named = set()
        with self.store._engine.connect() as connection:
            columns = (results.c.id, results.c.study_id, results.c.revision, results.c.supersedes)
            found = {row[0]: row for row in connection.execute(select(*columns))}
        for _, study, revision, supersedes in found.values():
            if supersedes is None:
                assert revision == 1
                continue
            assert found[supersedes][2] < revision
            assert found[supersedes][1] == study or revision > 1
            assert supersedes not in named or found[supersedes][1] != study
            named.add(supersedes)

    @invariant()
    def a_reading_says_what_its_result_says(self):
        names = ("decision", "probability", "weights")
        said, meant = ([table.c[name] for name in names] for table in (readings, results))
        joined = readings.outerjoin(results, results.c.id == readings.c.result_id)
        with self.store._engine.connect() as connection:
            for row in connection.execute(select(*said, *meant).select_from(joined)):
                assert row[:3] == row[3:]

    @invariant()
    def every_study_has_a_row(self):
        shown = {row.study for row in self.store.query()}
        assert shown == set(self.files.values())


def test_any_order_of_events_keeps_the_laws(tmp_path, sqlite_template):
    shutil.copy(sqlite_template, tmp_path / "results.db")
    Ledger.url = f"sqlite:///{tmp_path / 'results.db'}"
    run_state_machine_as_test(
        Ledger,
        settings=settings(
            max_examples=10,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
