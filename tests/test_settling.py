"""When what lies in the inbox has settled: counted from the first look, and found out at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from inbox_box import Box
from site_home import make_home

from mura_batch import inbox
from mura_batch.config import Settings
from mura_batch.daemon import Daemon
from mura_batch.demo import drop_samples
from mura_batch.wakeup import Wakeup


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_what_is_there_at_the_first_look_settles_from_then_on(box: Box) -> None:
    box.put("quiet/a.png")
    box.put("grows/a.png")
    box.put("ready/a.png")
    box.put("ready/.ready")
    box.inbox.look()
    box.put("grows/b.png")
    assert [unit.key for unit in box.scan(after=1.0)] == ["ready"]
    shutil.rmtree(box.root / "ready")
    assert (box.inbox.waiting, box.inbox.due) == (2, 102.0)
    assert [unit.key for unit in box.scan(after=1.0)] == ["quiet"]
    assert (box.inbox.waiting, box.inbox.due) == (1, 103.0)


def test_a_first_look_asks_nothing_of_the_ledger(tmp_path: Path) -> None:
    box = Box(tmp_path, seen=lambda _: pytest.fail("asked"), archive="leave")
    box.put("s/a.png")
    box.inbox.look()


def test_many_files_are_not_looked_at_before_the_first_scan(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "_FEW", 3)
    for folder in "abc":
        box.put(f"{folder}/1.png")
    box.inbox.look()
    assert len(box.scan(after=2)) == 3
    again = Box(box.settings.home)
    box.put("d/1.png")
    again.inbox.look()
    assert again.scan(after=2) == []
    assert len(again.scan(after=2)) == 4


def test_the_daemon_waits_no_longer_than_until_the_first_study_has_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    wait = Wakeup.wait

    def noted(self: Wakeup, timeout: float) -> set[str]:
        waits.append(timeout)
        return wait(self, timeout)

    monkeypatch.setattr(Wakeup, "wait", noted)
    site = Settings(home=make_home(tmp_path).path, settle_seconds=1.6, runtime="torch")
    drop_samples(site.inbox_dir)
    Daemon(site).run(once=True)
    assert waits[0] <= 0.8  # half of what it takes: it might change
    assert waits[1] < 0.8  # what is left since the first look
