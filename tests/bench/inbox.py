"""What an inbox of 100,000 files costs the daemon while nothing happens, and how soon it sees news.

    python tests/bench/inbox.py [--files 100000] [--seconds 60]

A real ``mura-batch watch`` looks at files of studies that have not settled yet (they wait for an
hour here). Then come processor seconds while it idles, and studies with a ``.ready`` file, each
timed until it has left the inbox.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psutil

from mura_batch import database
from mura_batch.config import STATUS_FILE, Settings
from mura_batch.weights import WeightsStore

PROGRAM = Path(sys.executable).with_name("mura-batch")
SAMPLE = Path(__file__).parents[2] / "mura_batch/samples/elbow_lateral.png"
A_FOLDER = 10  # files of a study
NEWS = 5


def main() -> None:
    """Fill, watch, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mura-batch-inbox-") as scratch:
        settings = Settings(home=Path(scratch))
        settings.inbox_dir.mkdir()
        database.upgrade(settings.database_url)
        WeightsStore(settings.weights_dir).install_bundled()
        for number in range(options.files // A_FOLDER):
            study = settings.inbox_dir / f"XR_HAND/patient{number:05}/study1"
            study.mkdir(parents=True)
            for view in range(A_FOLDER):
                (study / f"image{view}.png").write_bytes(b"%d" % (number * A_FOLDER + view))
        environment = os.environ | {
            "MURA_BATCH_SETTLE_SECONDS": "3600",
            "MURA_BATCH_SETTLE_MAX_SECONDS": "7200",
        }
        daemon = subprocess.Popen(
            [PROGRAM, "--home", scratch, "watch"], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            measure(settings, psutil.Process(daemon.pid), options.seconds)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()


def measure(settings: Settings, daemon: psutil.Process, seconds: float) -> None:
    """Print the scan, the idle cost and how soon news are taken."""
    word = settings.home / STATUS_FILE
    for _ in range(3):  # the third scan knows all files
        word.unlink(missing_ok=True)
        while not word.exists():
            time.sleep(0.1)
    scan = json.loads(word.read_text())["last_scan_seconds"]
    click.echo(f"a scan: {scan:.2f} s")
    before = spent(daemon)
    time.sleep(seconds)
    click.echo(f"idle: {(spent(daemon) - before) / seconds:.1%} of a core over {seconds:.0f} s")
    waits = []
    for number in range(NEWS):
        study = settings.inbox_dir / f"news{number}"
        study.mkdir()
        shutil.copy(SAMPLE, study)
        (study / ".ready").touch()
        began = time.perf_counter()
        while (study / SAMPLE.name).exists():
            time.sleep(0.01)
        waits.append(time.perf_counter() - began)
        time.sleep(3)
    click.echo(
        f"a ready study is taken after {statistics.median(waits):.2f} s, {max(waits):.2f} at most"
    )


def spent(process: psutil.Process) -> float:
    """Return the processor seconds of a process so far."""
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
