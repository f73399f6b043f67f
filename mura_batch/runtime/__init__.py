"""The same network on several runtimes; each takes uint8 luminance and normalises by itself."""

from __future__ import annotations

from mura_batch.errors import Misconfigured
from mura_batch.network import EvidenceNet, Network
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.inference import Inference, OutOfMemory, Runtime
from mura_batch.runtime.torch_runtime import TorchRuntime, find_device

__all__ = ["Inference", "OutOfMemory", "Runtime", "load"]


def load(
    network: Network, spec: Preprocessing, *, runtime: str = "auto", device: str = "auto"
) -> Runtime:
    """Make ``network`` ready to score; it belongs to the runtime from now on.

    Args:
        network: with its weights, on the CPU.
        spec: the preprocessing from the weights' card: size, mean, standard deviation.
        runtime: ``torch``, ``openvino``, or ``auto``: OpenVINO on a CPU where it is
            installed, else torch. The hybrid's map needs gradients, so torch runs it.
        device: ``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda:N``, ``mps``.

    Raises:
        Misconfigured: an unknown or missing runtime or device, or two that do not go together.
        OutOfMemory: the network does not fit into the device's memory.
    """
    if runtime not in {"auto", "torch", "openvino"}:
        raise Misconfigured(f"runtime {runtime!r}: set `runtime` to auto, torch or openvino")
    if runtime == "openvino" and device == "auto":
        device = "cpu"
    found = find_device(device)
    if runtime == "torch" or found != "cpu":
        if runtime == "openvino":
            raise Misconfigured(
                f"the openvino runtime works on the CPU only, not on {found}:"
                " set `runtime` to auto or torch, or `device` to cpu"
            )
        return TorchRuntime(network, spec, found)
    if not isinstance(network, EvidenceNet):
        if runtime == "auto":
            return TorchRuntime(network, spec, found)
        raise Misconfigured(
            "the openvino runtime has no gradients, which the map of a hybrid network needs: set"
            " `runtime` to auto or torch"
        )
    try:
        from mura_batch.runtime.openvino_runtime import OpenVinoRuntime  # noqa: PLC0415 - an extra
    except ImportError as exc:
        if runtime == "auto":
            return TorchRuntime(network, spec, found)
        raise Misconfigured(
            "the openvino runtime is not installed: pip install 'mura-batch[openvino]',"
            " or set `runtime` to auto or torch"
        ) from exc
    return OpenVinoRuntime(network, spec)
