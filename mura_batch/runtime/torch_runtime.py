"""The network on torch: CPU, CUDA, Apple's MPS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from mura_batch.errors import Misconfigured
from mura_batch.network import Evidence, Network, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.inference import Inference, memory_watched, watched

# On the CPU a batch goes in portions to streams of one or few threads each. All threads on one
# pass wait for each other after every layer, and wait long where decoders need a core too:
# measured on two cores, 10 images/s with both on a batch of 16, 13 with two streams.
_PORTION = 4  # views
_MOST_STREAMS = 8


class TorchRuntime:
    """Eager torch in f32: ``channels_last``, inference mode; the network is taken over."""

    name: Final = "torch"
    precision: Final = "f32"

    def __init__(self, network: Network, spec: Preprocessing, device: str) -> None:
        self.device: Final = device
        self._spec = spec
        with memory_watched(0, device):
            self._network = network.eval().requires_grad_(requires_grad=False)
            self._network.to(torch.device(device)).to(memory_format=torch.channels_last)
        self.nbytes: Final = sum(t.nbytes for t in self._network.state_dict().values())

    def infer(self, pixels: NDArray[np.uint8]) -> Iterator[Inference]:
        """Score luminance of shape (N, S, S); see :class:`mura_batch.runtime.Runtime`."""
        parts: Iterable[Inference]
        with memory_watched(len(pixels), self.device):
            if self.device == "cpu":
                size = min(_PORTION, math.ceil(len(pixels) / _stream_count()))
                portions = [pixels[at : at + size] for at in range(0, len(pixels), size)]
                parts = _streams().map(lambda portion: _fetched(self._forward(portion)), portions)
            else:
                parts = map(_fetched, [self._forward(pixels)])  # a GPU goes on by itself
        return watched(parts, len(pixels), self.device)

    def _forward(self, pixels: NDArray[np.uint8]) -> Evidence:
        with torch.inference_mode():
            films = torch.from_numpy(np.require(pixels, requirements="W")).to(self.device)
            images = normalise(films, self._spec.mean, self._spec.std)
            evidence: Evidence = self._network(images.contiguous(memory_format=torch.channels_last))
            return evidence


def _fetched(evidence: Evidence) -> Inference:
    return Inference(evidence.logit.float().cpu().numpy(), evidence.map.float().cpu().numpy())


@cache
def _threads() -> int:
    """Return how many threads each stream has."""
    return math.ceil(torch.get_num_threads() / _MOST_STREAMS)


@cache
def _stream_count() -> int:
    return torch.get_num_threads() // _threads()


@cache
def _streams() -> ThreadPoolExecutor:
    """Return the streams that all networks of this process share.

    Threads that are started later and run torch have as few threads as a stream.
    """
    threads = _threads()
    return ThreadPoolExecutor(
        _stream_count(), "torch", initializer=lambda: torch.set_num_threads(threads)
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
