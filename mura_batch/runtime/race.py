"""Whether torch would be faster than OpenVINO on this CPU: both pass the same films.

Torch does it in a process of its own, so that neither its import nor its memory stays. The answer
is kept beside the compiled network: it takes some seconds to find out.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mura_batch.atomic import write_atomic
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.choice import seconds_of
from mura_batch.runtime.compiled import machine
from mura_batch.runtime.inference import Runtime

log = logging.getLogger(__name__)

_FILE = "race.json"
_FILMS = 4
_TURNS = 2
_CLEARLY = 0.9  # of the other's time: what is closer may be noise
_LONGEST = 120.0  # seconds for torch to start and to pass them


def won_by_torch(openvino: Runtime, architecture: str, size: int, kept: Path) -> bool:
    """Return whether torch takes clearly less time for films of ``size`` than the runtime at hand.

    ``kept`` is the folder of these weights alone; the answer stays there, in ``race.json``, until
    the processor or a runtime's version is another.
    """
    on = [*machine(), openvino.precision, size, version("torch"), version("openvino")]
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads((kept / _FILE).read_text(encoding="utf-8"))
        if told["on"] == on:
            return bool(told["torch"] < _CLEARLY * told["openvino"])
    torch = _of_torch(architecture, size)
    if torch is None:
        return False
    seconds = {"torch": torch, "openvino": _seconds(openvino, size)}
    text = json.dumps({"on": on, **seconds}).encode()
    try:
        write_atomic(kept / _FILE, lambda stream: stream.write(text))
    except OSError as exc:
        log.warning("which runtime is faster cannot be kept", extra={"error": str(exc)})
    return torch < _CLEARLY * seconds["openvino"]


def _seconds(runtime: Runtime, size: int) -> float:
    """Return the least time of some turns; speed does not depend on what films show."""
    films = np.random.default_rng(0).integers(0, 256, (_FILMS, size, size)).astype(np.uint8)
    return min(seconds_of(runtime, films) for _ in range(_TURNS))


@cache
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
