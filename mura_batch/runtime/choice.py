"""Whether a quicker form of a network is for this machine: its sample films are asked.

What rounds (int8, float16) is right on one processor and may be wrong or slow on another: int8
overflows without VNNI, old GPUs take longer in float16.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from mura_batch.runtime.inference import Inference, Runtime

_SAMPLES = Path(__file__).parents[1] / "samples"
_TURNS = 3
_MOST_OFF = 0.03  # mean difference of the samples' probabilities: many times what rounding costs


def refusal(quick: Runtime, exact: Runtime, spec: Preprocessing) -> str:
    """Say why the ``quick`` form is not for this machine; empty where it is right and faster."""
    files = sorted(file for file in _SAMPLES.rglob("*") if file.suffix in {".png", ".jpg"})
    films = np.stack([read_film(file, 0, spec)[1].pixels for file in files])
    own, true = (Inference.joined(one.infer(films)) for one in (quick, exact))
    off = float(np.abs(_probabilities(own) - _probabilities(true)).mean())
    if not off <= _MOST_OFF:
        return f"the sample films' probabilities are {off:.3f} off in the mean"
    turns = [(seconds_of(quick, films), seconds_of(exact, films)) for _ in range(_TURNS)]
    times = min(turn[0] for turn in turns) / min(turn[1] for turn in turns)
    return "" if times < 1 else f"it takes {times:.1f} times as long as f32"


def seconds_of(runtime: Runtime, films: NDArray[np.uint8]) -> float:
    """Return the seconds that one pass over ``films`` (N, size, size) takes."""
    began = time.perf_counter()
    Inference.joined(runtime.infer(films))
    return time.perf_counter() - began


def _probabilities(found: Inference) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-found.logits.astype(np.float64)))
