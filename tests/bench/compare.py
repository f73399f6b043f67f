"""How much faster mura-batch scores films with overlays than the plain script ``peer.py``.

    python tests/bench/compare.py [--films 200] [--rounds 3] [--runtime openvino] [--precision int8]

Both take the same distinct films in turns. The first ratio is of the work alone (a warm network on
both sides; mura-batch with its ledger, its archive and its fsyncs), the second of whole processes:
``mura-batch watch --once`` with imports, the network's load and the settling of the inbox, in a
home that has scored before (its network is compiled), against ``python peer.py``. Medians over the
rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from mura_batch import database
from mura_batch.bench import Way, run_through, sample_films
from mura_batch.config import Settings
from mura_batch.demo import drop_samples
from mura_batch.weights import WeightsStore

PEER = Path(__file__).with_name("peer.py")
PROGRAM = Path(sys.executable).with_name("mura-batch")
CALM = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}  # as mura_batch.cli.main sets it


def main() -> None:
    """Run both in turns and print the ratios."""
    if not CALM.items() <= os.environ.items():  # threads are counted when numpy is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CALM)  # noqa: S606 - itself
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runtime", choices=("torch", "openvino"), default="openvino")
    parser.add_argument("--precision", choices=("int8", "f32"), default="int8")
    options = parser.parse_args()
    way = Way(options.runtime, options.precision, overlay=True)
    ours, theirs, whole_ours, whole_theirs = [], [], [], []
    with sample_films(options.films) as films:
        for turn in range(options.rounds):
            passage = run_through(films, way)
            ours.append(passage.images / passage.seconds)
            rate, wall = run_peer(films)
            theirs.append(rate)
            whole_theirs.append(passage.images / wall)
            whole_ours.append(passage.images / run_program(films, way))
            click.echo(f"round {turn + 1}: {ours[-1]:.1f} and {theirs[-1]:.1f} images/s", err=True)
    tell("the work alone", ours, theirs)
    tell("whole processes", whole_ours, whole_theirs)


def tell(what: str, ours: list[float], theirs: list[float]) -> None:
    """Print the medians and their ratio."""
    a, b = statistics.median(ours), statistics.median(theirs)
    click.echo(f"{what}: mura-batch {a:.2f}, plain script {b:.2f} images/s: {a / b:.1f} times")


def run_peer(films: Path) -> tuple[float, float]:
    """Return the plain script's images a second in its loop, and the process's seconds."""
    with tempfile.TemporaryDirectory(dir=films.parent) as overlays:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, PEER, films, overlays],
            env={name: value for name, value in os.environ.items() if name not in CALM},
            capture_output=True,
            text=True,
            check=True,
        )
        wall = time.perf_counter() - started
        written = len(list(Path(overlays).glob("*.png")))
    result = json.loads(done.stdout)
    if written != result["images"]:
        sys.exit(f"the plain script wrote {written} overlays for {result['images']} films")
    return result["images"] / result["seconds"], wall


def run_program(films: Path, way: Way) -> float:
    """Return the seconds of ``mura-batch watch --once`` as a process over the films."""
    with tempfile.TemporaryDirectory(dir=films.parent) as home:
        settings = Settings(home=Path(home))
        settings.inbox_dir.mkdir()
        database.upgrade(settings.database_url)
        WeightsStore(settings.weights_dir).install_bundled()
        environment = os.environ | {
            "MURA_BATCH_RUNTIME": way.runtime,
            "MURA_BATCH_PRECISION": "auto" if way.precision == "int8" else way.precision,
        }
        drop_samples(settings.inbox_dir)
        watch_once(home, environment)
        shutil.copytree(films, settings.inbox_dir / "films", copy_function=os.link)
        started = time.perf_counter()
        watch_once(home, environment)
        return time.perf_counter() - started


def watch_once(home: str, environment: dict[str, str]) -> None:
    """Run the program until nothing in the inbox can move."""
    subprocess.run(
        [PROGRAM, "--home", home, "watch", "--once"],
        env=environment,
        stderr=subprocess.DEVNULL,
        check=True,
    )


if __name__ == "__main__":
    main()
