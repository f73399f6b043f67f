"""The same network on several runtimes; each takes uint8 luminance and normalises by itself.

Torch is imported only where it computes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from mura_batch.errors import Misconfigured
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.inference import Inference, OutOfMemory, Runtime, words

if TYPE_CHECKING:
    from pathlib import Path

    from mura_batch.tensors import Weights

__all__ = ["Inference", "OutOfMemory", "Runtime", "load", "words"]

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, Windows' for WSL, AMD's


def load(
    weights: Weights,
    spec: Preprocessing,
    *,
    runtime: str = "auto",
    device: str = "auto",
    precision: Literal["auto", "f32"] = "f32",
    ranges: Mapping[str, float] = MappingProxyType({}),
    kept: Path | None = None,
) -> Runtime:
    """Make a network ready to score.

    Args:
        weights: of the network; they stay as they are.
        spec: the preprocessing from the weights' card: size, mean, standard deviation.
        runtime: ``torch``, ``openvino``, or ``auto``: OpenVINO on a CPU where it is installed and,
            where that can be ``kept``, measured not to be slower, else torch. The hybrid's map
            needs gradients, so torch runs it.
        device: ``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda:N``, ``mps``.
        precision: ``f32``, or ``auto``: int8 on a CPU where there are ``ranges``, float16 on a
            CUDA device, where that is right and faster here (:mod:`mura_batch.runtime.choice`).
        ranges: with which OpenVINO may run it in int8; see
            :func:`mura_batch.runtime.quantization.activation_ranges`.
        kept: folder of these weights alone where their compiled form waits for the next start.

    Raises:
        Misconfigured: an unknown or missing runtime or device, or two that do not go together.
        OutOfMemory: the network does not fit into the device's memory.
    """
    if runtime not in {"auto", "torch", "openvino"}:
        raise Misconfigured(f"runtime {runtime!r}: set `runtime` to auto, torch or openvino")
    if runtime == "openvino" and device == "auto":
        device = "cpu"
    found = _found(device)
    if runtime == "openvino" and found != "cpu":
        raise Misconfigured(
            f"the openvino runtime works on the CPU only, not on {found}:"
            " set `runtime` to auto or torch, or `device` to cpu"
        )
    if runtime == "torch" or found != "cpu":
        return _on_torch(weights, spec, found, precision)
    ranges = ranges if precision == "auto" else {}
    try:
        from mura_batch.runtime.compiled import fastest, recalled  # noqa: PLC0415 - an extra
        from mura_batch.runtime.race import won_by_torch  # noqa: PLC0415 - imports OpenVINO, which may not be installed
    except ImportError as exc:
        if runtime == "auto":
            return _on_torch(weights, spec, found, precision)
        raise Misconfigured(
            "the openvino runtime is not installed: pip install 'mura-batch[openvino]',"
            " or set `runtime` to auto or torch"
        ) from exc
    if weights.pooling is None:
        if runtime == "auto":
            return _on_torch(weights, spec, found, precision)
        raise Misconfigured(
            "the openvino runtime has no gradients, which the map of a hybrid network needs: set"
            " `runtime` to auto or torch"
        )
    made = recalled(kept, spec, ranges) if kept else None
    made = made or fastest(weights, spec, ranges, kept)
    if runtime == "auto" and kept and won_by_torch(made, weights.architecture, spec.size, kept):
        return _on_torch(weights, spec, found, precision)
    return made


def _found(device: str) -> str:
    """Return the device for a ``device`` setting; torch is asked only where a GPU may be."""
    no_gpu = sys.platform != "darwin" and not any(map(os.path.exists, _GPU_DRIVERS))
    if device == "cpu" or (device == "auto" and no_gpu):
        return "cpu"
    from mura_batch.runtime.torch_runtime import find_device  # noqa: PLC0415 - torch takes seconds to import

    return find_device(device)


def _on_torch(weights: Weights, spec: Preprocessing, device: str, precision: str) -> Runtime:
    if device.startswith("cuda"):
        from mura_batch.runtime.cuda_runtime import cuda_runtime  # noqa: PLC0415 - torch, seconds

        return cuda_runtime(weights, spec, device, exact=precision == "f32")
    from mura_batch.network import network_with  # noqa: PLC0415 - torch takes seconds to import
    from mura_batch.runtime.torch_runtime import TorchRuntime  # noqa: PLC0415 - torch, seconds

    return TorchRuntime(network_with(weights), spec, device)
