"""Whether torch would be faster than OpenVINO on this CPU: both pass the same films.

Torch does it in a process of its own, so that neither its import nor its memory stays. The answer
is kept beside the compiled network: it takes some seconds to find out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mura_batch.atomic import write_atomic
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.choice import seconds_of
from mura_batch.runtime.compiled import machine
from mura_batch.runtime.inference import Runtime
from mura_batch.runtime.openvino_runtime import openvino

log = logging.getLogger(__name__)

_FILE = "race.json"
_FILMS = 4
_TURNS = 2
_CLEARLY = 0.9  # of the other's time: what is closer may be noise
_LONGEST = 60.0  # seconds for torch to start and to pass them: beyond that it has lost


class _Times(NamedTuple):
    """Seconds that the films took."""

    torch: float
    openvino: float


_raced: dict[str, _Times] = {}  # in this process, by what was raced


def won_by_torch(made: Runtime, architecture: str, size: int, kept: Path) -> bool:
    """Return whether torch takes clearly less time for films of ``size`` than OpenVINO's ``made``.

    ``kept`` is the folder of these weights alone; the answer stays there, in ``race.json``, until
    the processor or a version is another. In one process networks of one kind race once.
    """
    try:
        versions = [version("mura-batch"), version("torch"), openvino.__version__]
    except PackageNotFoundError:  # of no torch that it knows of
        return False
    on = [*machine(), architecture, made.precision, size, *versions]
    times = _told(kept / _FILE, on)
    if times is None:
        times = _race(json.dumps(on), made, architecture, size)
        if times is None:
            return False
        _keep(kept / _FILE, on, times)
    return times.torch < _CLEARLY * times.openvino


def _race(what: str, made: Runtime, architecture: str, size: int) -> _Times | None:
    """Return what both took, timed now or earlier in this process; None where torch did not run."""
    if what not in _raced:
        torch = _of_torch(architecture, size)
        if torch is None:
            return None
        _raced[what] = _Times(torch, _seconds(made, size))
    return _raced[what]


def _keep(file: Path, on: list[object], times: _Times) -> None:
    text = json.dumps({"on": on, **times._asdict()}).encode()
    try:
        write_atomic(file, lambda stream: stream.write(text))
    except OSError as exc:
        log.warning("which runtime is faster cannot be kept", extra={"error": str(exc)})


def _told(file: Path, on: list[object]) -> _Times | None:
    """Return what is kept of an earlier race; None where that was another, or is damaged."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        times = _Times(float(told["torch"]), float(told["openvino"]))
        if told["on"] != on or not (times.torch > 0 and 0 < times.openvino < math.inf):
            return None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None
    with suppress(OSError):  # it may be another user's; what nobody uses for a month is removed
        os.utime(file)
    return times


def _seconds(runtime: Runtime, size: int) -> float:
    """Return the least time of some turns; speed does not depend on what films show."""
    films = np.random.default_rng(0).integers(0, 256, (_FILMS, size, size)).astype(np.uint8)
    return min(seconds_of(runtime, films) for _ in range(_TURNS))


def _of_torch(architecture: str, size: int) -> float | None:
    """Return the seconds that torch takes; None where it does not run, or was ended."""
    command = [sys.executable, "-m", __name__, architecture, str(size)]
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, this module, a name and a number
            command,
            cwd=Path(__file__).parents[2],  # so that -m finds this very package
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LONGEST,
            check=True,
        )
        return float(done.stdout)
    except subprocess.TimeoutExpired:
        return math.inf
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        log.warning("torch could not be timed", extra={"error": str(exc)})
        return None


def _main() -> None:
    from mura_batch.network import network_of  # noqa: PLC0415 - torch takes seconds to import
    from mura_batch.runtime.torch_runtime import TorchRuntime  # noqa: PLC0415 - torch, seconds

    architecture, size = sys.argv[1], int(sys.argv[2])
    runtime = TorchRuntime(network_of(architecture), Preprocessing(size=size), "cpu")
    sys.stdout.write(str(_seconds(runtime, size)))


if __name__ == "__main__":
    _main()
