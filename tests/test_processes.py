"""Processes beside a training: one that is killed is told in a line, and none is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
from tiny_atlas import write_atlas

from mura_batch.errors import Transient
from training.processes import loader_watched, pool_of, side_by_side


def killed(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_killed_process_of_a_pool_is_told_with_what_to_do() -> None:
    with pytest.raises(Transient, match="run the same command again"), pool_of(2) as pool:
        list(pool.map(killed, range(3)))


def test_a_killed_worker_of_a_loader_is_told_in_a_line(tmp_path: Path) -> None:
    """Torch says so wherever the main thread is just then, so that this needs a process."""
    atlas = write_atlas(tmp_path / "atlas", films=60)
    command = [sys.executable, "-m", "training", "fit", atlas, tmp_path / "run", "--batch", "2"]
    command += ["--workers", "2", "--patience", "0", "--head-epochs", "0", "--start", "bundled"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True) as child:
        workers: list[psutil.Process] = []
        while len(workers) < 2 and child.poll() is None:
            beside = psutil.Process(child.pid).children(recursive=True)
            workers = [one for one in beside if is_torchs(one)]
        time.sleep(2)  # the network learns, mostly
        for worker in workers:
            worker.kill()
        told = child.stderr.read().splitlines()
    assert child.returncode == 1
    assert "run the same command again" in told[-1]
    assert not any(line.startswith("Traceback") for line in told)


def is_torchs(one: psutil.Process) -> bool:
    """Whether a process beside a training is a loader's; some vanish while they are asked."""
    try:
        return "pt_data_worker" in one.name() or "training" in one.cmdline()
    except psutil.NoSuchProcess:
        return False


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="of another kind"), loader_watched():
        raise RuntimeError("of another kind")


def waiting(ended: Path, network: list[torch.Tensor]) -> None:
    """Wait for long, and say so at the end."""
    assert network
    time.sleep(30)
    ended.touch()


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_trial_ends_the_others_at_once(tmp_path: Path, which: int) -> None:
    before = psutil.Process().children()

    def kill_one() -> None:
        trials: list[psutil.Process] = []
        while len(trials) < 2:
            time.sleep(0.1)
            new = [one for one in psutil.Process().children() if one not in before]
            trials = [one for one in new if "spawn_main" in " ".join(one.cmdline())]
        time.sleep(1.5)  # both are under way
        min(trials, key=lambda one: (-1) ** which * one.create_time()).kill()

    network = [torch.ones(100_000) for _ in range(100)]  # to send it takes the pool a moment
    killer = Thread(target=kill_one)
    killer.start()
    with pytest.raises(Transient, match="run the same command again"):
        side_by_side([partial(waiting, tmp_path / str(n), network) for n in range(2)])
    killer.join()
    assert not list(tmp_path.iterdir())


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
