"""Training's memory over epochs, and with as many films as MURA has.

    python tests/bench/fit_memory.py [--share 1.0] [--epochs 5]

A real ``python -m training fit`` on a tree of tiny films with MURA's published counts, at 32
pixels: how memory depends on films and epochs, not what inputs of full size need. The figure is
the private memory (``Pss_Anon``, Linux) of the process and all below it, ten times a second, the
median of each epoch; films as the network sees them lie in a mapped file, whose pages the system
takes back when it needs them. Leaves with 1 where the last epoch's is more than 5 % above the
second's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from mura_tree import make_tree

from mura_batch.preprocessing import Preprocessing
from training.settings import FitSettings, Stage
from training.sources.mura import PUBLISHED_IMAGES, PUBLISHED_STUDIES

GROWTH = 1.05


def main() -> None:
    """Train, sample, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the published counts")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mura-batch-memory-") as scratch:
        tree, run = Path(scratch) / "MURA-v1.1", Path(scratch) / "runs/run"
        films = write_films(tree, options.share)
        settings = Path(scratch) / "run.json"
        small = FitSettings(
            Preprocessing(size=32),
            head_epochs=0,
            stages=(Stage(32, options.epochs),),
            patience=None,
            batch=64,
        )
        settings.write_text(json.dumps({"settings": asdict(small)}))
        command = [sys.executable, "-m", "training", "fit", str(tree), str(run)]
        training = subprocess.Popen([*command, "--settings", str(settings)])
        try:
            found = watched(training, run / "log.csv")
        finally:
            training.kill()
            training.wait()
    if training.returncode not in (0, -9):
        sys.exit(f"the training left with {training.returncode}")
    click.echo(f"{films} films")
    for epoch in range(1, options.epochs + 1):
        click.echo(f"epoch {epoch:3} {found[epoch]:8.1f} MB")
    growth = found[options.epochs] / found[2]
    click.echo(f"growth from epoch 2 to {options.epochs}: {growth - 1:+.1%}")
    sys.exit(growth > GROWTH)


def write_films(tree: Path, share: float) -> int:
    """Write tiny films and return how many."""
    studies = {
        split: {
            area: tuple(max(2, int(n * share)) for n in counts) for area, counts in some.items()
        }
        for split, some in PUBLISHED_STUDIES.items()
    }
    images = {
        split: {area: max(sum(studies[split][area]), int(n * share)) for area, n in some.items()}
        for split, some in PUBLISHED_IMAGES.items()
    }
    make_tree(tree, studies, images)
    return sum(sum(some.values()) for some in images.values())


def watched(training: subprocess.Popen[bytes], log: Path) -> dict[int, float]:
    """Return the median private memory of each epoch; reading the films counts to the first."""
    samples: defaultdict[int, list[float]] = defaultdict(list)
    while training.poll() is None:
        ended = len(log.read_text().splitlines()) - 1 if log.exists() else 0
        samples[ended + 1].append(private(training.pid))
        time.sleep(0.1)
    return {epoch: statistics.median(some) for epoch, some in sorted(samples.items())}


def private(pid: int) -> float:
    """Return the private memory of a process and all below it, in MB."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, OSError):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
                words = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
                total += int(words["Pss_Anon"].split()[0])
    return total / 1e3


if __name__ == "__main__":
    main()
