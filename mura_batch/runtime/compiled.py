"""Networks compiled by OpenVINO: the fastest form that is right on this machine, kept on disk.

To compile takes seconds; a start that finds its network compiled does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from mura_batch import tensors
from mura_batch.atomic import write_atomic
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime import openvino_graph
from mura_batch.runtime.choice import refusal
from mura_batch.runtime.inference import Precision, memory_watched
from mura_batch.runtime.openvino_runtime import OpenVinoRuntime, openvino, settings_of
from mura_batch.tensors import Weights

log = logging.getLogger(__name__)

_REFUSED = "int8 is not used on this machine"
_MONTH = 30 * 24 * 3600.0
_ENDING = ".compiled"
_SOURCES = [Path(file) for file in (__file__, openvino_graph.__file__, tensors.__file__)]

# Memory of a warm network in sizes of its f32 weights (measured, two streams, side of 320 pixels):
# it packs them for the processor, and each stream has room for one view.
_KEPT: Final[dict[Precision, int]] = {"f32": 5, "int8": 4, "int8+bf16": 4}


def recalled(
    kept: Path, spec: Preprocessing, ranges: Mapping[str, float]
) -> OpenVinoRuntime | None:
    """Return the network as it was compiled before; None where that was not, or is damaged."""
    file = _file(kept, spec, ranges)
    try:
        digest, _, rest = file.read_bytes().partition(b"\n")
        if digest != hashlib.sha256(rest).hexdigest().encode():
            return None
        head, _, content = rest.partition(b"\n")
        told: dict[str, Any] = json.loads(head)
        precision: Precision = told["precision"]
        refused = told["refused"]
        model = _core().import_model(content, "CPU", settings_of(precision))
        found = OpenVinoRuntime(model, precision, told["nbytes"])
    except (OSError, MemoryError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    if refused:
        log.warning(_REFUSED, extra={"why": refused})
    with suppress(OSError):  # it may be another user's
        os.utime(file)
    return found


def fastest(
    weights: Weights, spec: Preprocessing, ranges: Mapping[str, float], kept: Path | None
) -> OpenVinoRuntime:
    """Return the network in int8, where it has ``ranges``, is right and is faster; else in f32."""
    why = ""
    with memory_watched(0, OpenVinoRuntime.device):
        made = compiled(weights, spec)
        if ranges:
            quick = compiled(weights, spec, ranges)
            if why := refusal(quick, made, spec):
                log.warning(_REFUSED, extra={"why": why})
            else:
                made = quick
    if kept:
        _keep(_file(kept, spec, ranges), made, why)
    return made


def compiled(
    weights: Weights, spec: Preprocessing, ranges: Mapping[str, float] = MappingProxyType({})
) -> OpenVinoRuntime:
    """Compile a network, in int8 where ``ranges`` say how, and then the rest in bf16 where the CPU
    has that; whether that is right is not asked.
    """
    precision: Precision = "f32"
    if ranges:
        precision = "int8+bf16" if "BF16" in _capabilities() else "int8"
    graph = openvino_graph.openvino_model(weights, spec, ranges)
    model = _core().compile_model(graph, "CPU", settings_of(precision))
    return OpenVinoRuntime(model, precision, _KEPT[precision] * weights.nbytes)


def _file(kept: Path, spec: Preprocessing, ranges: Mapping[str, float]) -> Path:
    """Return the file of this form of these weights on this machine, made by these programs."""
    made_of = (
        kept.name,
        asdict(spec),
        dict(ranges),
        openvino.__version__,
        *machine(),
        *(source.read_text(encoding="utf-8") for source in _SOURCES),
    )
    return kept / (hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24] + _ENDING)


def machine() -> list[object]:
    """Return what tells processors apart that networks run on, as JSON has it."""
    return [_core().get_property("CPU", "FULL_DEVICE_NAME"), _capabilities(), os.cpu_count()]


def _capabilities() -> list[str]:
    return list(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def _keep(file: Path, made: OpenVinoRuntime, refused: str) -> None:
    """Write the sum of what follows, a line of JSON, and what OpenVINO exports.

    Files that nobody has used for a month are removed.
    """
    told = {"precision": made.precision, "nbytes": made.nbytes, "refused": refused}
    rest = json.dumps(told).encode() + b"\n" + made.exported()
    digest = hashlib.sha256(rest).hexdigest().encode() + b"\n"
    try:
        write_atomic(file, lambda stream: stream.write(digest + rest))
        for other in file.parents[1].glob("*/*"):
            if other.is_file() and time.time() - other.stat().st_mtime > _MONTH:
                other.unlink()
    except OSError as exc:
        log.warning("the compiled network cannot be kept", extra={"error": str(exc)})
