"""A real home and real films for tests that run the program as a user does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image

from mura_batch import database
from mura_batch.weights import WeightsStore

SAMPLES = Path(str(files("mura_batch") / "samples"))
PROGRAM = Path(sys.executable).with_name("mura-batch")
BOOKKEEPING = {"claim.json", "reason.json"}


@dataclass(frozen=True)
class Home:
    """A home folder whose daemon settles quickly and runs torch on the CPU."""

    path: Path
    settings: dict[str, str]

    @property
    def inbox(self) -> Path:
        return self.path / "inbox"

    def environment(self, **extra: str) -> dict[str, str]:
        return os.environ | {"MURA_BATCH_HOME": str(self.path)} | self.settings | extra

    def command(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *arguments],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [PROGRAM, *arguments],
            env=self.environment(**extra),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def contents(self) -> Counter[str]:
        """Return the multiset of content hashes over inbox, work, archive and quarantine."""
        found: Counter[str] = Counter()
        for place in ("inbox", "work", "archive", "quarantine"):
            for file in (self.path / place).rglob("*"):
                partial = file.name.startswith(".") and file.suffix == ".tmp"  # of write_atomic
                if file.is_file() and not partial and file.name not in BOOKKEEPING:
                    found[sha256(file)] += 1
        return found


def make_home(path: Path, **settings: str) -> Home:
    for place in ("inbox", "work", "archive", "quarantine", "overlays"):
        (path / place).mkdir(parents=True)
    database.upgrade(f"sqlite:///{path / 'results.db'}")
    WeightsStore(path / "weights").install_bundled()
    quick = {"MURA_BATCH_SETTLE_SECONDS": "0.2", "MURA_BATCH_SCAN_SECONDS": "0.1"}
    named = {f"MURA_BATCH_{name.upper()}": value for name, value in settings.items()}
    return Home(path, quick | {"MURA_BATCH_RUNTIME": "torch"} | named)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def film(target: Path, mark: int = 0, size: int = 256) -> Path:
    """Write a real film (the elbow sample), made another content by a mark in its corner."""
    with Image.open(SAMPLES / "elbow_lateral.png") as source:
        picture = source.convert("L").resize((size, size))
    picture.putpixel((0, 0), mark % 256)
    picture.putpixel((1, 0), mark // 256)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)
    return target
