"""Processes beside a training: one that is killed is told in a line, and none is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from mura_batch.errors import Transient
from training.processes import from_workers, pool_of


def killed(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


class Deadly(Dataset[int]):
    """Items, of which the last but one kills the process that reads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        return killed(number) if number == 2 else number


def test_a_killed_process_of_a_pool_is_told_with_what_to_do() -> None:
    with pytest.raises(Transient, match="run the same command again"), pool_of(2) as pool:
        list(pool.map(killed, range(3)))


def test_a_killed_worker_of_a_loader_is_told_alike() -> None:
    batches = from_workers(DataLoader(Deadly(), 1, num_workers=1, prefetch_factor=1))
    with pytest.raises(Transient, match="run the same command again"):
        list(batches)


def test_another_error_stays_what_it_is() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        list(from_workers(batches()))


def test_a_pool_ends_with_the_process_that_made_it(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "from training.processes import pool_of\n"
        "if __name__ == '__main__':\n"
        "    with pool_of(2) as pool:\n"
        "        print(list(pool.map(abs, range(3))), flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "it.py").write_text(script)
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, tmp_path / "it.py"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "[0, 1, 2]\n"
        beside = psutil.Process(child.pid).children(recursive=True)
        child.kill()
    assert beside
    _, left = psutil.wait_procs(beside, timeout=20)
    assert not left
