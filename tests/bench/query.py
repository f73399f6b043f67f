"""How long ``mura-batch query`` takes as a process over a database of 100,000 results.

    python tests/bench/query.py [--results 100000] [--home DIR]

Fills a database (or takes the one that ``--home`` has), then runs each command a few times and
prints the median; modules are compiled, as after any first run. Leaves with 1 where a filtered
query takes half a second or more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from make_database import fill

from mura_batch.config import Settings

PROGRAM = Path(sys.executable).with_name("mura-batch")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
RUNS = 7
LIMIT = 0.5  # seconds
FILTERED = (
    ("query", "--area", "XR_HAND", "--min-probability", "0.99"),
    ("query", "--state", "quarantined", "--limit", "100"),
    ("query", "--state", "done", "--limit", "100"),
    ("query", "--decision", "positive", "--limit", "100"),
    ("query", "--max-probability", "0.001"),
    ("query", "--reason", "bomb"),
    ("query", "--weights", "00"),
    ("query", "--since", "2020-02-01", "--until", "2020-02-02", "--json"),
    ("query", "--images", "--area", "XR_WRIST", "--limit", "100"),
)
OTHERS = (("--help",), ("status",), ("models", "list"))


def main() -> None:
    """Fill and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=int, default=100_000)
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mura-batch-query-") as scratch:
        home = options.home or Path(scratch)
        settings = Settings(home=home)
        if not (home / "results.db").exists():
            fill(settings.database_url, options.results)
        slowest = max(tell(home, command) for command in FILTERED)
        for command in OTHERS:
            tell(home, command)
    sys.exit(slowest >= LIMIT)


def tell(home: Path, command: tuple[str, ...]) -> float:
    """Print and return the median seconds of a command as a process."""
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        done = subprocess.run(
            [PROGRAM, "--home", home, *command],
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    lines = len(done.stdout.splitlines())
    click.echo(f"{median:.3f} s  {lines:6} lines  mura-batch {' '.join(command)}")
    return median


if __name__ == "__main__":
    main()
