"""Studies go in, results come out: the daemon over real films, in all the ways that matter."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import made_dicom
import numpy as np
import pytest
from PIL import Image
from site_home import SAMPLES, film, make_home
from sqlalchemy.exc import DatabaseError

from mura_batch import custody, daemon, moves, pipeline
from mura_batch.area import Area
from mura_batch.config import STATUS_FILE, Settings
from mura_batch.custody import Custody
from mura_batch.daemon import Daemon
from mura_batch.errors import Transient
from mura_batch.inbox import Inbox
from mura_batch.records import Filters, ImageRow, Rerun, StudyRow
from mura_batch.results import Results
from mura_batch.scoring import Scorer
from mura_batch.store import Store
from mura_batch.systemd import ALIVE, READY
from mura_batch.weights import WeightsStore


def save_dicom(path: Path, *, mark: int = 0, **elements) -> Path:
    """Write the elbow film as a DICOM file; UIDs follow from the name where none is given."""
    with Image.open(SAMPLES / "elbow_lateral.png") as picture:
        pixels = np.asarray(picture.convert("L").resize((256, 256))).copy()
    pixels[0, 0] = mark
    path.parent.mkdir(parents=True, exist_ok=True)
    uid = f"2.25.{int.from_bytes(str(path).encode()[-12:], 'big')}"
    given = {"StudyInstanceUID": uid, "SOPInstanceUID": f"{uid}.1", "BodyPartExamined": "HAND"}
    return made_dicom.write(path, pixels, **(given | elements))


@pytest.fixture
def site(tmp_path: Path) -> Settings:
    return Settings(
        home=make_home(tmp_path / "home").path,
        settle_seconds=0.05,
        scan_seconds=0.05,
        runtime="torch",
        device="cpu",
        retry_seconds=0.01,
    )


def run(site: Settings) -> list[StudyRow]:
    Daemon(site).run(once=True)
    return rows(site)


def rows(site: Settings, **filters) -> list[StudyRow]:
    with Results.open(site.database_url) as results:
        return list(results.query(Filters(**filters)))


def images(site: Settings, **filters) -> list[ImageRow]:
    with Results.open(site.database_url) as results:
        return list(results.images(Filters(**filters)))


def kept(site: Settings, place: str) -> list[str]:
    return sorted(f.name for f in (site.home / place).rglob("*") if f.suffix in {".png", ".dcm"})


def test_a_folder_a_loose_image_and_a_dicom_study(site: Settings) -> None:
    film(site.inbox_dir / "XR_WRIST/patient00011/study1_positive/image1.png", 1)
    film(site.inbox_dir / "XR_WRIST/patient00011/study1_positive/image2.png", 2)
    film(site.inbox_dir / "elbow.png", 3)
    save_dicom(site.inbox_dir / "IM1", BodyPartExamined="HAND", PatientName="Doe^Jane")
    found = {row.area: row for row in run(site)}
    assert set(found) == {"XR_WRIST", "XR_ELBOW", "XR_HAND"}
    wrist = found["XR_WRIST"]
    assert (wrist.state, wrist.views, wrist.revision) == ("done", 2, 1)
    assert (wrist.area_source, found["XR_HAND"].area_source) == ("folder", "body_part")
    assert wrist.source == "XR_WRIST/patient00011/study1_*"
    views = images(site, area=Area.XR_WRIST)
    assert wrist.logit == pytest.approx(sum(view.logit for view in views) / 2)
    assert wrist.probability == pytest.approx(sum(view.probability for view in views) / 2)
    for view in images(site):
        with Image.open(site.home / view.overlay) as overlay:
            assert min(overlay.size) > 100
    assert not list(site.inbox_dir.iterdir())
    assert kept(site, "archive") == ["elbow.png", "image1.png", "image2.png"]


@pytest.mark.parametrize("watch", ["auto", "polling"])
def test_a_study_that_comes_in_folder_after_folder_is_claimed_whole(
    site: Settings, watch: Literal["auto", "polling"], caplog: pytest.LogCaptureFixture
) -> None:
    """With and without events: its files settle by folders, and new ones of it must be seen."""
    site = replace(site, watch=watch, settle_seconds=3.0, scan_seconds=30.0)
    caplog.set_level(logging.INFO, logger="mura_batch")

    def come(number: int) -> None:
        uids = {"StudyInstanceUID": "1.2.3", "SOPInstanceUID": f"1.{number}"}
        save_dicom(site.inbox_dir / f"series{number}/IM1", mark=number, **uids)

    come(0)  # before the first scan: from then on something settles
    worker = Daemon(site)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(worker.run)
        try:
            for number in range(1, 8):
                time.sleep(0.5)
                come(number)
            deadline = time.monotonic() + 60
            while not (found := rows(site)) or found[0].state != "done":
                assert time.monotonic() < deadline
                assert not running.done()
                time.sleep(0.1)
        finally:
            worker.stop()
        running.result()
    (study,) = rows(site, history=True)
    assert (study.views, study.revision) == (8, 1)
    assert [record.message for record in caplog.records].count("study received") == 1


def test_forty_single_view_studies_share_their_forward_passes(
    site: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorers: list[Scorer] = []
    begin = Scorer.__enter__
    monkeypatch.setattr(Scorer, "__enter__", lambda self: scorers.append(self) or begin(self))
    for number in range(40):
        film(site.inbox_dir / f"{number}" / "hand" / "image.png", number, size=64)
    found = run(replace(site, batch=16, batch_seconds=60.0, overlays=False))
    assert len(found) == 40
    assert scorers[0].forward_calls <= 4


def test_claims_are_made_at_once_so_that_they_wait_for_the_disk_together(
    site: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(4, timeout=60)
    claim = Custody.claim

    def meeting(custody: Custody, candidate):
        together.wait()
        return claim(custody, candidate)

    monkeypatch.setattr(Custody, "claim", meeting)
    for number in range(4):
        film(site.inbox_dir / "hand" / "patient" / f"study{number}" / "image.png", number, size=64)
    (site.inbox_dir / "hand" / ".ready").touch()
    assert [row.state for row in run(site)] == ["done"] * 4
    assert not list(site.inbox_dir.iterdir())


def test_events_bring_a_study_in_between_two_looks_at_everything(site: Settings) -> None:
    (site.inbox_dir / "patient").mkdir()
    watching = Daemon(replace(site, scan_seconds=3600.0))
    thread = threading.Thread(target=watching.run)
    thread.start()
    try:
        word = site.home / STATUS_FILE  # it has looked at everything
        wait_until(word.exists)
        film(site.inbox_dir / "patient" / "hand" / "image.png", 1, size=64)
        wait_until(lambda: [row.state for row in rows(site)] == ["done"])
    finally:
        watching.stop()
        thread.join()


def wait_until(come_true: Callable[[], bool], most: float = 45.0) -> None:
    deadline = time.monotonic() + most
    while not come_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_late_image_makes_a_revision_that_names_the_one_before(site: Settings) -> None:
    film(site.inbox_dir / "XR_HAND/p1/image1.png", 1)
    first = run(site)[0]
    film(site.inbox_dir / "XR_HAND/p1/image2.png", 2)
    second = run(site)[0]
    assert (second.study, second.revision, second.views) == (first.study, 2, 2)
    assert second.digest != first.digest
    history = rows(site, history=True)
    assert sorted(row.revision for row in history) == [1, 2]


def test_the_same_images_twice_are_one_row(site: Settings) -> None:
    film(site.inbox_dir / "hand.png", 1)
    first = run(site)
    film(site.inbox_dir / "again/hand.png", 1)
    assert run(site) == first
    assert kept(site, "archive") == ["hand.png", "hand.png"]
    assert not kept(site, "work")


def test_one_dicom_study_with_two_areas_is_two_rows(site: Settings) -> None:
    uid = "1.2.3.4.5"
    save_dicom(site.inbox_dir / "mixed/a", StudyInstanceUID=uid, BodyPartExamined="HAND")
    save_dicom(site.inbox_dir / "mixed/b", StudyInstanceUID=uid, BodyPartExamined="ELBOW", mark=1)
    save_dicom(
        site.inbox_dir / "mixed/c", StudyInstanceUID="1.2.9", BodyPartExamined="HAND", mark=2
    )
    found = run(site)
    assert len({row.study for row in found}) == 2
    assert sorted(row.area for row in found if row.study_uid == uid) == ["XR_ELBOW", "XR_HAND"]


def test_a_person_answers_where_the_evidence_does_not(site: Settings) -> None:
    film(site.inbox_dir / "unnamed.png", 1)
    asked = run(site)[0]
    assert (asked.state, asked.area) == ("needs_area", None)
    assert f"rerun {asked.study} --set-area" in asked.reason
    assert kept(site, "work") == ["unnamed.png"]
    with Store.open(site.database_url) as store:
        store.rerun(Rerun(studies=(asked.study,)), Area.XR_FOREARM)
    done = run(site)
    assert [(r.state, r.area, r.area_source) for r in done] == [("done", "XR_FOREARM", "person")]
    assert kept(site, "archive") == ["unnamed.png"]


def test_another_area_by_a_person_supersedes_the_first(site: Settings) -> None:
    film(site.inbox_dir / "hand.png", 1)
    first = run(site)[0]
    with Store.open(site.database_url) as store:
        store.rerun(Rerun(studies=(first.study,)), Area.XR_WRIST)
    assert [(r.area, r.revision) for r in run(site)] == [("XR_WRIST", 2)]


def test_a_study_waits_for_weights_and_goes_on_when_they_come(site: Settings) -> None:
    shutil.rmtree(site.weights_dir / "XR_HAND")
    film(site.inbox_dir / "hand.png", 1)
    film(site.inbox_dir / "elbow.png", 2)
    states = {row.area: row for row in run(site)}
    assert states["XR_ELBOW"].state == "done"
    assert states["XR_HAND"].state == "no_weights"
    assert "models fetch XR_HAND" in states["XR_HAND"].reason
    WeightsStore(site.weights_dir).install_bundled()
    assert {row.state for row in run(site)} == {"done"}


def test_weights_that_come_while_a_study_is_under_way_are_used(
    site: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(site.weights_dir / "XR_HAND")
    film(site.inbox_dir / "hand.png", 1)
    notice, commit = daemon._noticed, Store.commit
    noticed = threading.Event()

    def told(*known):
        active = notice(*known)
        if Area.XR_HAND in active:
            noticed.set()
        return active

    def late(store: Store, *outcomes):
        WeightsStore(site.weights_dir).install_bundled()
        assert noticed.wait(30)
        return commit(store, *outcomes)

    monkeypatch.setattr(daemon, "_noticed", told)
    monkeypatch.setattr(Store, "commit", late)
    assert [row.state for row in run(site)] == ["done"]


def test_rerun_alone_makes_a_new_row_of_the_same_key(site: Settings) -> None:
    film(site.inbox_dir / "hand.png", 1)
    first = run(site)[0]
    with Store.open(site.database_url) as store:
        store.rerun(Rerun(studies=(first.study,)))
    second = run(site)[0]
    assert (second.digest, second.weights, second.revision) == (first.digest, first.weights, 2)
    assert second.logit == pytest.approx(first.logit, abs=1e-5)


def test_one_bad_view_fails_alone(site: Settings) -> None:
    good = film(site.inbox_dir / "hand/1.png", 1)
    (site.inbox_dir / "hand/2.png").write_bytes(good.read_bytes()[:3000])
    (site.inbox_dir / "hand/3.png").write_text("this is no picture")
    row = run(site)[0]
    assert (row.state, row.views, row.views_failed) == ("done", 3, 2)
    assert sorted(view.image for view in images(site) if view.error) == ["hand/2.png", "hand/3.png"]
    assert kept(site, "archive") == ["1.png"]
    assert kept(site, "quarantine") == ["2.png", "3.png"]
    reason = json.loads(next(site.quarantine.rglob("reason.json")).read_text())
    assert {"code", "stage", "message", "what_to_do"} <= reason.keys()
    assert {entry["code"] for entry in reason["files"]} == {"truncated", "not_an_image"}


def test_what_can_never_be_scored_is_quarantined_with_its_reason(site: Settings) -> None:
    save_dicom(site.inbox_dir / "foot", BodyPartExamined="FOOT")
    (site.inbox_dir / "hand.png").write_bytes(b"")
    outside = film(site.home / "private.png", 7)
    (site.inbox_dir / "wrist.png").symlink_to(outside)
    found = {row.source: row for row in run(site)}
    assert {row.state for row in found.values()} == {"quarantined"}
    assert "unsupported_area" in found["foot"].reason
    reasons = [json.loads(f.read_text()) for f in site.quarantine.rglob("reason.json")]
    assert len(reasons) == 3
    assert {reason["code"] for reason in reasons} == {"unsupported_area", "empty", "symbolic_link"}
    assert any(path.is_symlink() for path in site.quarantine.rglob("*"))
    assert outside.is_file()
    with Store.open(site.database_url) as store:
        store.rerun(Rerun(studies=tuple(row.study for row in found.values())))
    assert {row.state for row in run(site)} == {"quarantined"}
    assert not kept(site, "inbox")


@pytest.mark.parametrize("archive", ["leave", "delete"])
def test_sources_can_stay_or_go(site: Settings, archive: str) -> None:
    site = replace(site, archive=archive)
    film(site.inbox_dir / "hand/1.png", 1)
    assert [row.state for row in run(site)] == ["done"]
    assert [row.revision for row in run(site)] == [1]
    assert kept(site, "inbox") == (["1.png"] if archive == "leave" else [])
    assert kept(site, "archive") == kept(site, "work") == []
    assert len(images(site)) == 1


def test_a_passing_fault_is_tried_again_and_then_waits_for_a_person(site: Settings) -> None:
    site = replace(site, attempts=3)
    film(site.inbox_dir / "hand.png", 1)
    shutil.rmtree(site.overlays_dir)
    site.overlays_dir.write_text("a file where a folder should be")
    while run(site)[0].state == "queued":
        time.sleep(0.05)
    failed = rows(site)[0]
    assert (failed.state, "attempts_exhausted" in failed.reason) == ("failed", True)
    assert kept(site, "work") == ["hand.png"]
    site.overlays_dir.unlink()
    with Store.open(site.database_url) as store:
        assert store.rerun(Rerun(failed=True)) == [failed.study]
    assert [row.state for row in run(site)] == ["done"]
    assert kept(site, "archive") == ["hand.png"]


def test_a_study_that_cannot_be_moved_is_no_burden_to_those_that_end_with_it(
    site: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mark in range(4):
        film(site.inbox_dir / f"{mark}/hand/image.png", mark)
    archive, refused = Custody.to_archive, []

    def full(custody: Custody, study: str, claim: str) -> None:
        if not refused or refused == [study]:  # with the others, and once more alone
            refused.append(study)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        archive(custody, study, claim)

    monkeypatch.setattr(Custody, "to_archive", full)
    while {row.state for row in run(site)} != {"done"}:
        time.sleep(0.05)
    with Store.open(site.database_url) as store:
        told = {row.study: [event.what for event in store.events(row.study)] for row in rows(site)}
    assert told.pop(refused[0]).count("deferred") == 1
    assert [events.count("done") for events in told.values()] == [1, 1, 1]
    assert len(kept(site, "archive")) == 4


def test_no_patient_data_in_the_log(site: Settings, caplog: pytest.LogCaptureFixture) -> None:
    save_dicom(site.inbox_dir / "Doe_Jane/IM1", PatientName="Doe^Jane", PatientID="MRN4711X")
    shutil.copytree(SAMPLES / "XR_HAND", site.inbox_dir / "Doe_Jane_hand")
    with caplog.at_level(logging.DEBUG, logger="mura_batch"):
        run(site)
    text = caplog.text + " ".join(str(vars(record)) for record in caplog.records)
    assert "recorded" in text
    assert "Doe" not in text
    assert "MRN4711X" not in text


def test_what_others_can_write_is_scored_as_it_was_claimed_or_not_at_all(
    site: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = replace(site, archive="leave")
    target = film(site.inbox_dir / "hand.png", 1)
    other = film(site.home / "other.png", 2).read_bytes()
    read = pipeline.read_film

    def after_a_change(path: Path, *how: object):
        if path == target and path.read_bytes() != other:
            path.write_bytes(other)
        return read(path, *how)

    monkeypatch.setattr(pipeline, "read_film", after_a_change)
    while {row.state for row in run(site)} != {"done", "failed"}:
        time.sleep(0.05)
    (failed,) = rows(site, state="failed")
    assert "replaced: " in failed.reason
    (done,) = rows(site, state="done")
    (view,) = (view for view in images(site) if view.study.study == done.study)
    again = replace(site, home=make_home(tmp_path / "other").path)
    film(again.inbox_dir / "hand.png", 2)
    assert run(again)[0].digest == done.digest
    assert images(again)[0].logit == view.logit


def test_what_ends_the_feeder_ends_the_daemon(
    site: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise DatabaseError("select", {}, sqlite3.DatabaseError("database disk image is malformed"))

    monkeypatch.setattr(Store, "take", damaged)
    watching = Daemon(site)
    patience = threading.Timer(20, watching.stop)
    patience.start()
    with pytest.raises(DatabaseError, match="malformed"):
        watching.run()
    patience.cancel()


def test_a_claimed_accession_is_that_of_the_first_dicom_file(site: Settings) -> None:
    save_dicom(site.inbox_dir / "st/b.dcm", AccessionNumber="ACC77")
    (site.inbox_dir / "st/a_report.txt").write_text("no picture")
    assert {row.accession for row in run(site)} == {"ACC77"}


def test_an_unreadable_view_stays_known_when_its_part_is_not_scored_again(site: Settings) -> None:
    uid = {"StudyInstanceUID": "1.2.3"}
    shutil.rmtree(site.weights_dir / "XR_WRIST")
    save_dicom(site.inbox_dir / "st/a", **uid, BodyPartExamined="HAND")
    save_dicom(site.inbox_dir / "st/w", **uid, BodyPartExamined="WRIST", mark=2)
    bad = save_dicom(site.inbox_dir / "st/b.dcm", **uid, BodyPartExamined="HAND", mark=1)
    bad.write_bytes(bad.read_bytes()[:-500])
    assert {row.area: row.state for row in run(site)} == {
        "XR_HAND": "done",
        "XR_WRIST": "no_weights",
    }
    WeightsStore(site.weights_dir).install_bundled()
    assert {row.state for row in run(site)} == {"done"}
    assert kept(site, "quarantine") == ["b.dcm"]
    assert kept(site, "archive") == []  # the other two have no ending
    assert not list(site.work.iterdir())


@pytest.mark.parametrize("archive", ["leave", "delete", "move"])
def test_what_a_person_saves_from_quarantine_leaves_nothing_there(
    site: Settings, archive: str
) -> None:
    site = replace(site, archive=archive)
    save_dicom(site.inbox_dir / "knee.dcm", BodyPartExamined="KNEE")
    refused = run(site)[0]
    assert refused.state == "quarantined"
    assert list(site.quarantine.rglob("reason.json"))
    with Store.open(site.database_url) as store:
        store.rerun(Rerun(studies=(refused.study,)), Area.XR_ELBOW)
    assert [row.state for row in run(site)] == ["done"]
    assert [path for path in site.quarantine.rglob("*") if path.is_file()] == []
    places = {"leave": "inbox", "move": "archive"}
    for place in ("inbox", "work", "archive"):
        assert kept(site, place) == (["knee.dcm"] if places.get(archive) == place else [])


def test_a_setting_that_the_weights_cannot_meet_is_named(site: Settings) -> None:
    folder = site.weights_dir / "XR_HAND"
    (card,) = (file for file in folder.glob("*.json") if file.name != "active.json")
    told = json.loads(card.read_text())
    told["operating_points"] = [
        point for point in told["operating_points"] if point["name"] == "balanced"
    ]
    card.write_text(json.dumps(told))
    film(site.inbox_dir / "hand.png", 1)
    row = run(replace(site, operating_point="high_sensitivity"))[0]
    assert row.state == "failed"
    assert "misconfigured" in row.reason
    assert "set operating_point to one of these" in row.reason
    with Store.open(site.database_url) as store:
        store.rerun(Rerun(failed=True))
    assert [row.state for row in run(site)] == ["done"]


def test_two_contents_of_one_sop_instance_uid_are_both_scored_and_told(site: Settings) -> None:
    same = {"StudyInstanceUID": "1.2.3", "SOPInstanceUID": "1.2.3.4"}
    save_dicom(site.inbox_dir / "a", **same)
    save_dicom(site.inbox_dir / "b", **same, mark=1)
    (row,) = run(site)
    assert (row.state, row.views, row.views_failed) == ("done", 2, 0)
    assert row.reason.startswith("identifier_conflict: ")
    assert rows(site, reason="identifier_conflict") == [row]


def test_a_file_larger_than_any_film_is_refused_unread(site: Settings) -> None:
    film(site.inbox_dir / "hand.png", 1)
    (site.inbox_dir / "wrist.png").touch()
    os.truncate(site.inbox_dir / "wrist.png", 9 << 30)
    started = time.monotonic()
    assert sorted(row.state for row in run(site)) == ["done", "quarantined"]
    assert time.monotonic() - started < 10
    (reason,) = site.quarantine.rglob("reason.json")
    assert json.loads(reason.read_text())["code"] == "too_large"
    (refused,) = rows(site, state="quarantined")
    with Store.open(site.database_url) as store:
        store.rerun(Rerun(studies=(refused.study,)))
    assert sorted(row.state for row in run(site)) == ["done", "quarantined"]


def test_what_could_not_be_taken_needs_attention(
    site: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(site.inbox_dir / "hand.png", 1)
    really = os.rename

    def refuse(source: object, target: object) -> None:
        if "inbox" in os.fspath(source):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        really(source, target)

    with monkeypatch.context() as fault:
        fault.setattr(os, "rename", refuse)
        summary = Daemon(site).run(once=True)
        assert (summary.untaken, summary.waiting, summary.needs_attention) == (1, 0, True)
    assert not Daemon(site).run(once=True).needs_attention
    assert [row.state for row in rows(site)] == ["done"]


def test_a_claim_that_a_stop_cut_off_is_no_trouble(
    site: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    film(site.inbox_dir / "hand.png", 1)
    watching = Daemon(site)
    claim = Custody.claim

    def stopped(custody: Custody, candidate):
        watching.stop()
        return claim(custody, candidate)

    with monkeypatch.context() as fault, caplog.at_level(logging.INFO, logger="mura_batch"):
        fault.setattr(Custody, "claim", stopped)
        assert watching.run().untaken == 0
    assert "could not be claimed" not in caplog.text
    assert "stopping" in caplog.text
    assert [row.state for row in run(site)] == ["done"]


def test_what_was_taken_and_cannot_be_read_needs_attention(
    site: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(site.inbox_dir / "hand.png", 1)
    film(site.inbox_dir / "elbow.png", 2)

    def failing(path: Path, name: str, status: os.stat_result) -> tuple[str, str]:
        if name == "hand.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return moves.digest(path, name, status)

    with monkeypatch.context() as fault:
        fault.setattr(custody, "digest", failing)
        summary = Daemon(site).run(once=True)
    assert (summary.untaken, summary.finished) == (1, {"done": 1})
    assert Daemon(site).run(once=True).finished == {"done": 1}


def test_claims_that_were_cut_off_are_finished_under_the_watchdog(site: Settings) -> None:
    names = [film(site.inbox_dir / f"hand/{mark}.png", mark).name for mark in range(3)]
    box = Inbox(replace(site, settle_seconds=0))
    box.scan()
    (unit,) = box.scan()
    answers = iter([True] * 4 + [False])
    with pytest.raises(Transient, match="told to stop"):
        Custody(site, go_on=lambda: next(answers)).claim(unit)
    assert kept(site, "work") == names
    said: list[str] = []
    Daemon(site, notify=said.append).run(once=True)
    assert said[: said.index(READY)].count(ALIVE) >= 3
    assert [row.state for row in rows(site)] == ["done"]


@pytest.mark.parametrize("archive", ["delete", "move"])
def test_a_bad_view_stays_in_quarantine_when_a_person_saves_its_study(
    site: Settings, archive: str
) -> None:
    site = replace(site, archive=archive)
    film(site.inbox_dir / "XR_FOOT/p1/good.png", 1)
    bad = film(site.inbox_dir / "XR_FOOT/p1/bad.png", 2)
    bad.write_bytes(bad.read_bytes()[:900])
    refused = run(site)[0]
    assert kept(site, "quarantine") == ["bad.png", "good.png"]
    with Store.open(site.database_url) as store:
        store.rerun(Rerun(studies=(refused.study,)), Area.XR_HAND)
    (row,) = run(site)
    assert (row.state, row.views, row.views_failed) == ("done", 2, 1)
    assert kept(site, "quarantine") == ["bad.png"]
    assert kept(site, "archive") == (["good.png"] if archive == "move" else [])
    reason = json.loads(next(site.quarantine.rglob("reason.json")).read_text())
    assert reason["code"] == "truncated"
    assert not list(site.work.iterdir())
