"""Whether the daemon's memory stays flat: PSS of its process tree at study 200 and at study 2,000.

    python tests/bench/memory.py [--studies 2000] [--early 200] [--first]

A real ``mura-batch watch`` with seven networks, compiled at an earlier start or with ``--first`` at
this one, gets small films of all areas, a portion at a time, so that it always has work and never
all of it. PSS (proportional
set size, Linux) is sampled four times a second; a point's figure is the median of the samples from
10 % before it to 10 % after it, or to the end. Leaves with 1 where the last point is more than 5 %
above the early one.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
import psutil
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from mura_batch import database
from mura_batch.area import Area
from mura_batch.bench import sample_films
from mura_batch.config import Settings
from mura_batch.radiograph import read_luminance
from mura_batch.records import State
from mura_batch.results import Results
from mura_batch.weights import (
    BUNDLED,
    WeightsStore,
    bundled_card,
    bundled_int8_form,
    sha256_of,
)

PROGRAM = Path(sys.executable).with_name("mura-batch")
AHEAD = 64  # studies in the inbox before the daemon
SIDE = 320  # pixels
GROWTH = 1.05
Sample = tuple[int, float]  # studies done, PSS in MB


def main() -> None:
    """Feed, sample, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--early", type=int, default=200)
    parser.add_argument("--first", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mura-batch-memory-") as scratch:
        settings = Settings(home=Path(scratch))
        settings.inbox_dir.mkdir()
        database.upgrade(settings.database_url)
        seven_networks(WeightsStore(settings.weights_dir), Path(scratch))
        environment = os.environ | {"MURA_BATCH_SETTLE_SECONDS": "0.5"}
        if not options.first:
            for number, film in enumerate(small_films()[: len(Area)]):  # compiles the networks
                drop(settings, film, -1 - number)
            subprocess.run(
                [PROGRAM, "--home", scratch, "watch", "--once"],
                env=environment,
                stderr=subprocess.DEVNULL,
                check=True,
            )
        daemon = subprocess.Popen(
            [PROGRAM, "--home", scratch, "watch"], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            samples = feed(settings, daemon, options.studies)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
    early, late = at(samples, options.early), at(samples, options.studies)
    for done in range(options.early, options.studies + 1, options.early):
        click.echo(f"{done:6} studies  {at(samples, done):8.1f} MB")
    click.echo(f"most {max(mb for _, mb in samples):8.1f} MB")
    click.echo(f"growth from study {options.early} to {options.studies}: {late / early - 1:+.1%}")
    sys.exit(late > early * GROWTH)


def seven_networks(store: WeightsStore, scratch: Path) -> None:
    """Give each area the bundled tensors in a file of its own, which makes them other weights."""
    tensors = load_file(BUNDLED / "generalist.safetensors")
    for area in Area:
        file = scratch / f"{area}.safetensors"
        save_file(tensors, file, metadata={"area": area})
        card = store.add(file, replace(bundled_card(area), sha256=sha256_of(file)))
        store.add_int8_form(replace(bundled_int8_form(area), sha256=card.sha256), card)
        store.activate(area, card.sha256)
        file.unlink()


def feed(settings: Settings, daemon: subprocess.Popen[bytes], studies: int) -> list[Sample]:
    """Drop studies as the daemon gets through them; return the samples."""
    films = small_films()
    samples: list[Sample] = []
    dropped = done = 0
    with Results.open(settings.database_url) as results:
        while done < studies:
            while dropped < min(studies, done + AHEAD):
                drop(settings, films[dropped % len(films)], dropped)
                dropped += 1
            if daemon.poll() is not None:
                sys.exit(f"the daemon left with {daemon.returncode} after {done} studies")
            states = results.counts(datetime.now(UTC)).states
            done = states[State.DONE]
            if states[State.FAILED] or states[State.QUARANTINED]:
                sys.exit(f"not every study was scored: {dict(states)}")
            samples.append((done, pss(daemon.pid)))
            time.sleep(0.25)
    return samples


def small_films() -> list[Image.Image]:
    """Return the sample films, small."""
    with sample_films(1) as folder:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        films = [Image.fromarray(read_luminance(file)) for file in files]
    for film in films:
        film.thumbnail((SIDE, SIDE))
    return films


def drop(settings: Settings, film: Image.Image, number: int) -> None:
    """Put one film into the inbox as a study of its own; it appears whole."""
    text = PngInfo()
    text.add_text("Comment", secrets.token_hex(8))
    area = list(Area)[number % len(Area)]
    folder = settings.inbox_dir / f"patient{number:05}" / area
    folder.mkdir(parents=True)
    film.save(folder / "image.part", "PNG", pnginfo=text, compress_level=1)
    (folder / "image.part").rename(folder / "image1.png")


def pss(pid: int) -> float:
    """Return the proportional set size of a process and all below it, in MB."""
    root = psutil.Process(pid)
    total = 0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total / 1e6


def at(samples: list[Sample], studies: int) -> float:
    """Return the median PSS around the moment when ``studies`` were done."""
    near = [mb for done, mb in samples if 0.9 * studies <= done <= 1.1 * studies]
    return statistics.median(near)


if __name__ == "__main__":
    main()
