"""The files of deploy/ against the tools that will read them."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mura_batch import config
from mura_batch.area import Area

REPOSITORY = Path(__file__).parent.parent
DEPLOY = REPOSITORY / "deploy"
UNIT = DEPLOY / "mura-batch.service"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes users and folders: needs root")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (Debian package systemd) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def service_lines() -> list[str]:
    """The ``Name=value`` lines of the unit's [Service] section, in their order."""
    section = UNIT.read_text(encoding="utf-8").split("[Service]")[1].split("[Install]")[0]
    return [line for line in section.splitlines() if re.match(r"[A-Z]\w+=", line)]


def test_the_unit_is_clean_for_systemd() -> None:
    done = run("systemd-analyze", "verify", UNIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_sandbox_leaves_an_exposure_below_two() -> None:
    done = run("systemd-analyze", "security", "--offline=true", UNIT)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 2.0


@needs_root
@pytest.mark.skipif(
    not Path("/run/systemd/system").is_dir(), reason="systemd does not run this machine"
)
def test_the_network_runs_inside_the_sandbox_on_every_core() -> None:
    """The runtimes write machine code and bind threads to cores: the sandbox has to let them."""
    ours = ("Type", "Notify", "Exec", "Timeout", "Watchdog", "Restart", "Working", "User", "Group")
    properties = [f"--property={line}" for line in service_lines() if not line.startswith(ours)]
    script = f"""
import os, sys
sys.path[:0] = {[str(REPOSITORY), *sys.path]!r}
import torch
from mura_batch.network import EvidenceNet
with torch.inference_mode():
    logit, _ = EvidenceNet().eval()(torch.rand(1, 3, 64, 64))
print(len(logit), torch.get_num_threads() == len(os.sched_getaffinity(0)))
"""
    done = run(
        *("systemd-run", "--wait", "--pipe", "--quiet", *properties),
        "--property=ProtectHome=no",  # the interpreter of a checkout may lie there
        *(sys.executable, "-c", script),
    )
    assert done.stdout.split() == ["1", "True"], done.stderr


@needs_root
def test_user_and_folders_are_made_as_the_unit_wants_them(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    made = run("systemd-sysusers", f"--root={tmp_path}", DEPLOY / "sysusers.conf")
    assert made.returncode == 0, made.stderr
    password_file = (tmp_path / "etc" / "passwd").read_text(encoding="utf-8")
    user, group = re.findall(r"^mura-batch:x:(\d+):(\d+):", password_file, re.MULTILINE)[0]
    made = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", DEPLOY / "tmpfiles.conf")
    assert made.returncode == 0, made.stderr
    home = (tmp_path / "var/lib/mura-batch").stat()
    inbox = (tmp_path / "var/lib/mura-batch/inbox").stat()
    assert stat.S_IMODE(home.st_mode) == 0o750
    assert stat.S_IMODE(inbox.st_mode) == 0o2770
    assert {(s.st_uid, s.st_gid) for s in (home, inbox)} == {(int(user), int(group))}


def test_the_example_config_is_accepted_and_says_what_it_shows(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "config.toml", tmp_path / "config.toml")
    settings = config.load(tmp_path, {})
    assert settings.operating_point == "high_sensitivity"
    assert settings.watch == "polling"
    assert settings.rules.words["Navi"] is Area.XR_WRIST
    assert settings.rules.shoulder_girdle


def test_every_file_that_the_steps_name_is_there() -> None:
    steps = (DEPLOY / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:deploy|requirements)/[\w.-]+", steps))
    assert {"deploy/mura-batch.service", "requirements/run.txt"} <= named
    assert [name for name in sorted(named) if not (REPOSITORY / name).is_file()] == []


def test_every_path_that_the_container_copies_is_there() -> None:
    lines = (DEPLOY / "Containerfile").read_text(encoding="utf-8").splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--" not in line]
    paths = [path for sources in copies for path in sources]
    assert "mura_batch" in paths
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
