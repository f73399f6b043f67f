"""The inbox: real folders and files, a fake clock."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inbox_box import PNG, Box

import mura_batch.inbox
import mura_batch.wakeup
from mura_batch.custody import Custody, FoundFile
from mura_batch.inbox import Inbox
from mura_batch.study import Kind, Peek, peek


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


# ---- find and settle


def test_folders_renamed_in_are_found_without_any_event(box: Box, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    for number in range(200):
        folder = outside / f"patient{number:05}" / "study1_positive"
        folder.mkdir(parents=True)
        for image in (1, 2):
            (folder / f"image{image}.png").write_bytes(b"%d %d" % (number, image))
    for folder in outside.iterdir():
        folder.rename(box.root / folder.name)
    assert box.scan() == []
    assert (box.inbox.waiting, box.scan(after=1.9)) == (200, [])
    units = box.scan(after=0.2)
    assert len(units) == 200
    assert all((u.kind, len(u.files), u.settled_by) == (Kind.FOLDER, 2, "quiet") for u in units)
    assert units[0].key.endswith("/study1_positive")
    assert (box.inbox.waiting, box.inbox.blocked) == (0, 0)
    custody = Custody(box.settings)
    assert all(custody.claim(unit) for unit in units[:20])
    assert box.scan() == []
    assert (len(list(box.root.iterdir())), box.inbox.refused) == (180, 180)


@pytest.mark.parametrize("change", ["size", "time", "inode", "another file", "one file less"])
def test_every_change_starts_the_wait_anew(box: Box, change: str) -> None:
    path = box.put("s/a.png")
    box.put("s/b.png")
    box.scan()
    old = path.stat()
    if change == "size":
        path.write_bytes(PNG + b"!")
        os.utime(path, ns=(old.st_mtime_ns, old.st_mtime_ns))
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "inode":
        shutil.copy2(path, path.with_name(".copy"))
        path.with_name(".copy").replace(path)
    elif change == "another file":
        box.put("s/c.png")
    else:
        path.unlink()
    assert box.scan(after=3) == [], "it changed between two looks"
    assert box.scan(after=1.9) == []
    assert len(box.scan(after=0.1)) == 1


def test_quiet_is_measured_between_looks_not_by_file_times(box: Box) -> None:
    os.utime(box.put("old.png"), ns=(1, 1))
    assert box.scan(after=1000) == []
    assert len(box.scan(after=2)) == 1


def test_growing_file_is_taken_at_the_cap_and_not_at_once_again(box: Box) -> None:
    path = box.put("s/grows.png")
    offered = []
    for second in range(130):
        with path.open("ab") as stream:
            stream.write(b"x")
        offered += [(second, unit.settled_by) for unit in box.scan(after=1)]
    assert offered == [(60, "cap"), (121, "cap")]


def test_upload_on_its_way_keeps_its_folder_waiting(box: Box) -> None:
    box.put("s/a.png")
    for name in ("s/.b.png.Xy12", "s/b.png.part", "s/b.tmp"):
        for size in range(1, 4):
            box.put(name, b"x" * size)
            assert box.scan(after=1.5) == []
    units = box.scan(after=2)
    assert [f.name for f in units[0].files] == ["s/a.png"]


def test_ready_marker_ends_the_wait_for_its_folder_and_below(box: Box) -> None:
    box.put("now/a.png")
    box.put("now/deep/er/b.png")
    box.put("later/c.png")
    box.put("d.png")
    box.put("now/.ready", b"")
    box.put(".ready", b"")
    units = {(unit.key, unit.settled_by) for unit in box.scan()}
    assert units == {("now/a.png", "ready"), ("now/deep/er", "ready")}
    assert box.inbox.waiting == 2


def test_a_marker_that_stays_says_nothing_of_later_files(tmp_path: Path) -> None:
    box = Box(tmp_path, seen=lambda _: False, archive="leave", settle_seconds=50.0)
    box.put("now/a.png")
    marker = box.put("now/.ready", b"")
    assert [unit.settled_by for unit in box.scan()] == ["ready"]
    late = box.put("now/b.png")
    os.utime(late, ns=(0, marker.stat().st_mtime_ns + 1))
    assert box.scan(after=1) == []
    marker.touch()
    assert [len(unit.files) for unit in box.scan(after=1)] == [2]


def test_dicom_study_is_ready_when_all_its_folders_are(box: Box) -> None:
    box.put_dicom("one/1", "1.2.3")
    box.put_dicom("two/1", "1.2.3")
    box.put("one/.ready", b"")
    assert box.scan() == []
    box.put("two/.ready", b"")
    (unit,) = box.scan()
    assert (unit.kind, unit.key, unit.settled_by) == (Kind.DICOM, "1.2.3", "ready")
    Custody(box.settings).claim(unit)
    assert list(box.root.iterdir()) == []


def test_unit_that_nobody_takes_is_offered_ever_more_rarely(box: Box) -> None:
    box.put("a.png")
    offered = [second for second in range(200) if box.scan(after=1)]
    assert offered == [2, 4, 8, 16, 32, 64, 124, 184]
    assert (box.inbox.waiting, box.inbox.refused) == (0, 1)
    box.put("a.png", b"changed")
    assert box.scan(after=1) == []
    assert box.inbox.refused == 0
    assert len(box.scan(after=2)) == 1


def test_slow_scan_does_not_count_as_quiet_time(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.put("a.png")
    ticks = iter([0.0, 10.0, 10.5, 20.0, 22.5, 30.0])
    inbox = Inbox(box.settings, clock=lambda: next(ticks))
    assert [len(inbox.scan()) for _ in range(3)] == [0, 0, 1]


# ---- group


def test_studies_mixed_in_one_folder_go_by_their_uid_wherever_they_lie(box: Box) -> None:
    box.put_dicom("flat/1", "1.2.3")
    box.put_dicom("flat/2.dcm", "1.2.4")
    box.put_dicom("flat/3.png", "1.2.3")
    box.put_dicom("4", "1.2.3")
    box.put_dicom("a/b/5", "1.2.4")
    assert box.units() == {
        (Kind.DICOM, "1.2.3"): ["4", "flat/1", "flat/3.png"],
        (Kind.DICOM, "1.2.4"): ["a/b/5", "flat/2.dcm"],
    }


def test_folders_and_loose_files(box: Box) -> None:
    box.put("loose.png")
    box.put("patient/cover.jpg")
    box.put("patient/study1/a.png")
    box.put("patient/study1/notes.txt", b"text")
    box.put("patient/study2/a.png")
    (box.root / "patient" / "study2" / "empty").mkdir()
    assert box.units() == {
        (Kind.FILE, "loose.png"): ["loose.png"],
        (Kind.FILE, "patient/cover.jpg"): ["patient/cover.jpg"],
        (Kind.FOLDER, "patient/study1"): ["patient/study1/a.png", "patient/study1/notes.txt"],
        (Kind.FOLDER, "patient/study2"): ["patient/study2/a.png"],
    }


def test_what_names_no_study_goes_with_the_only_dicom_study_of_its_folder(box: Box) -> None:
    for folder in ("one", "two", "pictures"):
        whole = box.put_dicom(f"{folder}/1.dcm", "1.2.3")
        box.put(f"{folder}/notes.txt", b"text")
    box.put("one/cut.dcm", whole.read_bytes()[:140])
    box.put_dicom("two/2.dcm", "1.2.4")
    box.put("pictures/preview.png")
    units = box.units()
    assert units[Kind.DICOM, "1.2.3"] == [
        "one/1.dcm",
        "one/cut.dcm",
        "one/notes.txt",
        "pictures/1.dcm",
        "two/1.dcm",
    ]
    assert units[Kind.FOLDER, "two"] == ["two/notes.txt"]
    assert units[Kind.FOLDER, "pictures"] == ["pictures/notes.txt", "pictures/preview.png"]


def test_ignored_names_are_left_alone(tmp_path: Path) -> None:
    box = Box(tmp_path, ignore=("DICOMDIR", "*.log"))
    ignored = [".hidden", ".git/x.png", "a.part", "b.TMP", "c~", "DICOMDIR", "s/x.log", ".ready"]
    for name in [*ignored, "s/a.png"]:
        box.put(name)
    assert box.units() == {(Kind.FOLDER, "s"): ["s/a.png"]}
    assert all((box.root / name).exists() for name in ignored)


parts = st.sampled_from(["a", "b", "c.png", ".d", "e.part", "f~", "DICOMDIR", "g\n"])


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.lists(parts, min_size=1, max_size=4).map("/".join), max_size=12))
def test_every_file_belongs_to_exactly_one_unit(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    box = Box(tmp_path_factory.mktemp("tree"))
    for name in names:
        try:
            box.put(name, name.encode())
        except OSError:
            continue  # a name is taken: by a folder, or by a file
    expected = [
        name
        for folder, _, files in os.walk(box.root)
        for name in (os.path.relpath(f"{folder}/{file}", box.root) for file in files)
        if not any(part.startswith(".") for part in name.split("/"))
        and not name.endswith((".part", "~", "DICOMDIR"))
    ]
    units = box.units()
    assert sorted(file for files in units.values() for file in files) == sorted(expected)
    folders = [key for kind, key in units if kind is Kind.FOLDER]
    assert not any(a != b and a.startswith(b + "/") for a in folders for b in folders)


# ---- hostile names, links and what is no file


def test_links_and_special_files_are_units_of_their_own(box: Box, tmp_path: Path) -> None:
    secret = tmp_path / "outside"
    secret.mkdir()
    (secret / "patient.png").write_bytes(PNG)
    box.put("s/a.png")
    (box.root / "s" / "folder").symlink_to(secret)
    (box.root / "s" / "loop").symlink_to(box.root)
    (box.root / "file.png").symlink_to(secret / "patient.png")
    (box.root / "s" / "nowhere").symlink_to("not/there")
    os.mkfifo(box.root / "s" / "fifo.png")
    address = box.root / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(address))
        box.scan()
        units = {unit.key: unit for unit in box.scan(after=2)}
    problems = {key: unit.files[0].problem for key, unit in units.items()}
    assert problems == {
        "s": "",
        "s/folder": "symbolic_link",
        "s/loop": "symbolic_link",
        "s/nowhere": "symbolic_link",
        "file.png": "symbolic_link",
        "s/fifo.png": "not_a_file",
        "socket": "not_a_file",
    }
    assert [file.name for file in units["s"].files] == ["s/a.png"]
    assert all(Custody(box.settings).claim(unit) for unit in units.values())
    assert (secret / "patient.png").read_bytes() == PNG
    assert list(box.root.iterdir()) == []


def test_names_of_any_bytes_are_found_and_claimed(box: Box) -> None:
    odd = [
        b"line\nbreak/\"quotes'.png",
        b"\xff\xfe/\xc3\x28.png",
        b"x" * 255,
        b"  /tab\t;rm -rf $HOME `",
        "Schulter/плечо 手.png".encode(),
    ]
    for name in odd:
        path = os.path.join(os.fsencode(box.root), name)  # noqa: PTH118 - bytes are no Path
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - bytes
        Path(os.fsdecode(path)).write_bytes(PNG)
    box.scan()
    units = box.scan(after=2)
    assert sorted(os.fsencode(f.name) for unit in units for f in unit.files) == sorted(odd)
    claims = [Custody(box.settings).claim(unit) for unit in units]
    assert all(claim.files[0].path.read_bytes() == PNG for claim in claims)
    assert list(box.root.iterdir()) == []


def test_folders_that_come_and_go_do_not_stop_the_scan(box: Box) -> None:
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            box.put(f"churn{number % 7}/{number % 3}/a.png")
            shutil.rmtree(box.root / f"churn{(number + 3) % 7}", ignore_errors=True)

    box.put("s/a.png")
    thread = threading.Thread(target=churn)
    thread.start()
    found = set()
    try:
        for _ in range(150):
            found |= {unit.key for unit in box.scan(after=0.5)}
    finally:
        stop.set()
        thread.join()
    assert "s" in found


def test_folder_that_cannot_be_listed_does_not_stop_the_scan(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.put("s/a.png")
    box.put("locked/b.png")
    really = os.scandir

    def refuse(path: str) -> object:  # root, who runs many a test, would be let in
        if path.endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert box.units() == {(Kind.FOLDER, "s"): ["s/a.png"]}
    assert box.inbox.blocked == 1


def test_inbox_that_is_gone_is_said_and_survived(box: Box) -> None:
    box.put("a.png")
    box.root.rename(box.root.with_name("unmounted"))
    assert (box.scan(), box.inbox.blocked) == ([], 1)
    box.root.with_name("unmounted").rename(box.root)
    assert box.units() == {(Kind.FILE, "a.png"): ["a.png"]}


def test_unreadable_file_stays_in_its_study_until_it_can_be_read(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.put("s/a.png")
    box.put("s/b.png")
    really = os.open
    locked = True

    def refuse(path: object, *args: object, **named: object) -> int:
        if locked and os.fspath(path).endswith("b.png"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(path, *args, **named)

    monkeypatch.setattr(os, "open", refuse)
    box.scan()
    (unit,) = box.scan(after=2)
    assert [f.problem for f in unit.files] == ["", "unreadable"]
    locked = False
    assert box.scan(after=2) == [], "it is another study now"
    (unit,) = box.scan(after=2)
    assert [f.problem for f in unit.files] == ["", ""]


def test_folders_that_lie_too_deep_are_left_and_said_once(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    box.put("s/a.png")
    box.put("/".join(["d"] * 64) + "/b.png")
    box.put("/".join(["Doe"] * 65) + "/c.png")
    with caplog.at_level(logging.WARNING, logger="mura_batch"):
        units = box.units()
    assert set(units) == {(Kind.FOLDER, "s"), (Kind.FOLDER, "/".join(["d"] * 64))}
    assert box.inbox.blocked == 1
    assert [record.getMessage() for record in caplog.records] == [mura_batch.inbox.BLOCKED]
    assert "Doe" not in caplog.text


# ---- looking only where something happened


def test_only_named_folders_and_what_is_new_below_them_are_looked_into(box: Box) -> None:
    box.put("one/a.png")
    box.put("two/b.png")
    box.scan()
    box.put("one/c.png")
    box.put("two/d.png")
    box.put("new/deep/er/e.png")
    box.put(".hidden/new/f.png")
    assert box.scan(named={"one", "new/deep/er", ".hidden/new"}) == []
    box.scan(after=1.9, named=set())
    units = {unit.key: len(unit.files) for unit in box.scan(after=0.1, named={"one", "new"})}
    assert units == {"one": 2, "new/deep/er": 1}
    assert box.inbox.waiting == 1, "its late file was seen when it seemed to have settled"
    late = {unit.key: len(unit.files) for unit in box.scan(after=1.9, named=set())}
    assert late.get("two") is None
    late = {unit.key: len(unit.files) for unit in box.scan(after=0.1, named=set())}
    assert late["two"] == 2


def test_a_unit_settles_when_all_its_folders_have_been_looked_into(box: Box) -> None:
    box.put_dicom("one/1", "1.2.3")
    box.put_dicom("two/1", "1.2.3")
    box.scan()
    box.put_dicom("two/2", "1.2.3")
    assert box.scan(after=1.9, named={"one"}) == []
    assert box.scan(after=0.1, named={"one"}) == []
    (unit,) = box.scan(after=2, named=set())
    assert len(unit.files) == 3


def test_what_was_taken_or_came_again_is_known_without_a_look_at_everything(box: Box) -> None:
    box.put("a/b/1.png")
    box.scan()
    (unit,) = box.scan(after=2, named=set())
    Custody(box.settings).claim(unit)
    assert not (box.root / "a").exists()
    assert (box.scan(named=set()), box.inbox.refused) == ([], 0)
    box.put("a/b/2.png")
    box.scan(named={"a"})
    (unit,) = box.scan(after=2, named=set())
    assert [f.name for f in unit.files] == ["a/b/2.png"]


_FOLDERS = ["a", "a/b", "a/b/c", "a/d", "e"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put dicom", "ready", "remove", "move"]),
            st.sampled_from(_FOLDERS),
            st.sampled_from(_FOLDERS),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_named_folders_tell_as_much_as_a_look_at_everything(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, str]]
) -> None:
    box = Box(tmp_path_factory.mktemp("home"))
    box.scan()
    for number, (what, folder, other) in enumerate(steps):
        named = {folder}
        if what == "put":
            box.put(f"{folder}/{number}.png")
        elif what == "put dicom":
            box.put_dicom(f"{folder}/{number}", f"1.2.{number % 2}")
        elif what == "ready":
            box.put(f"{folder}/.ready")
        elif what == "remove":
            shutil.rmtree(box.root / folder, ignore_errors=True)
        elif (box.root / folder).is_dir() and not (box.root / other).exists():
            (box.root / other).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # below itself
                (box.root / folder).rename(box.root / other)
            named = {folder, other}
        fresh = Inbox(box.settings, clock=lambda: box.now)
        assert set(box.scan(named=named)) <= set(fresh.scan())
        assert box.inbox._folders.keys() == fresh._folders.keys()
        assert observed(box.inbox) == observed(fresh)


def observed(inbox: Inbox) -> dict[tuple[Kind, str], set[str]]:
    return {
        key: {file.name for share in seen.unit.values() for file in share.state}
        for key, seen in inbox._observed.items()
    }


def test_a_marker_that_went_with_its_claim_says_nothing_of_what_comes_next(box: Box) -> None:
    box.put("a/b/1.png")
    box.put("a/.ready")
    (unit,) = box.scan()
    assert unit.settled_by == "ready"
    assert Custody(box.settings).claim(unit)
    assert not (box.root / "a").exists()
    box.put("a/b/2.png")
    assert box.scan(named={"a/b"}) == []


def test_a_folder_that_could_not_be_listed_once_is_not_offered_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger: set[FoundFile] = set()
    box = Box(tmp_path, seen=lambda found: found in ledger, archive="leave")
    box.put("s/a.png")
    box.scan()
    with monkeypatch.context() as failing:
        listed = os.scandir
        failed: list[str | Path] = []

        def scandir(path: str | Path) -> object:
            if os.fspath(path).endswith("/s") and not failed:
                failed.append(path)
                raise OSError(errno.EIO, "once")
            return listed(path)

        failing.setattr(os, "scandir", scandir)
        box.scan(after=0.5, named={"s"})
        assert failed
    (unit,) = box.scan(after=3)
    ledger.update(unit.files)
    assert [unit for _ in range(8) for unit in box.scan(after=10)] == []


# ---- what a scan costs


def test_a_file_is_opened_once_and_forgotten_when_it_goes(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counting(path: Path) -> Peek:
        opened.append(path.name)
        return peek(path)

    monkeypatch.setattr(mura_batch.inbox, "peek", counting)
    path = box.put("s/a.png")
    box.put("s/b.png")
    for _ in range(5):
        box.scan(after=1)
    assert sorted(opened) == ["a.png", "b.png"]
    path.write_bytes(b"changed")
    box.scan()
    box.scan()
    assert sorted(opened) == ["a.png", "a.png", "b.png"]
    shutil.rmtree(box.root / "s")
    box.scan()
    assert (list(box.inbox._folders), box.inbox._observed) == ([""], {})


def test_read_only_inbox_asks_the_ledger_once_for_each_file(tmp_path: Path) -> None:
    asked: list[str] = []
    ledger: set[FoundFile] = set()

    def seen(found: FoundFile) -> bool:
        asked.append(found.name)
        return found in ledger

    box = Box(tmp_path, seen=seen, archive="leave")
    box.put("s/a.png")
    box.put("s/b.png")
    box.scan()
    (unit,) = box.scan(after=2)
    ledger.update(unit.files)
    assert box.scan(after=10) == []
    box.scan(after=10)
    assert len(asked) <= 4
    asked.clear()
    assert [box.scan(after=10) for _ in range(5)] == [[]] * 5
    assert asked == []
    box.put("s/late.png")
    box.put("s/b.png", b"changed")
    box.scan()
    (unit,) = box.scan(after=2)
    assert [f.name for f in unit.files] == ["s/b.png", "s/late.png"]

    after_restart = Box(tmp_path, seen=seen, archive="leave")
    ledger.update(unit.files)
    assert after_restart.units() == {}
    assert (after_restart.inbox.waiting, after_restart.inbox.refused) == (0, 0)


def test_ledger_is_not_asked_where_files_move(tmp_path: Path) -> None:
    box = Box(tmp_path, seen=lambda _: True)
    box.put("a.png")
    assert list(box.units()) == [(Kind.FILE, "a.png")]
