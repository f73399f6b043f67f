"""How long the data report takes over a tree of tiny films with MURA's published counts.

    python tests/bench/mura_report.py

Leaves with 1 where a published number is not printed, or where it takes two minutes or more.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))
from mura_tree import make_tree

from training.sources.mura import PUBLISHED_IMAGES, PUBLISHED_STUDIES

IN_TWO_AREAS = 1467
LIMIT = 120.0  # seconds


def main() -> None:
    """Make the tree, report on it, and look for every published number."""
    with tempfile.TemporaryDirectory(prefix="mura-batch-mura-") as scratch:
        make_tree(Path(scratch), PUBLISHED_STUDIES, PUBLISHED_IMAGES, IN_TWO_AREAS)
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "training", "data", "report", scratch],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - started
    click.echo(done.stdout)
    lines = [line.split() for line in done.stdout.splitlines()]
    missing = [row for row in _published() if not any(_holds(line, row) for line in lines)]
    totals = (
        "13457 studies, 8280 not abnormal, 5177 abnormal; 36808 images;",
        "1199 studies, 661 not abnormal, 538 abnormal; 3197 images;",
        ", 1467 of them in more than one area",
    )
    missing += [[total] for total in totals if total not in done.stdout]
    click.echo(f"{seconds:.0f} s; not printed: {missing or 'nothing'}")
    sys.exit(bool(missing) or seconds >= LIMIT)


def _published() -> list[list[str]]:
    return [
        [split, area, str(sum(counts)), *map(str, counts), str(PUBLISHED_IMAGES[split][area])]
        for split, areas in PUBLISHED_STUDIES.items()
        for area, counts in areas.items()
    ]


def _holds(line: list[str], row: list[str]) -> bool:
    return line[:2] + line[3:] == row  # the third column counts patients


if __name__ == "__main__":
    main()
