"""Networks compiled by OpenVINO: the fastest form that is right on this machine, kept on disk.

To compile takes seconds, and the torch that builds the graph takes seconds to import; a start that
finds its network compiled does neither.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from mura_batch.atomic import write_atomic
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from mura_batch.runtime.inference import Inference, memory_watched
from mura_batch.runtime.openvino_runtime import SETTINGS, OpenVinoRuntime, Precision, openvino

if TYPE_CHECKING:
    from mura_batch.network import EvidenceNet

log = logging.getLogger(__name__)

_SAMPLES = Path(__file__).parents[1] / "samples"
_MOST_OFF = 0.03  # mean difference of the samples' probabilities: many times what int8 costs
_MONTH = 30 * 24 * 3600.0
_ENDING = ".compiled"
_GRAPH = Path(__file__).with_name("openvino_graph.py")

# Memory of a warm network in sizes of its f32 weights (measured, sides of 160 and 224 pixels): it
# packs them for the processor, and each stream has room for one view.
_KEPT: Final[dict[Precision, int]] = {"f32": 4, "int8": 3}


def recalled(
    kept: Path, spec: Preprocessing, ranges: Mapping[str, float]
) -> OpenVinoRuntime | None:
    """Return the network as it was compiled before; None where that was not, or is damaged."""
    file = kept / _name(spec, ranges)
    try:
        with memory_watched(0, OpenVinoRuntime.device):
            head, _, content = file.read_bytes().partition(b"\n")
            told: dict[str, Any] = json.loads(head)
            if told["sha256"] != hashlib.sha256(content).hexdigest():
                return None
            found = _core().import_model(content, "CPU", SETTINGS)
        os.utime(file)
        return OpenVinoRuntime(found, told["precision"], told["nbytes"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def fastest(
    network: EvidenceNet, spec: Preprocessing, ranges: Mapping[str, float], kept: Path | None
) -> OpenVinoRuntime:
    """Return the network in int8, where it has ``ranges``, is right and is faster; else in f32."""
    with memory_watched(0, OpenVinoRuntime.device):
        made = compiled(network, spec)
        if ranges:
            quick = compiled(network, spec, ranges)
            if why := refusal(quick, made, spec):
                log.warning("int8 is not used on this machine", extra={"why": why})
            else:
                made = quick
    if kept:
        _keep(kept / _name(spec, ranges), made)
    return made


def compiled(
    network: EvidenceNet, spec: Preprocessing, ranges: Mapping[str, float] = MappingProxyType({})
) -> OpenVinoRuntime:
    """Compile a network, in int8 where ``ranges`` say how; whether that is right is not asked."""
    from mura_batch.runtime.openvino_graph import openvino_model  # noqa: PLC0415 - torch, seconds

    precision: Precision = "int8" if ranges else "f32"
    model = _core().compile_model(openvino_model(network, spec, ranges), "CPU", SETTINGS)
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    return OpenVinoRuntime(model, precision, _KEPT[precision] * size)


def _name(spec: Preprocessing, ranges: Mapping[str, float]) -> str:
    """Return the name of the file of this form on this machine, made by these programs."""
    made_of = (
        asdict(spec),
        dict(ranges),
        openvino.__version__,
        *(
            _core().get_property("CPU", about)
            for about in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
        ),
        os.cpu_count(),
        _GRAPH.read_text(encoding="utf-8"),
    )
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24] + _ENDING


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def refusal(quick: OpenVinoRuntime, exact: OpenVinoRuntime, spec: Preprocessing) -> str:
    """Say why int8 is not for this machine; empty where it is right and faster.

    Processors without VNNI may overflow in int8.
    """
    files = sorted(file for file in _SAMPLES.rglob("*") if file.suffix in {".png", ".jpg"})
    films = np.stack([read_film(file, 0, spec)[1].pixels for file in files])
    own, its_seconds = _timed(quick, films)
    true, seconds = _timed(exact, films)
    off = float(np.abs(_probabilities(own) - _probabilities(true)).mean())
    if not off <= _MOST_OFF:
        return f"the sample films' probabilities are {off:.3f} off in the mean"
    if its_seconds >= seconds:
        return f"it takes {its_seconds / seconds:.1f} times as long as f32"
    return ""


def _timed(runtime: OpenVinoRuntime, films: NDArray[np.uint8]) -> tuple[Inference, float]:
    """Return what a warm network says of ``films``, and the seconds that it takes."""
    Inference.joined(runtime.infer(films))
    began = time.perf_counter()
    found = Inference.joined(runtime.infer(films))
    return found, time.perf_counter() - began


def _probabilities(found: Inference) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-found.logits.astype(np.float64)))


def _keep(file: Path, made: OpenVinoRuntime) -> None:
    """Write a line of JSON and what OpenVINO exports; remove what nobody has used for a month."""
    content = made.exported()
    told = {
        "precision": made.precision,
        "nbytes": made.nbytes,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    head = json.dumps(told).encode() + b"\n"
    try:
        write_atomic(file, lambda stream: stream.write(head + content))
        for other in file.parents[1].glob(f"*/*{_ENDING}"):
            if time.time() - other.stat().st_mtime > _MONTH:
                other.unlink()
    except OSError as exc:
        log.warning("the compiled network cannot be kept", extra={"error": str(exc)})
