"""How fast ``mura-batch export`` writes a database of 1,000,000 results, and its memory.

    python tests/bench/export.py [--results 1000000] [--home DIR]

Fills a database (or takes the one that ``--home`` has) and prints rows a second and the largest
resident size of the process, for a tenth of the rows too: memory should not grow with them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import click
from make_database import fill

from mura_batch.config import Settings

PROGRAM = Path(sys.executable).with_name("mura-batch")


def main() -> None:
    """Fill and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=int, default=1_000_000)
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mura-batch-export-") as scratch:
        whole, part = options.home or Path(scratch) / "whole", Path(scratch) / "part"
        for home, count in ((part, options.results // 10), (whole, options.results)):
            home.mkdir(exist_ok=True)
            if not (home / "results.db").exists():
                # Apart: a process begins with the largest size of the one that started it.
                url = Settings(home=home).database_url
                filling = get_context("spawn").Process(target=fill, args=(url, count))
                filling.start()
                filling.join()
            for kind in ("csv", "parquet"):
                tell(home, Path(scratch) / f"out.{kind}", count)


def tell(home: Path, target: Path, rows: int) -> None:
    """Export once and print what it took."""
    began = time.perf_counter()
    with subprocess.Popen([PROGRAM, "--home", home, "export", target]) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    click.echo(
        f"{rows:9} results as {target.suffix[1:]:8} {seconds:6.1f} s {rows / seconds:9.0f} rows/s"
        f" {usage.ru_maxrss / 1024:7.0f} MB"
    )
    target.unlink()
    if process.returncode:
        sys.exit(process.returncode)


if __name__ == "__main__":
    main()
