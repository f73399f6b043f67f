"""The program on real sample studies: a throw-away home, the daemon once, the results."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from mura_batch import database
from mura_batch.config import Settings
from mura_batch.daemon import Daemon
from mura_batch.records import Filters, ImageRow, StudyRow
from mura_batch.results import Results
from mura_batch.weights import WeightsStore


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo left behind.

    Attributes:
        settings: of its home; everything is still there to be looked at.
    """

    settings: Settings
    studies: tuple[StudyRow, ...]
    images: tuple[ImageRow, ...]


def run_demo(home: Path) -> Demo:
    """Make a home in ``home``, drop the sample studies into its inbox, run the daemon over them."""
    settings = Settings(home=home, settle_seconds=0.5, precision="f32")
    for folder in (settings.inbox_dir, settings.overlays_dir):
        folder.mkdir(parents=True, exist_ok=True)
    database.upgrade(settings.database_url)
    WeightsStore(settings.weights_dir).install_bundled()
    drop_samples(settings.inbox_dir)
    Daemon(settings, lasting=False).run(once=True)
    with Results.open(settings.database_url) as results:
        return Demo(settings, tuple(results.query(Filters())), tuple(results.images(Filters())))


def drop_samples(inbox: Path) -> None:
    """Copy the bundled sample studies into ``inbox``, as a user would."""
    with as_file(files("mura_batch") / "samples") as samples:
        for item in sorted(samples.iterdir()):
            if item.is_dir() and item.name != "__pycache__":
                shutil.copytree(item, inbox / item.name)
            elif item.suffix in {".png", ".jpg", ".dcm"}:
                shutil.copy2(item, inbox)
