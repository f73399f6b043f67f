"""The network on torch: CPU, CUDA, Apple's MPS."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from mura_batch.errors import Misconfigured
from mura_batch.network import EvidenceNet, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.inference import Inference, memory_watched


class TorchRuntime:
    """Eager torch in f32: ``channels_last``, inference mode; the network is taken over."""

    name: Final = "torch"

    def __init__(self, network: EvidenceNet, spec: Preprocessing, device: str) -> None:
        self.device: Final = device
        self._spec = spec
        with memory_watched(0, device):
            self._network = network.eval().requires_grad_(requires_grad=False)
            self._network.to(torch.device(device)).to(memory_format=torch.channels_last)
        self.nbytes: Final = sum(t.nbytes for t in self._network.state_dict().values())

    def infer(self, pixels: NDArray[np.uint8]) -> Inference:
        """Score luminance of shape (N, S, S); see :class:`mura_batch.runtime.Runtime`."""
        with memory_watched(len(pixels), self.device), torch.inference_mode():
            films = torch.from_numpy(np.require(pixels, requirements="W")).to(self.device)
            images = normalise(films, self._spec.mean, self._spec.std)
            evidence = self._network(images.contiguous(memory_format=torch.channels_last))
            return Inference(
                evidence.logit.float().cpu().numpy(), evidence.map.float().cpu().numpy()
            )


def find_device(wanted: str) -> str:
    """Return the torch device for a ``device`` setting: ``auto``, ``cpu``, ``cuda[:N]``, ``mps``.

    Raises:
        Misconfigured: no such device is known, or this machine has none.
    """
    mps = torch.backends.mps.is_available()
    cuda = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    here = [*cuda, *(["mps"] if mps else []), "cpu"]
    if wanted == "auto":
        return here[0]
    device = "cuda:0" if wanted == "cuda" else wanted
    if device not in here:
        raise Misconfigured(
            f"device {wanted!r} is not on this machine: set `device` to auto or one of"
            f" {', '.join(reversed(here))}"
        )
    return device
