"""A site with files in its inbox that custody takes, under names that are hard to bear."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

from mura_batch.config import Settings
from mura_batch.custody import Candidate, FoundFile
from mura_batch.study import Kind

ODD = "Hånd\nli '\"\udcff"
FILES = {
    f"{ODD}/study1_positive/{'x' * 251}.png": b"one",
    f"{ODD}/study1_positive/same.png": b"one",
    f"{ODD}/other/3.dcm": b"three" * 50_000,
    "loose.dcm": b"four",
}


def site(home: Path, inbox: Path | None = None, **changes: object) -> Settings:
    settings = Settings(home=home, inbox=inbox, **changes)
    for folder in (settings.inbox_dir, settings.work):
        folder.mkdir(parents=True, exist_ok=True)
    return settings


def drop(settings: Settings, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        path = settings.inbox_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def found(settings: Settings, name: str, problem: str = "") -> FoundFile:
    status = os.lstat(settings.inbox_dir / name)
    return FoundFile(name, status.st_size, status.st_mtime_ns, status.st_ino, problem)


def unit(settings: Settings, settled_by: str = "quiet") -> Candidate:
    """What of ``FILES`` is in the inbox, as the scan would return it."""
    names = [name for name in FILES if os.path.lexists(settings.inbox_dir / name)]
    return Candidate(
        Kind.DICOM, "1.2.3", tuple(found(settings, name) for name in names), settled_by
    )


def contents(settings: Settings) -> Counter[str]:
    """The multiset of content hashes over all places where a source may lie."""
    held: Counter[str] = Counter()
    for place in (settings.inbox_dir, settings.work, settings.archive_dir, settings.quarantine):
        for folder, _, names in os.walk(place):
            for name in names:
                if not name.startswith(".") and name not in ("claim.json", "reason.json"):
                    held[hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()] += 1
    return held


def unit_of(settings: Settings, name: str, problem: str = "") -> Candidate:
    return Candidate(Kind.FILE, name, (found(settings, name, problem),), "quiet")


ALL = Counter(hashlib.sha256(content).hexdigest() for content in FILES.values())
