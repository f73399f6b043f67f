"""What may be wrong with a site, and what to do about it; nothing is changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from sqlalchemy import select

from mura_batch import database
from mura_batch import engine as engines
from mura_batch.area import Area
from mura_batch.config import STATUS_FILE, Settings
from mura_batch.errors import Misconfigured, MuraError
from mura_batch.gpu_decode import decode_on_gpu
from mura_batch.lock import is_watched
from mura_batch.reader import REVISION, sqlite_path
from mura_batch.schema import files, views
from mura_batch.wakeup import Wakeup
from mura_batch.weights import WeightsStore

MOUNTS = Path("/proc/mounts")
LIMITS = Path("/proc/sys/fs/inotify")

_NETWORK = {"9p", "afs", "ceph", "cifs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4"} | {
    *("smb3", "smbfs", "vboxsf", "fuse.sshfs", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs"),
    *("fuse.smbnetfs", "fuse.davfs", "davfs"),
}
_LOW_BYTES = 2e9
_MANY = 0.8  # of the inotify watches
_FRESH_SECONDS = 900.0  # what is younger may be on its way through a running daemon
_SILENT_SECONDS = 600.0  # a daemon that scans says so every few seconds
_SYNTAXES = (
    *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian),
    *(JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1),
    *(JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000),
    *(HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K, RLELossless),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: a sentence; where it is not ``ok``, it says what to do.
    """

    ok: bool
    what: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield what is found, one thing after another; a home that is missing ends it."""
    if not settings.home.is_dir():
        yield Finding(ok=False, what=f"{settings.home} is missing: run `mura-batch init`.")
        return
    yield from _folders(settings)
    yield from _file_systems(settings)
    yield from _events(settings)
    yield from _daemon(settings)
    yield from _weights(WeightsStore(settings.weights_dir))
    yield from _database(settings)
    yield from _devices(settings)
    yield from _codecs(settings)


# ---- folders and file systems


def _folders(settings: Settings) -> Iterator[Finding]:
    """Look at the permissions of every folder that the daemon works in."""
    read_only = settings.archive == "leave"
    ours = [
        *(settings.home, settings.work, settings.archive_dir, settings.quarantine),
        *(settings.overlays_dir, settings.weights_dir),
    ]
    problems = [p for folder in ours if (p := _access(folder, os.R_OK | os.W_OK | os.X_OK))]
    wanted = os.R_OK | os.X_OK | (0 if read_only else os.W_OK)
    problems += [p for p in (_access(settings.inbox_dir, wanted),) if p]
    closed = [f for f in _below(settings.inbox_dir) if not os.access(f, wanted)]
    if closed:
        verb = "read" if read_only else "read and emptied"
        problems.append(
            f"{len(closed)} folders in the inbox cannot be {verb}, such as {_shown(closed[0])}:"
            f" give {_user()} the right to."
        )
    for problem in problems:
        yield Finding(ok=False, what=problem)
    if not problems:
        yield Finding(ok=True, what="All folders of the home and the inbox can be used.")


def _access(folder: Path, wanted: int) -> str:
    """Return what is wrong with a folder; empty where nothing is."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return f"{folder} is missing: run `mura-batch init`."
    except OSError as exc:
        return f"{folder} cannot be reached ({exc.strerror}): give {_user()} the right to."
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder: move it away and run `mura-batch init`."
    if os.access(folder, wanted):
        return ""
    verb = "read and written" if wanted & os.W_OK else "read"
    return f"{folder} cannot be {verb}: give {_user()} the right to (chown, chmod)."


def _user() -> str:
    return f"the user {os.geteuid()}"


def _shown(path: Path) -> str:
    """Return a path from outside without its odd bytes."""
    return ascii(str(path))


def _below(folder: Path) -> list[Path]:
    """Return every folder below ``folder``."""
    return [Path(root) for root, _, _ in os.walk(folder)][1:]


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a file system is mounted, and of what kind it is (``ext4``, ``nfs4`` …)."""

    point: str
    kind: str

    @property
    def remote(self) -> bool:
        """Whether other machines can change files here without an event on this one."""
        return self.kind in _NETWORK


def mount_of(path: Path, table: str) -> Mount:
    """Return the mount that ``path`` lies on, by a table in the form of ``/proc/mounts``."""
    real = os.path.realpath(path)
    found = Mount("/", "")
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 3:  # noqa: PLR2004 - device, mount point, kind
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found.point):
            found = Mount(point, fields[2])
    return found


def _file_systems(settings: Settings) -> Iterator[Finding]:
    try:
        table = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        table = ""  # not Linux
    inbox = mount_of(settings.inbox_dir, table)
    if inbox.remote and settings.watch != "polling":
        yield Finding(
            ok=False,
            what=f"The inbox lies on a network share ({inbox.kind}), whose changes cause no"
            ' events: set watch = "polling" in config.toml.',
        )
    database_file = sqlite_path(settings.database_url)
    if database_file is not None and (share := mount_of(database_file, table)).remote:
        yield Finding(
            ok=False,
            what=f"The database lies on a network share ({share.kind}), which SQLite cannot lock"
            " safely: set `database` to a file on a local disk, or to PostgreSQL.",
        )
    yield from _renames(settings)
    yield from _free_disk(settings)


def _renames(settings: Settings) -> Iterator[Finding]:
    """Say where a move is a copy, because two folders lie on different file systems."""
    places = [settings.archive_dir, settings.quarantine]
    if settings.archive != "leave":
        places.insert(0, settings.inbox_dir)
    with suppress(OSError):  # a missing folder was named before
        home = settings.work.stat().st_dev
        apart = [str(place) for place in places if place.stat().st_dev != home]
        if apart:
            yield Finding(
                ok=True,
                what=f"{', '.join(apart)}: on another file system than {settings.work}, so files"
                " are copied and not renamed; put them on one for more speed.",
            )
        else:
            yield Finding(ok=True, what="Inbox and home are on one file system: moves are renames.")


def _free_disk(settings: Settings) -> Iterator[Finding]:
    seen: set[int] = set()
    for place in (settings.home, settings.inbox_dir):
        with suppress(OSError):
            device = place.stat().st_dev
            usage = shutil.disk_usage(place)
            if device in seen:
                continue
            seen.add(device)
            left = f"{usage.free / 1e9:.1f} GB are free where {place} lies"
            if usage.free < _LOW_BYTES:
                yield Finding(
                    ok=False, what=f"Only {left}: make room, or move the archive elsewhere."
                )
            else:
                yield Finding(ok=True, what=f"{left}.")


def _events(settings: Settings) -> Iterator[Finding]:
    """Try the daemon's own wake-up on the inbox, and compare its needs with the limits."""
    if settings.watch == "polling":
        yield Finding(ok=True, what="The inbox is polled, as config.toml says.")
        return
    if not settings.inbox_dir.is_dir():
        return
    with Wakeup(settings) as wakeup:
        works = wakeup.mode == "events"
    limits = {}
    for name in ("max_user_watches", "max_user_instances"):
        with suppress(OSError, ValueError):
            limits[name] = int((LIMITS / name).read_text())
    folders = len(_below(settings.inbox_dir)) + 1
    if not works:
        told = ", ".join(f"{name} {value}" for name, value in limits.items())
        yield Finding(
            ok=False,
            what=f"File system events cannot start, so the inbox is polled ({told}): raise"
            ' fs.inotify.* with sysctl, or set watch = "polling".',
        )
    elif folders > _MANY * (most := limits.get("max_user_watches", folders * 2)):
        yield Finding(
            ok=False,
            what=f"The inbox has {folders} folders and the user may watch {most}: raise"
            ' fs.inotify.max_user_watches with sysctl, or set watch = "polling".',
        )
    else:
        yield Finding(ok=True, what=f"File system events work ({folders} folders watched).")


# ---- the daemon and its weights


def _daemon(settings: Settings) -> Iterator[Finding]:
    if not is_watched(settings.home):
        yield Finding(ok=True, what="No `mura-batch watch` works in this home now.")
        return
    silence = _silence(settings)
    if silence is not None and silence > _SILENT_SECONDS:
        yield Finding(
            ok=False,
            what=f"`mura-batch watch` runs but has not scanned the inbox for {silence / 60:.0f}"
            " minutes: look at its log and restart it.",
        )
    else:
        yield Finding(ok=True, what="`mura-batch watch` works in this home.")


def _silence(settings: Settings) -> float | None:
    """Return the seconds since the daemon last told of a scan; None where it never did."""
    try:
        word = json.loads((settings.home / STATUS_FILE).read_text(encoding="utf-8"))
        last = datetime.fromisoformat(word["last_scan_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (datetime.now(UTC) - last).total_seconds()


def _weights(store: WeightsStore) -> Iterator[Finding]:
    problems = store.verify()
    for problem in problems:
        yield Finding(ok=False, what=f"{problem} (`mura-batch models fetch` or `models import`).")
    if not problems:
        yield Finding(ok=True, what="All stored weights are what their cards say (sha256).")
    running: dict[tuple[str, str, str], list[Area]] = {}
    for area in Area:
        try:
            card = store.active(area)
        except MuraError:
            continue  # verify has told of it
        if card is None:
            yield Finding(
                ok=False,
                what=f"{area} has no weights: run `mura-batch models fetch {area}`, or"
                " `mura-batch init` for the bundled ones.",
            )
        else:
            running.setdefault((card.origin, card.short, card.target), []).append(area)
    for (origin, short, target), areas in running.items():
        told = f"{', '.join(areas)}: {origin} weights {short}, trained to find: {target}"
        more = "; `mura-batch models fetch` gets the published ones" if origin == "bundled" else ""
        yield Finding(ok=True, what=f"{told}{more}.")


def _devices(settings: Settings) -> Iterator[Finding]:
    """Say what networks run on here, and whether that is what the settings ask for."""
    import torch  # noqa: PLC0415 - seconds, after all that is quick

    from mura_batch.runtime.torch_runtime import find_device  # noqa: PLC0415 - imports torch

    openvino = find_spec("openvino") is not None
    if settings.runtime == "openvino" and not openvino:
        yield Finding(
            ok=False,
            what="runtime = \"openvino\" is not installed: pip install 'mura-batch[openvino]', or"
            ' set runtime = "auto".',
        )
    try:
        device = find_device(settings.device)
    except Misconfigured as exc:
        yield Finding(ok=False, what=f"{exc}.")
        return
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    others = f"; GPUs here: {', '.join(names)}" if names else "; no GPU here"
    runtime = (
        "OpenVINO" if openvino and device == "cpu" and settings.runtime != "torch" else "torch"
    )
    yield Finding(ok=True, what=f"Networks run with {runtime} on {device}{others}.")


def _codecs(settings: Settings) -> Iterator[Finding]:
    if settings.gpu_decode:
        try:
            decode_on_gpu()
        except Misconfigured as exc:
            yield Finding(ok=False, what=f"{exc}.")
    missing = [syntax for syntax in _SYNTAXES if not _decodes(syntax)]
    for syntax in missing:
        needs = "; ".join(get_decoder(syntax).missing_dependencies)
        yield Finding(
            ok=False,
            what=f"DICOM films in {syntax.name} cannot be read: install mura-batch again with its"
            f" dependencies ({needs}).",
        )
    if not missing:
        told = f"DICOM films can be read in all {len(_SYNTAXES)} transfer syntaxes."
        yield Finding(ok=True, what=told)


def _decodes(syntax: UID) -> bool:
    return get_decoder(syntax).is_available


# ---- the database, and what it does not know


def _database(settings: Settings) -> Iterator[Finding]:
    try:
        problems = database.check(settings.database_url)
    except MuraError as exc:
        problems = [str(exc)]
    for problem in problems:
        yield Finding(ok=False, what=problem)
    if not problems:
        yield Finding(ok=True, what=f"The database is whole, revision {REVISION}.")
        yield from _orphans(settings)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the database knows of the folders."""

    claims: frozenset[str]
    overlays: frozenset[str]


def _orphans(settings: Settings) -> Iterator[Finding]:
    """Look for claims and overlays that the database does not know."""
    # The folders first: what appears in the database meanwhile is no orphan.
    work = [f for f in _entries(settings.work) if f.is_dir() and _old(f)]
    kept = {
        place: [f for study in _entries(place) if study.is_dir() for f in _entries(study)]
        for place in (settings.archive_dir, settings.quarantine)
    }
    pictures = [f for f in settings.overlays_dir.rglob("*") if f.is_file() and _old(f)]
    known = _known(settings)
    findings = [_orphan_work(work, known, running=is_watched(settings.home))]
    findings += [_orphan_kept(place, folders, known) for place, folders in kept.items()]
    findings.append(_orphan_overlays(settings, pictures, known))
    wrong = [finding for finding in findings if finding is not None]
    yield from wrong
    if not wrong:
        yield Finding(ok=True, what="The database knows every claim and every overlay.")


def _known(settings: Settings) -> _Known:
    engine = engines.open_engine(settings.database_url, read_only=True)
    try:
        with engines.reading(engine) as connection:
            claims = connection.execute(select(files.c.claim).distinct()).scalars()
            overlays = connection.execute(select(views.c.overlay).distinct()).scalars()
            return _Known(frozenset(claims), frozenset(filter(None, overlays)))
    finally:
        engine.dispose()


def _orphan_work(folders: Iterable[Path], known: _Known, *, running: bool) -> Finding | None:
    lost = sorted(f.name for f in folders if f.name not in known.claims)
    if not lost:
        return None
    cure = "restart" if running else "start"
    return Finding(
        ok=False,
        what=f"The database does not know {len(lost)} claims in work, such as {lost[0]!a}:"
        f" {cure} `mura-batch watch`, which takes up what was cut off.",
    )


def _orphan_kept(place: Path, folders: Iterable[Path], known: _Known) -> Finding | None:
    lost = sorted(f for f in folders if f.is_dir() and f.name not in known.claims)
    if not lost:
        return None
    return Finding(
        ok=False,
        what=f"The database does not know {len(lost)} claims in {place}, such as"
        f" {_shown(lost[0])}: restore the database's backup, or drop their files in again.",
    )


def _orphan_overlays(settings: Settings, found: Iterable[Path], known: _Known) -> Finding | None:
    lost = sorted(
        name
        for file in found
        if (name := file.relative_to(settings.overlays_dir.parent).as_posix()) not in known.overlays
    )
    if not lost:
        return None
    return Finding(
        ok=False,
        what=f"{len(lost)} files in overlays belong to no result, such as {lost[0]!a}: they"
        " may be deleted.",
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []  # permissions were looked at before


def _old(path: Path) -> bool:
    """Return whether ``path`` is too old to be on its way through a running daemon."""
    try:
        return time.time() - path.stat().st_mtime > _FRESH_SECONDS
    except OSError:
        return False  # it moved on
