"""Settings: defaults, file, environment; all problems reported together."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mura_batch.area import Area
from mura_batch.config import Settings, commented_toml, load
from mura_batch.errors import Misconfigured


def test_the_environment_stands_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('batch = 4\narchive = "leave"\nignore = ["*.xml"]\n')
    settings = load(tmp_path, {"MURA_BATCH_BATCH": "8", "MURA_BATCH_OVERLAYS": "no"})
    assert (settings.batch, settings.archive, settings.ignore) == (8, "leave", ("*.xml",))
    assert settings.overlays is False
    assert settings.settle_seconds == Settings(home=tmp_path).settle_seconds


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        'batch = -1\ncolour = "red"\narchive = "burn"\n[areas]\nwords = {"x" = "XR_KNEE"}\n'
    )
    with pytest.raises(Misconfigured) as caught:
        load(tmp_path, {"MURA_BATCH_THRESHOLD": "2", "MURA_BATCH_SETTLE_SECONDS": "soon"})
    for word in ("batch", "colour", "burn", "XR_KNEE", "threshold", "settle_seconds"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "settle_seconds = [1]",
        "settle_seconds = nan",
        "settle_seconds = true",
        "batch_seconds = nan",
        "batch_seconds = -1",
        "late_hours = -5",
        "late_hours = inf",
        "late_hours = 1e11",
        "attempts = 2.9",
        'batch = "many"',
        f"batch = 1{'0' * 400}",
        "inbox = 3",
        'inbox = "\\u0000"',
        'inbox = "~nobody at all/inbox"',
        "ignore = 3",
        "ignore = [3]",
        "device = 3",
        'overlays = "false"',
        "archive = [1]",
        '[areas]\nwords = "x"',
        '[areas]\nwords = {x = ["XR_HAND"]}',
        '[areas]\nshoulder_girdle = "false"',
    ],
)
def test_a_value_of_the_wrong_kind_is_a_problem_beside_others(tmp_path: Path, line: str) -> None:
    (tmp_path / "config.toml").write_text(f'colour = "red"\n{line}\n')
    name = line.removeprefix("[areas]\n").split(" ")[0]
    with pytest.raises(Misconfigured, match=f"colour: .*{name}: |{name}: .*colour: ") as caught:
        load(tmp_path, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "inbox", ["home", ".", "home/work", "home/archive/films", "home/quarantine", "link", "loop/.."]
)
def test_an_inbox_that_holds_what_the_program_keeps_is_refused(tmp_path: Path, inbox: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(Misconfigured, match="inbox: .* name a folder of its own"):
        load(tmp_path / "home", {"MURA_BATCH_INBOX": str(tmp_path / inbox)})


@pytest.mark.parametrize("inbox", ["home/inbox", "home/films/in", "inbox", "home2"])
def test_an_inbox_may_lie_in_the_home_or_beside_it(tmp_path: Path, inbox: str) -> None:
    place = tmp_path / inbox
    assert load(tmp_path / "home", {"MURA_BATCH_INBOX": str(place)}).inbox_dir == place


def test_a_broken_file_says_where(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("batch = = 3")
    with pytest.raises(Misconfigured, match=r"config\.toml"):
        load(tmp_path, {})


def test_the_commented_file_is_the_defaults(tmp_path: Path) -> None:
    text = commented_toml()
    (tmp_path / "config.toml").write_text(text)
    assert load(tmp_path, {}) == Settings(home=tmp_path)
    active = "\n".join(
        line.removeprefix("# ") for line in text.splitlines() if " = " in line or "[" in line
    )
    (tmp_path / "config.toml").write_text(active)
    again = load(tmp_path, {})
    assert tomllib.loads(active)["batch"] == again.batch
    assert again.rules.words == {"Hd li": Area.XR_HAND}


@pytest.mark.parametrize("text", ["maybe", "2"])
def test_a_flag_is_true_or_false(tmp_path: Path, text: str) -> None:
    with pytest.raises(Misconfigured, match="overlays"):
        load(tmp_path, {"MURA_BATCH_OVERLAYS": text})
