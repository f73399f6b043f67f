"""Nothing is lost and nothing counted twice when the installed daemon is killed, anywhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

from site_home import SAMPLES, Home, film, make_home, sha256

STEPS = (
    "claimed",
    "recorded",
    "taken",
    "decided",
    "decoded",
    "scored",
    "overlay",
    "committed",
    "moved",
)
KILLER = Path(__file__).parent / "kill_at"
PATH = os.pathsep.join(filter(None, (str(KILLER), os.environ.get("PYTHONPATH"))))


def drop(home: Home, number: int) -> Counter[str]:
    """Drop a folder of two films, a loose film, a truncated one and one nobody can place."""
    inbox = home.inbox
    folder = f"XR_HAND/patient{number:05}/study1_positive"
    files = [
        film(inbox / folder / "image1.png", 4 * number),
        film(inbox / folder / "image2.png", 4 * number + 1),
        film(inbox / f"elbow {number}.png", 4 * number + 2),
        film(inbox / f"somewhere {number}.png", 4 * number + 3),
    ]
    broken = inbox / f"wrist {number}.png"
    broken.write_bytes(files[0].read_bytes()[: 2000 + number])
    return Counter(sha256(file) for file in (*files, broken))


def rows(home: Home) -> list[dict[str, object]]:
    answer = home.command("query", "--json")
    assert answer.returncode == 0, answer.stderr
    found: list[dict[str, object]] = json.loads(answer.stdout)
    return found


def check(home: Home, dropped: Counter[str], rounds: int) -> None:
    """Compare what lies in the home with what was dropped, and the rows with their keys."""
    assert home.contents() == dropped
    found = rows(home)
    assert Counter(row["state"] for row in found) == {
        "done": 2 * rounds,
        "quarantined": rounds,
        "needs_area": rounds,
    }
    assert not list((home.path / "inbox").rglob("*.png"))
    archived = list((home.path / "archive").rglob("*.png"))
    assert len(archived) == 3 * rounds
    with sqlite3.connect(home.path / "results.db") as database:
        keys = database.execute(
            "select digest, area, weights, count(*) from results group by 1, 2, 3"
        ).fetchall()
    assert len(keys) == 2 * rounds
    assert all(count == 1 for *_, count in keys)


def test_killed_after_every_named_step(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    dropped: Counter[str] = Counter()
    for number, step in enumerate(STEPS):
        dropped += drop(home, number)
        killed = home.command("-v", "watch", "--once", KILL_AT=step, PYTHONPATH=PATH)
        assert killed.returncode == -signal.SIGKILL, (step, killed.stderr)
        assert home.contents() == dropped, step
    last = home.command("watch", "--once")
    assert last.returncode == 3, last.stderr
    check(home, dropped, len(STEPS))


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    chance = random.Random(20)  # noqa: S311 - moments, not secrets
    dropped: Counter[str] = Counter()
    for number in range(20):
        dropped += drop(home, number)
        daemon = home.start("watch")
        time.sleep(chance.uniform(0.2, 4.0))
        daemon.kill()
        daemon.wait()
        assert home.contents() == dropped
    last = home.command("watch", "--once")
    assert last.returncode == 3, last.stderr
    check(home, dropped, 20)


def test_a_terminated_daemon_finishes_what_it_began_and_leaves_with_0(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    shutil.copy(SAMPLES / "elbow_lateral.png", home.inbox)
    daemon = home.start("watch")
    deadline = time.monotonic() + 120
    while not any((home.path / "archive").rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.1)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0
    assert [row["state"] for row in rows(home)] == ["done"]


def test_a_study_that_ends_the_program_whenever_it_is_tried_fails(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", attempts="1")
    killer = film(home.inbox / "hand.png", 1)
    for _ in range(4):
        killed = home.command("-v", "watch", "--once", KILL_AT="decoded", PYTHONPATH=PATH)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    film(home.inbox / "elbow.png", 2)
    assert not killer.exists()
    last = home.command("-v", "watch", "--once", KILL_AT="never", PYTHONPATH=PATH)
    assert last.returncode == 3, last.stderr
    assert {str(row["source"]): row["state"] for row in rows(home)} == {
        "hand.png": "failed",
        "elbow.png": "done",
    }
    assert any("interrupted: " in str(row["reason"]) for row in rows(home))
