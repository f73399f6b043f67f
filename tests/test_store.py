"""The ledger on both databases: identity, revisions, replay, the queue."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger import (
    NOON,
    archived,
    claim,
    dicom,
    done,
    finish,
    folder,
    loose,
    new_result,
    outcome,
    record,
    sha,
    take,
    waiting,
)
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import DatabaseError

from mura_batch import database
from mura_batch.area import Area
from mura_batch.engine import writing
from mura_batch.errors import Misconfigured
from mura_batch.records import (
    ClaimedFile,
    FileProblem,
    Filters,
    Move,
    Place,
    Rerun,
    State,
    Work,
)
from mura_batch.schema import events, results, views
from mura_batch.store import Store
from mura_batch.study import Kind, content_digest


def rows(store, **filters):
    return list(store.query(Filters(**filters)))


_examples = itertools.count(1)


# ---- which study a claim belongs to


def test_a_claim_is_recorded_once_however_often_it_comes(store):
    made = folder("p1/hand", "a", "b")
    first = record(store, made)
    again = record(store, made)
    assert first.outcome == "new"
    assert (again.study_id, again.outcome) == (first.study_id, "replayed")
    assert len(store.study(first.study_id).files) == 2
    assert len(first.study_id) == 12


def test_the_same_contents_are_no_new_work_under_any_path(store):
    first = record(store, folder("p1/hand", "a", "b"))
    finish(store)
    again = record(store, folder("elsewhere", "b", "a", hours=900))
    assert (again.study_id, again.outcome) == (first.study_id, "duplicate")
    assert store.study(first.study_id).work is Work.SETTLED
    assert {f.place for f in store.study(first.study_id).files} == {Place.WORK}


@pytest.mark.parametrize(
    ("key", "contents", "hours", "outcome"),
    [
        ("p1/study1_negative", ("b",), 23, "late"),  # the label is no part of the path
        ("p1/study1_positive", ("b",), 25, "new"),  # too late, and nothing in common
        ("p1/study1_positive", ("a", "b"), 25, "late"),  # a content in common
        ("p2/study1_positive", ("a", "b"), 1, "new"),  # another folder
    ],
)
def test_a_folder_that_comes_back_adds_to_its_study(store, key, contents, hours, outcome):
    first = record(store, folder("p1/study1_positive", "a"))
    finish(store)
    second = record(store, folder(key, *contents, hours=hours))
    assert second.outcome == outcome
    assert (second.study_id == first.study_id) == (outcome == "late")
    study = store.study(second.study_id)
    assert study.work is Work.QUEUED
    assert study.digest == content_digest({f.sha256 for f in study.files})


def test_late_hours_count_from_the_last_arrival(store):
    first = record(store, folder("p1/hand", "a"))
    record(store, folder("p1/hand", "b", hours=20))
    third = record(store, folder("p1/hand", "c", hours=40))
    assert (third.study_id, third.outcome) == (first.study_id, "late")


def test_loose_files_of_one_name_are_studies_of_their_own(store):
    first = record(store, loose("hand.png", "a"))
    second = record(store, loose("hand.png", "b", hours=1))
    assert second.outcome == "new"
    assert second.study_id != first.study_id


def test_dicom_belongs_to_its_study_uid_at_any_time(store):
    first = record(store, dicom("1.2.3", "a"))
    assert record(store, dicom("1.2.4", "b")).outcome == "new"
    late = record(store, dicom("1.2.3", "c", hours=9_000))
    same = record(store, dicom("1.2.3", "a", hours=9_001))
    assert (late.study_id, late.outcome) == (first.study_id, "late")
    assert (same.study_id, same.outcome) == (first.study_id, "duplicate")
    row = rows(store, study=first.study_id)[0]
    assert (row.study_uid, row.accession, row.source) == ("1.2.3", "A1", "dump/a.dcm")


def test_claims_of_one_study_that_are_recorded_together_find_each_other(store):
    made = [
        folder("p1/hand", "a"),
        dicom("1.2.3", "x"),
        folder("p1/hand", "b", hours=1),  # late images of the first
        dicom("1.2.3", "y"),
        folder("elsewhere", "a", "b", hours=900),  # what the first study is by now
        loose("x.dcm", "c"),
        loose("c.png", "c"),
    ]
    made.append(made[0])
    recorded = store.record(made, late_hours=24)
    hand, uid, *_, single, _, _ = (one.study_id for one in recorded)
    assert [(one.study_id, one.outcome, one.request) for one in recorded] == [
        (hand, "new", 1),
        (uid, "new", 1),
        (hand, "late", 2),
        (uid, "late", 2),
        (hand, "duplicate", 2),
        (single, "new", 1),
        (single, "duplicate", 1),
        (hand, "replayed", 2),
    ]
    assert [len(study.files) for study in store.studies([hand, uid, single])] == [4, 2, 2]
    assert [event.what for event in store.events(hand)] == ["new", "late", "duplicate"]


claims_of_a_group = st.lists(
    st.tuples(
        st.sampled_from(["folder", "left", "dicom", "loose"]),
        st.sampled_from(["p1", "p2"]),
        st.sets(st.sampled_from("abc"), min_size=1, max_size=2),
        st.sampled_from([0, 10, 40]),
        st.booleans(),
    ),
    min_size=2,
    max_size=8,
)


def test_claims_recorded_together_become_what_they_become_one_by_one(new_url):
    with Store.open(new_url()) as together, Store.open(new_url()) as apart:

        @settings(max_examples=40, deadline=None)
        @given(drawn=claims_of_a_group)
        def compared(drawn):
            example = f"example{next(_examples)}"

            def arrived(kind, key, contents, hours):
                named = [f"{example}{content}" for content in sorted(contents)]
                if kind == "dicom":
                    return dicom(f"{example}.{key}", *named, hours=hours)
                if kind == "loose":
                    return loose(f"{example}{key}.png", named[0], hours=hours)
                place = Place.INBOX if kind == "left" else Place.WORK
                made = folder(f"{example}/{key}", *named, hours=hours, place=place)
                files = (dataclasses.replace(made.files[0], name=f"{example}/{key}/same.png"),)
                return dataclasses.replace(made, files=files + made.files[1:])

            made = [arrived(*which) for *which, _ in drawn]
            made += [one for one, (*_, again) in zip(made, drawn, strict=True) if again]
            recorded = together.record(made, late_hours=24)
            assert recorded == [record(apart, one) for one in made]
            ids = [one.study_id for one in recorded]
            assert together.studies(ids) == apart.studies(ids)
            logged = [[(e.what, e.detail) for e in s.events(ids[-1])] for s in (together, apart)]
            assert logged[0] == logged[1]

        compared()


def test_an_id_is_longer_only_where_its_beginning_is_another_studys(store, monkeypatch):
    monkeypatch.setattr("mura_batch.intake._ID_DIGITS", 1)
    made = [loose(f"{number}.png", str(number)) for number in range(20)]
    ids = [one.study_id for one in store.record(made, late_hours=24)]
    assert len(set(ids)) == 20
    assert sorted({len(study) for study in ids})[:2] == [1, 2]


def test_a_label_in_a_path_is_never_shown(store):
    record(store, folder("XR_HAND/p1/study1_positive", "a"))
    finish(store, waiting(State.NEEDS_AREA))
    (row,) = rows(store)
    (image,) = store.images()
    assert row.source == "XR_HAND/p1/study1_*"
    assert "positive" not in str(row.to_dict()) + str(image.to_dict())
    assert store.study(row.study).files[0].name == "XR_HAND/p1/study1_positive/a.png"


def test_hostile_names_times_and_texts_are_kept(store):
    raw = os.fsdecode(b"hand/\xff\xfe\n'\"; DROP TABLE studies;--.png")
    file = ClaimedFile(raw, sha("a"), 2**62, 2**64, 2**64 - 1)
    made = claim(Kind.FOLDER, os.fsdecode(b"hand\xff"), (file,), accession="A\0\udcff")
    study = store.study(record(store, made).study_id)
    assert study.files[0].name == raw
    assert study.files[0].size == 2**62
    assert study.accession == "A\\x00\\udcff"


# ---- revisions


def test_the_same_key_is_the_same_row(store):
    record(store, folder("hand", "a"))
    study = take(store)
    for _ in range(3):  # a commit that is replayed
        store.commit(outcome(study, done()))
    (row,) = rows(store, history=True)
    assert (row.revision, row.state) == (1, "done")
    assert store.study(study.id).scored == {("XR_HAND", "aa" * 32): 1}
    store.commit(outcome(study, done(result=1)))
    assert len(rows(store, history=True)) == 1


def test_studies_are_committed_together_or_not_at_all(store):
    for name in "abc":
        record(store, folder(name, name))
    first, second, third = (take(store) for _ in range(3))
    unknown = dataclasses.replace(outcome(third, done()), study_id="unknown")
    with pytest.raises(Misconfigured, match="unknown"):
        store.commit(outcome(first, done()), unknown)
    assert {row.state for row in rows(store)} == {"running"}
    late = folder("b", "more")
    record(store, late)  # while the second study is under way
    stored = store.commit(
        outcome(first, done()),
        outcome(second, done(Area.XR_WRIST), waiting(State.NO_WEIGHTS, Area.XR_HAND)),
        outcome(third, waiting(State.QUARANTINED, code="truncated")),
    )
    assert stored == store.studies([first.id, second.id, third.id])
    assert [len(study.files) for study in stored] == [1, 2, 1]
    found = {(row.source, row.area): row.state for row in rows(store)}
    assert found == {
        ("a", "XR_HAND"): "done",
        ("b", "XR_WRIST"): "queued",  # for its late image
        ("b", "XR_HAND"): "queued",
        ("c", None): "quarantined",
    }


def test_rerun_alone_makes_a_new_row_of_a_key(store):
    record(store, folder("hand", "a"))
    study = finish(store)
    assert store.rerun(Rerun(studies=(study.id[:5],))) == [study.id]
    finish(store)
    new, old = rows(store, history=True)
    assert [new.revision, old.revision] == [2, 1]
    assert new.digest == old.digest
    assert new.weights == old.weights
    assert store.study(study.id).scored == {("XR_HAND", "aa" * 32): 2}
    assert store.study(study.id).rerun is False


def test_what_has_no_result_now_comes_before_what_it_had(store):
    record(store, folder("hand", "a"))
    study = finish(store)
    for found in (waiting(State.NEEDS_AREA), waiting(State.NO_WEIGHTS, Area.XR_HAND)):
        store.rerun(Rerun(studies=(study.id,)))
        finish(store, found)
    told = [(row.state, row.revision) for row in rows(store, history=True)]
    assert told == [("no_weights", None), ("done", 1)]


def supersession(store):
    """(area, revision) of each result → of the one it supersedes."""
    older = results.alias()
    joined = results.outerjoin(older, older.c.id == results.c.supersedes)
    columns = (results.c.area, results.c.revision, older.c.area, older.c.revision)
    with store._engine.connect() as connection:
        found = connection.execute(select(*columns).select_from(joined)).all()
    return {(row[0], row[1]): (row[2], row[3]) if row[2] else None for row in found}


def test_late_image_new_weights_and_other_area_make_the_next_revision(store):
    record(store, folder("hand", "a"))
    study = finish(store)
    record(store, folder("hand", "b", hours=1))
    late = finish(store)
    assert late.digest != study.digest
    store.rerun(Rerun(stale={Area.XR_HAND: "bb" * 32}))
    finish(store, done(result=new_result("bb")))
    store.rerun(Rerun(studies=(study.id,)), Area.XR_WRIST)
    finish(store, done(Area.XR_WRIST, new_result("bb")))
    assert supersession(store) == {
        ("XR_HAND", 1): None,
        ("XR_HAND", 2): ("XR_HAND", 1),
        ("XR_HAND", 3): ("XR_HAND", 2),
        ("XR_WRIST", 4): ("XR_HAND", 3),
    }
    (row,) = rows(store)
    assert (row.area, row.revision) == ("XR_WRIST", 4)
    assert [r.revision for r in rows(store, history=True)] == [3, 2, 1, 4]


def test_an_area_that_comes_back_supersedes_the_one_that_replaced_it(store):
    record(store, folder("hand", "a"))
    study = finish(store)
    for area in (Area.XR_WRIST, Area.XR_HAND):
        store.rerun(Rerun(studies=(study.id,)), area)
        finish(store, done(area))
    assert supersession(store)["XR_HAND", 3] == ("XR_WRIST", 2)


def test_a_study_of_two_areas_has_a_row_for_each(store):
    record(store, dicom("1.2.3", "a", "b"))
    finish(store, done(Area.XR_HAND), done(Area.XR_WRIST))
    assert [(r.area, r.revision) for r in rows(store)] == [("XR_HAND", 1), ("XR_WRIST", 1)]
    assert rows(store, area=Area.XR_WRIST)[0].study == rows(store, area=Area.XR_HAND)[0].study


def test_a_study_that_got_another_ones_old_contents_shares_its_row(store):
    first = record(store, folder("hand", "a"))
    finish(store)
    record(store, folder("hand", "b", hours=1))
    finish(store)
    second = record(store, folder("other", "a", hours=2))
    assert second.outcome == "new"
    finish(store)
    assert len(supersession(store)) == 2
    record(store, folder("other", "c", hours=3))
    finish(store)
    assert rows(store, study=second.study_id)[0].revision == 2
    assert rows(store, study=first.study_id)[0].revision == 2


@pytest.mark.parametrize("table", [results, views, events])
def test_history_cannot_be_changed(store, table):
    record(store, folder("hand", "a"))
    finish(store)
    for statement in (update(table).values(id=99), delete(table)):
        with pytest.raises(DatabaseError, match="append-only"), writing(store._engine) as writer:
            writer.execute(statement)


# ---- the queue, and what a kill leaves


def test_what_was_running_is_queued_again_after_a_kill(store):
    record(store, folder("hand", "a"))
    study = take(store)
    assert store.take(5, NOON + timedelta(days=1)) == []
    assert store.busy(NOON)
    assert store.recover(5) == 1
    assert take(store) == dataclasses.replace(study, attempts=1)


def test_what_was_cut_off_is_taken_after_all_else_and_alone(store):
    cut_off = [record(store, folder(key, key, hours=-1)).study_id for key in "ab"]
    cut_off.sort()
    assert len(store.take(5, NOON)) == 2
    assert store.recover(5) == 2
    others = [record(store, folder(key, key)).study_id for key in "cd"]
    taken = store.take(5, NOON, idle=False)
    assert {study.id for study in taken} == set(others)
    assert store.take(5, NOON, idle=False) == []
    for expected in cut_off:
        (study,) = store.take(5, NOON)
        assert (study.id, study.attempts) == (expected, 1)
        store.commit(outcome(study, done()))
    assert store.take(5, NOON) == []


def test_a_study_that_was_alone_whenever_the_program_was_killed_fails(store):
    killer, patient = (record(store, folder(key, key)).study_id for key in "ab")
    store.take(5, NOON)
    store.recover(3)
    kills = 0
    while taken := store.take(5, NOON):
        (study,) = taken
        if study.id == killer:
            kills += 1
            store.recover(3)
        else:
            store.commit(outcome(study, done()))
    assert kills == 2
    assert [row.study for row in rows(store, state=State.DONE)] == [patient]
    (row,) = rows(store, state=State.FAILED, reason="interrupted")
    assert (row.study, "ended 3 times" in row.reason) == (killer, True)
    store.rerun(Rerun(failed=True))
    assert take(store).attempts == 0


def test_new_studies_are_taken_before_reruns_and_older_before_newer(store):
    old = record(store, folder("a", "a")).study_id
    finish(store)
    store.rerun(Rerun(studies=(old,)))
    second = record(store, folder("b", "b", hours=3)).study_id
    first = record(store, folder("c", "c", hours=2)).study_id
    assert [s.id for s in store.take(9, NOON + timedelta(days=1))] == [first, second, old]


def test_a_late_image_during_the_pass_keeps_the_result_and_queues_again(store):
    record(store, folder("hand", "a"))
    study = take(store)
    late = record(store, folder("hand", "b", hours=1))
    assert (late.study_id, late.outcome) == (study.id, "late")
    assert store.take(5, NOON + timedelta(days=1)) == []  # it is being worked on
    store.commit(outcome(study, done()))
    again = take(store)
    assert len(again.files) == 2
    store.commit(outcome(again, done()))
    assert not store.busy(NOON + timedelta(days=1))
    assert [r.revision for r in rows(store, history=True)] == [2, 1]


def test_a_rerun_during_the_pass_is_not_lost(store):
    record(store, folder("hand", "a"))
    study = take(store)
    store.rerun(Rerun(studies=(study.id,)))
    store.commit(outcome(study, done()))
    again = take(store)
    assert again.rerun
    store.commit(outcome(again, done()))
    assert [r.revision for r in rows(store, history=True)] == [2, 1]


def test_a_failing_study_waits_is_given_up_and_can_be_rerun(store):
    record(store, folder("hand", "a"))
    study = take(store)
    later = NOON + timedelta(minutes=5)
    assert store.defer(study.id, "disk full", later) == 1
    assert store.take(1, NOON) == []
    assert rows(store, state=State.QUEUED)[0].reason == "disk full"
    (again,) = store.take(1, later)
    assert again.attempts == 1
    store.fail(again.id, again.request, "attempts_exhausted", "disk full", NOON)
    (row,) = rows(store, state=State.FAILED, reason="attempts_exhausted")
    assert row.reason == "attempts_exhausted: disk full"
    assert store.rerun(Rerun(failed=True)) == [study.id]
    assert finish(store).attempts == 0


def test_studies_that_wait_for_weights_are_queued_when_they_come(store):
    for name in "ab":
        record(store, folder(name, name))
    finish(store, waiting(State.NO_WEIGHTS, Area.XR_HAND))
    finish(store, waiting(State.NO_WEIGHTS, Area.XR_WRIST))
    assert store.unsettled_custody() == []
    assert store.requeue_no_weights([Area.XR_HAND, Area.XR_ELBOW]) == 1
    assert take(store).key == "a"


def test_settled_studies_whose_files_were_not_moved_are_found(store):
    for name in "abc":
        record(store, folder(name, name))
    moved = finish(store)
    archived(store, moved)
    left = finish(store)
    finish(store, waiting(State.NEEDS_AREA))
    assert [study.id for study in store.unsettled_custody()] == [left.id]


def test_files_move_by_name_and_keep_their_problems(store):
    record(store, folder("hand", "good", "bad"))
    problem = FileProblem(sha("bad"), "truncated", "the file ends early")
    study = finish(store, problems=(problem,))
    (only,) = {file.claim for file in study.files}
    bad = Move(only, Place.QUARANTINE, ("hand/bad.png",))
    good = Move(only, Place.ARCHIVE, ("hand/good.png",))
    for _ in range(2):  # replayed
        store.moved(bad, good)
    store.moved()
    places = {f.name: (f.place, f.problem) for f in store.study(study.id).files}
    assert places == {
        "hand/good.png": (Place.ARCHIVE, ""),
        "hand/bad.png": (Place.QUARANTINE, "truncated: the file ends early"),
    }


def test_a_kill_at_any_moment_leaves_a_whole_database(store, url):
    """Real processes write and are killed with SIGKILL; what they said was done, is done."""
    script = Path(__file__).with_name("store_writer.py")
    done_before = 0
    for turn in range(2):
        writer = subprocess.Popen(
            [sys.executable, script, url, str(turn)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(4 + 3 * turn):
            assert writer.stdout.readline()
        time.sleep(0.01 * turn)
        writer.send_signal(signal.SIGKILL)
        said = writer.stdout.read().count("\n") + 4 + 3 * turn
        writer.stdout.close()
        writer.wait()
        assert database.check(url) == []
        store.recover(5)
        made = len(rows(store, state=State.DONE))
        assert said <= made - done_before <= said + 1
        done_before = made
        while store.take(1, NOON + timedelta(days=99)):
            pass
    with store._engine.connect() as connection:
        lone = (
            select(func.count()).select_from(results.outerjoin(views)).where(views.c.id.is_(None))
        )
        assert connection.execute(lone).scalar() == 0


def test_many_threads_and_processes_write_one_after_the_other(store, url):
    def work(name):
        with Store.open(url) as other:
            for number in range(5):
                record(other, folder(f"{name}{number}", f"{name}{number}"))
                record(store, folder(f"{name}{number}", f"{name}{number}"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts(NOON).queued == 15
    assert sum(len(s.files) for s in store.take(99, NOON)) == 30


# ---- a person's area


def test_a_persons_area_is_for_the_undecided_views_first_then_for_all(store):
    record(store, dicom("1.2.3", "a", "b"))
    study = finish(store, done(Area.XR_HAND), waiting(State.NEEDS_AREA, None, "conflict"))
    store.rerun(Rerun(filters=Filters(state=State.NEEDS_AREA)), Area.XR_WRIST)
    asked = store.study(study.id)
    assert (asked.set_area, asked.set_all) == (Area.XR_WRIST, False)
    finish(store, done(Area.XR_HAND), done(Area.XR_WRIST))
    record(store, dicom("1.2.3", "c"))
    assert (late := take(store)).set_area is Area.XR_WRIST
    assert not late.set_all
    store.rerun(Rerun(studies=(study.id,)), Area.XR_ELBOW)
    asked = store.study(study.id)
    assert (asked.set_area, asked.set_all) == (Area.XR_ELBOW, True)


# ---- archive = "leave"


def test_files_left_in_the_inbox_are_known_until_they_change(store, url):
    record(store, folder("hand", "a", place=Place.INBOX))
    assert store.seen("hand/a.png", 10, 1_000, 7)
    assert not store.seen("hand/a.png", 10, 1_001, 7)
    assert not store.seen("hand/b.png", 10, 1_000, 7)
    with Store.open(url) as later:
        assert later.seen("hand/a.png", 10, 1_000, 7)


def test_content_that_was_replaced_in_the_inbox_is_no_part_of_the_study_any_more(store):
    first = record(store, folder("hand", "a", "b", place=Place.INBOX))
    file = ClaimedFile("hand/a.png", sha("new"), 11, 2_000, 7)
    changed = claim(Kind.FOLDER, "hand", (file,), hours=1, place=Place.INBOX)
    assert record(store, changed).outcome == "late"
    study = store.study(first.study_id)
    assert {f.sha256 for f in study.files} == {sha("b"), sha("new")}
    assert study.digest == content_digest([sha("b"), sha("new")])
    assert store.seen("hand/a.png", 11, 2_000, 7)
    assert not store.seen("hand/a.png", 10, 1_000, 7)
