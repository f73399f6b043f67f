from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from mura_batch import database, doctor
from mura_batch.area import Area
from mura_batch.config import STATUS_FILE, Settings
from mura_batch.daemon import Daemon
from mura_batch.doctor import Mount, examine, mount_of
from mura_batch.errors import Misconfigured
from mura_batch.lock import LOCK_FILE, is_watched
from mura_batch.records import ClaimedFile, ClaimRecord
from mura_batch.store import Store
from mura_batch.study import Kind
from mura_batch.weights import WeightsStore


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template")
    settings = Settings(home=home)
    for folder in (settings.work, settings.archive_dir, settings.quarantine):
        folder.mkdir()
    settings.inbox_dir.mkdir()
    settings.overlays_dir.mkdir()
    database.upgrade(settings.database_url)
    WeightsStore(settings.weights_dir).install_bundled()
    return home


@pytest.fixture
def site(template: Path, tmp_path: Path) -> Settings:
    """A home as `mura-batch init --no-fetch` leaves it."""
    return Settings(home=shutil.copytree(template, tmp_path / "home"))


def wrong(settings: Settings) -> list[str]:
    return [finding.what for finding in examine(settings) if not finding.ok]


def one_wrong(settings: Settings) -> str:
    (what,) = wrong(settings)
    return what


def test_a_fresh_site_is_well_and_its_weights_are_named(site: Settings) -> None:
    findings = list(examine(site))
    assert [finding.what for finding in findings if not finding.ok] == []
    (weights,) = [finding.what for finding in findings if "bundled weights" in finding.what]
    assert all(area in weights for area in Area)
    assert "mura-batch models fetch" in weights


def test_a_missing_home_is_all_that_is_said(tmp_path: Path) -> None:
    (finding,) = examine(Settings(home=tmp_path / "nowhere"))
    assert not finding.ok
    assert "mura-batch init" in finding.what


# ---- folders and file systems


def test_a_missing_folder_is_named_with_the_command_that_makes_it(site: Settings) -> None:
    site.archive_dir.rmdir()
    assert one_wrong(site) == f"{site.archive_dir} is missing: run `mura-batch init`."


def test_a_file_where_a_folder_should_be(site: Settings) -> None:
    site.quarantine.rmdir()
    site.quarantine.touch()
    assert "is not a folder" in one_wrong(site)


FIRST = """
import os, sys
from pathlib import Path
from mura_batch.config import Settings
from mura_batch.doctor import examine
if os.geteuid() == 0:
    os.setuid(65534)  # root may do everything
for finding in examine(Settings(home=Path(sys.argv[1]), archive=sys.argv[2])):
    print(finding.ok, finding.what)
    if finding.ok:
        break
"""


@pytest.fixture
def open_home(template: Path) -> Iterator[Path]:
    """A home that other users can reach, with folders that they can read but not write."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        home = Path(scratch) / "home"
        shutil.copytree(template, home)
        (home / "inbox" / "ward 3").mkdir()
        for folder in (home, *home.rglob("*")):
            folder.chmod(0o555 if folder.is_dir() else 0o444)
        yield home
        for folder in (home, *home.rglob("*")):
            folder.chmod(0o755)


@pytest.mark.parametrize("archive", ["move", "leave"])
def test_folders_without_the_needed_rights_are_named(open_home: Path, archive: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", FIRST, open_home, archive],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"False {open_home / 'work'} cannot be read and written" in told
    inbox = f"{open_home / 'inbox'} cannot be" in told
    below = "1 folders in the inbox cannot be" in told
    assert (inbox, below) == ((archive == "move",) * 2)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/srv/inbox/a", Mount("/srv/inbox", "nfs4")),
        ("/srv/inbox", Mount("/srv/inbox", "nfs4")),
        ("/srv/inboxes", Mount("/", "ext4")),
        ("/mnt/films of today/x", Mount("/mnt/films of today", "cifs")),
    ],
)
def test_a_path_lies_on_the_innermost_mount_around_it(path: str, expected: Mount) -> None:
    table = (
        "/dev/a / ext4 rw 0 0\nh:/x /srv/inbox nfs4 rw 0 0\n"
        "//h/y /mnt/films\\040of\\040today cifs rw 0 0\n"
    )
    assert mount_of(Path(path), table) == expected
    assert mount_of(Path(path), table).remote == (expected.kind != "ext4")


def test_an_inbox_on_a_share_wants_polling(
    site: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mounts"
    table.write_text(f"/dev/a / ext4 rw 0 0\nnas:/x {site.inbox_dir} nfs4 rw 0 0\n")
    monkeypatch.setattr(doctor, "MOUNTS", table)
    assert 'watch = "polling"' in one_wrong(site)
    assert wrong(replace(site, watch="polling")) == []


def test_a_database_on_a_share_is_told(
    site: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mounts"
    table.write_text(f"/dev/a / ext4 rw 0 0\nnas:/x {site.home} fuse.sshfs rw 0 0\n")
    monkeypatch.setattr(doctor, "MOUNTS", table)
    assert any("The database lies on a network share" in what for what in wrong(site))


def test_a_full_disk_is_told(site: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as shutil makes it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**8, 10**8))
    assert "0.1 GB are free" in one_wrong(site)


def test_more_folders_than_may_be_watched(
    site: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        (site.inbox_dir / str(number)).mkdir()
    (tmp_path / "max_user_watches").write_text("10\n")
    monkeypatch.setattr(doctor, "LIMITS", tmp_path)
    assert "10 folders and the user may watch 10" in one_wrong(site)


# ---- daemon, weights, devices


def test_a_running_daemon_is_seen_and_a_silent_one_is_told(site: Settings) -> None:
    assert not is_watched(site.home)
    with (site.home / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_watched(site.home)
        assert wrong(site) == []
        for minutes, silent in ((1, False), (20, True)):
            last = datetime.now(UTC) - timedelta(minutes=minutes)
            (site.home / STATUS_FILE).write_text(f'{{"last_scan_at": "{last.isoformat()}"}}')
            assert any("20 minutes" in what for what in wrong(site)) == silent
    assert not is_watched(site.home)


def test_damaged_weights_are_told_with_the_way_out(site: Settings) -> None:
    (file,) = (site.weights_dir / "files").glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.write(b"\0")
    told = wrong(site)
    assert len(told) == len(Area)  # each area's card names the file
    assert all("damaged" in what and "models fetch" in what for what in told)


def test_an_area_without_weights_is_told_with_the_command(site: Settings) -> None:
    (site.weights_dir / "XR_HAND" / "active.json").unlink()
    assert one_wrong(site).startswith("XR_HAND has no weights: run `mura-batch models fetch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_decoding_on_a_gpu_that_is_not_here_is_told_and_stops_the_daemon(site: Settings) -> None:
    """Whether nvImageCodec is installed or not."""
    wanted = replace(site, gpu_decode=True)
    told = one_wrong(wanted)
    assert "gpu_decode" in told
    assert "set it to false" in told or "pip install 'nvidia-nvimgcodec-cu12[all]" in told
    with pytest.raises(Misconfigured, match="gpu_decode"):
        Daemon(wanted).run(once=True)


def test_a_device_that_is_not_here(site: Settings) -> None:
    assert "cuda:99" in one_wrong(replace(site, device="cuda:99"))


# ---- the database, and what it does not know


def lose(settings: Settings) -> None:
    Path(settings.database_url.removeprefix("sqlite:///")).unlink()


def spoil(settings: Settings) -> None:
    Path(settings.database_url.removeprefix("sqlite:///")).write_bytes(b"no database" * 99)


@pytest.mark.parametrize(("harm", "cure"), [(lose, "db upgrade"), (spoil, "restore a backup")])
def test_a_bad_database_is_told(
    site: Settings, harm: Callable[[Settings], None], cure: str
) -> None:
    harm(site)
    assert cure in one_wrong(site)


def aged(path: Path) -> Path:
    """The same, made an hour ago."""
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    return path


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_what_the_database_does_not_know_is_told(site: Settings) -> None:
    aged(folder(site.work / "20260101T000000000000-aa"))
    folder(site.archive_dir / "0123456789ab" / "lost-in-archive")
    folder(site.quarantine / "0123456789ab" / "lost-in-quarantine")
    picture = folder(site.overlays_dir / "ab" / "abcd") / "0-0.png"
    picture.touch()
    aged(picture)
    told = "\n".join(wrong(site))
    assert "1 claims in work, such as '20260101T000000000000-aa': start" in told
    assert "lost-in-archive" in told
    assert "lost-in-quarantine" in told
    assert "'overlays/ab/abcd/0-0.png': they may be deleted" in told


def test_what_may_be_on_its_way_is_no_orphan(site: Settings) -> None:
    folder(site.work / "just-claimed")
    (site.overlays_dir / "just-drawn.png").touch()
    assert wrong(site) == []


def test_what_the_database_knows_is_no_orphan(site: Settings) -> None:
    claim = ClaimRecord(
        id="a-claim",
        kind=Kind.FILE,
        key="hand.png",
        received_at=datetime.now(UTC),
        settled_by="quiet",
        files=(ClaimedFile("hand.png", "0" * 64, 1, 1, 1),),
    )
    with Store.open(site.database_url) as store:
        study = store.record([claim], 24.0)[0].study_id
    for place in (site.archive_dir, site.quarantine):
        folder(place / study / "a-claim")
    aged(folder(site.work / "a-claim"))
    assert wrong(site) == []
