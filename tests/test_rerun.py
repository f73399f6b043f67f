"""What people ask: reruns, ids, labels."""

from __future__ import annotations

import itertools

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

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from mura_batch.records import (
    FileProblem,
    Filters,
    LabelRow,
    Move,
    Place,
    Rerun,
    State,
)


def rows(store, **filters):
    return list(store.query(Filters(**filters)))


def test_rerun_needs_to_be_told_what(store):
    for nothing in (Rerun(), Rerun(filters=Filters())):
        with pytest.raises(Misconfigured, match="Say which studies"):
            store.rerun(nothing)


def test_rerun_of_a_study_whose_scored_files_are_deleted_is_refused_whatever_is_left(store):
    study = record(store, folder("hand", "good", "junk"))
    finish(store, problems=(FileProblem(sha("junk"), "empty", "no picture"),))
    for file in store.study(study.study_id).files:
        place = Place.QUARANTINE if file.problem else Place.DELETED
        store.moved(Move(file.claim, place, (file.name,)))
    with pytest.raises(Misconfigured, match="deleted: drop them in again"):
        store.rerun(Rerun(studies=(study.study_id,)))
    assert store.rerun(Rerun(filters=Filters(state=State.DONE))) == []
    record(store, folder("hand", "late", hours=1))
    finish(store, done(), waiting(State.NEEDS_AREA))
    assert store.rerun(Rerun(studies=(study.study_id,)), Area.XR_HAND) == [study.study_id]


def test_rerun_of_deleted_files_is_refused_by_name_and_passed_over_by_filter(store):
    for name in "ab":
        record(store, folder(name, name))
    gone = finish(store)
    kept = finish(store)
    store.moved(Move(gone.files[0].claim, Place.DELETED, (gone.files[0].name,)))
    with pytest.raises(Misconfigured, match="deleted"):
        store.rerun(Rerun(studies=(gone.id,)))
    assert store.rerun(Rerun(filters=Filters(state=State.DONE))) == [kept.id]


def test_stale_are_results_of_other_weights_than_the_active_ones(store):
    for name, weights in (("a", "aa"), ("b", "bb")):
        record(store, folder(name, name))
        finish(store, done(result=new_result(weights)))
    active = {Area.XR_HAND: "bb" * 32}
    assert store.stale(active) == 1
    assert store.stale({Area.XR_WRIST: "cc"}) == 0
    (stale,) = store.rerun(Rerun(stale=active))
    assert store.study(stale).key == "a"


def test_more_studies_than_a_statement_can_bind_are_rerun_at_once(store, monkeypatch):
    monkeypatch.setattr("mura_batch.lookup._BOUND", 2)
    for number in range(3):
        record(store, folder(f"f{number}", str(number)))
        finish(store)
    assert len(store.rerun(Rerun(filters=Filters(state=State.DONE)))) == 3
    assert store.counts(NOON).queued == 3


def test_ids_are_taken_by_their_unique_beginning(store):
    ids = sorted(record(store, folder(f"f{n}", str(n))).study_id for n in range(20))
    assert store.resolve(ids[0]) == ids[0]
    assert store.resolve(ids[0][:11]) == ids[0]
    common = next(a[:1] for a, b in itertools.pairwise(ids) if a[0] == b[0])
    with pytest.raises(Misconfigured, match="several"):
        store.resolve(common)
    for unknown in ("ffffffffffff0", "%", "", "x"):
        with pytest.raises(Misconfigured):
            store.resolve(unknown)


def test_labels_are_stored_all_or_none_and_the_last_word_counts(store):
    study = record(store, folder("hand", "a")).study_id
    with pytest.raises(Misconfigured, match="nothere"):
        store.set_labels([LabelRow(study, "positive"), LabelRow("nothere", "negative")])
    assert list(store.labels()) == []
    store.set_labels([LabelRow(study[:6], "positive"), LabelRow(study, "negative", Area.XR_HAND)])
    store.set_labels([LabelRow(study, "negative", at=NOON)])
    assert list(store.labels()) == [
        LabelRow(study, "negative", None, "person", NOON),
        next(row for row in store.labels() if row.area is Area.XR_HAND),
    ]
    assert [e.what for e in store.events(study)].count("label") == 3
