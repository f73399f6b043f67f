"""The wait for events: real ones of real folders, and those that fail."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from inbox_box import Box
from watchdog.observers.api import BaseObserver

import mura_batch.inbox
import mura_batch.wakeup
from mura_batch.custody import Custody
from mura_batch.study import Kind
from mura_batch.wakeup import Wakeup


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def waited(wakeup: Wakeup, most: float = 20.0) -> float:
    started = time.monotonic()
    wakeup.wait(most)
    return time.monotonic() - started


def quiet(wakeup: Wakeup) -> None:
    """Wait until the events of what was just done have all come."""
    while waited(wakeup, 0.5) < 0.4:
        pass


def test_new_files_end_the_wait_and_our_own_work_does_not(box: Box) -> None:
    box.put("old/a.png")
    with Wakeup(box.settings) as wakeup:
        assert wakeup.mode == "events"
        box.put("new.png")
        assert waited(wakeup) < 10
        quiet(wakeup)
        box.scan()
        claims = [Custody(box.settings).claim(unit) for unit in box.scan(after=2)]
        assert len(claims) == 2
        assert waited(wakeup, 1.5) >= 1.4, "scans and claims must not wake the next scan"
        box.put("old/b.png")
        assert waited(wakeup) < 10
    assert wakeup.mode == "polling"


def test_a_file_wakes_when_it_comes_and_when_it_is_whole_not_at_every_write(box: Box) -> None:
    with Wakeup(box.settings) as wakeup, box.put("slow.png").open("ab") as stream:
        quiet(wakeup)
        for _ in range(5):
            stream.write(b"more")
            stream.flush()
        assert waited(wakeup, 1) >= 0.9
        stream.close()
        assert waited(wakeup) < 10


def test_an_inbox_that_is_a_link_has_events_too(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    box = Box(tmp_path / "home", inbox=tmp_path / "link")
    with Wakeup(box.settings) as wakeup:
        box.put("a.png")
        assert wakeup.wait(20) == {""}


def test_events_name_the_folders_to_look_into(box: Box, tmp_path: Path) -> None:
    box.put("old/a.png")
    outside = tmp_path / "elsewhere"
    (outside / "study1").mkdir(parents=True)
    with Wakeup(box.settings) as wakeup:
        named = set()
        box.put("loose.png")
        box.put("old/b.png")
        box.put("new/deep/c.png")
        outside.rename(box.root / "moved")
        deadline = time.monotonic() + 10
        while not named >= {"", "old", "new", "moved"} and time.monotonic() < deadline:
            named |= wakeup.wait(1)
    assert named >= {"", "old", "new", "moved"}
    assert named <= {"", "old", "new", "new/deep", "moved", "moved/study1"}


def test_polling_waits_without_events_and_can_be_ended(box: Box, tmp_path: Path) -> None:
    with Wakeup(Box(tmp_path, watch="polling").settings) as wakeup:
        assert wakeup.mode == "polling"
        box.put("new.png")
        assert waited(wakeup, 0.3) >= 0.25
        wakeup.wake()
        wakeup.wake()
        assert waited(wakeup) < 10
        assert waited(wakeup, 0.3) >= 0.25


def test_no_more_watches_means_polling(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: BaseObserver) -> None:  # what fs.inotify.max_user_watches does
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(BaseObserver, "start", refuse)
    box.put("a.png")
    with Wakeup(box.settings) as wakeup:
        assert wakeup.mode == "polling"
        assert waited(wakeup, 0.2) >= 0.15
        assert len(box.units()) == 1


def test_missing_inbox_means_polling(box: Box) -> None:
    box.root.rmdir()
    with Wakeup(box.settings) as wakeup:
        assert wakeup.mode == "polling"


def test_dead_observer_costs_only_latency(box: Box) -> None:
    with Wakeup(box.settings) as wakeup:
        assert wakeup._observer is not None
        wakeup._observer.stop()
        wakeup._observer.join()
        box.put("a.png")
        wakeup.wait(0.2)
        assert wakeup.mode == "polling"
        assert len(box.units()) == 1


def test_exception_in_the_handler_costs_only_latency(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Wakeup(box.settings) as wakeup:
        assert wakeup._observer is not None
        monkeypatch.setattr(mura_batch.wakeup._Hint, "on_any_event", lambda *_: "" + 1)
        box.put("a.png")
        wakeup._observer.join(timeout=10)
        wakeup.wait(0.2)
        assert wakeup.mode == "polling"
        assert len(box.units()) == 1


def deep(folder: Path, levels: int) -> Path:
    """Make folders in each other, more than one path can name, with a file in the deepest."""
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("wrong.png", os.O_CREAT, dir_fd=here))
    os.close(here)
    return folder


def test_a_tree_too_deep_for_watches_means_polling(box: Box) -> None:
    deep(box.root / "tree", 1300)
    try:
        box.put("a.png")
        with Wakeup(box.settings) as wakeup:
            assert wakeup.mode == "polling"
            assert list(box.units()) == [(Kind.FILE, "a.png")]
    finally:
        subprocess.run(["rm", "-rf", box.root / "tree"], check=True)


def test_a_tree_too_deep_that_is_moved_in_costs_only_latency(
    box: Box, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    tree = deep(tmp_path / "tree", 1300)
    try:
        with Wakeup(box.settings) as wakeup:
            tree.rename(box.root / "Doe_Jane")
            deadline = time.monotonic() + 10
            while wakeup.mode == "events" and time.monotonic() < deadline:
                wakeup.wait(0.2)
            assert wakeup.mode == "polling"
        assert threading.excepthook is threading.__excepthook__
        assert capfd.readouterr().err == ""
    finally:
        subprocess.run(["rm", "-rf", tree, box.root / "Doe_Jane"], check=True)


CHURN = """
import os, sys, shutil, time
from pathlib import Path
from mura_batch.config import Settings
from mura_batch.wakeup import Wakeup

settings = Settings(home=Path(sys.argv[1]))
with Wakeup(settings) as wakeup:
    for turn in range(200):
        folder = settings.inbox_dir / "Doe_Jane"
        (folder / "study1" / "w").mkdir(parents=True)
        folder.rename(settings.inbox_dir / f"Doe_{turn}")
        shutil.rmtree(settings.inbox_dir / f"Doe_{turn}")
    wakeup.wait(1)
"""


def test_folders_that_come_and_go_quickly_are_not_named_on_standard_error(box: Box) -> None:
    command = [sys.executable, "-c", CHURN, box.settings.home]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Doe" not in told.stderr
