"""The network on torch: on a CPU, on Apple's MPS, and what a CUDA device shares with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mura_batch.errors import Misconfigured
from mura_batch.network import Evidence, Network, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.inference import Inference, memory_watched, watched

# On the CPU a batch goes in portions to streams of one or few threads each. All threads on one
# pass wait for each other after every layer, and wait long where decoders need a core too:
# measured on two cores, 10 images/s with both on a batch of 16, 13 with two streams.
_PORTION = 4  # views
_MOST_STREAMS = 8


class Passes:
    """A network on a torch device: ``channels_last``, inference mode; it is taken over.

    With ``fp16`` the trunk's convolutions have float16 weights and inputs, as torch's autocast
    would make of them at every pass; batch normalisation keeps its float32 statistics, and what
    comes after the last feature map is float32: the logit is a sum of a thousand channels.

    Attributes:
        nbytes: of its weights.
    """

    def __init__(
        self, network: Network, spec: Preprocessing, device: str, precision: Literal["f32", "fp16"]
    ) -> None:
        self._network = network.eval().requires_grad_(requires_grad=False)
        self._network.to(torch.device(device)).to(memory_format=torch.channels_last)
        self._dtype = torch.float32
        if precision == "fp16":
            self._dtype = torch.float16
            for layer in self._network.features.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.half()
        # On the device once: no pass copies them there, so that a pass can be recorded.
        self._mean, self._std = (torch.tensor(v, device=device) for v in (spec.mean, spec.std))
        self.nbytes: Final[int] = sum(t.nbytes for t in self._network.state_dict().values())

    @torch.inference_mode()
    def __call__(self, films: Tensor) -> Evidence:
        """Pass uint8 luminance (N, S, S) on the device; the result is float32 there."""
        images = normalise(films, self._mean, self._std)
        images = images.to(self._dtype, memory_format=torch.channels_last)
        activations = functional.relu(self._network.features(images))
        evidence: Evidence = self._network.read(activations.float())
        return evidence


class TorchRuntime:
    """Eager torch in f32; the network is taken over."""

    name: Final = "torch"
    precision: Final = "f32"

    def __init__(self, network: Network, spec: Preprocessing, device: str) -> None:
        self.device: Final = device
        with memory_watched(0, device):
            self._forward = Passes(network, spec, device, self.precision)
        self.nbytes: Final = self._forward.nbytes

    def infer(self, pixels: NDArray[np.uint8]) -> Iterator[Inference]:
        """Score luminance of shape (N, S, S); see :class:`mura_batch.runtime.Runtime`."""
        parts: Iterable[Inference]
        with memory_watched(len(pixels), self.device):
            if self.device == "cpu":
                size = min(_PORTION, math.ceil(len(pixels) / _stream_count()))
                portions = [pixels[at : at + size] for at in range(0, len(pixels), size)]
                parts = _streams().map(lambda portion: _fetched(self._passed(portion)), portions)
            else:
                parts = map(_fetched, [self._passed(pixels)])  # a GPU goes on by itself
        return watched(parts, len(pixels), self.device)

    def _passed(self, pixels: NDArray[np.uint8]) -> Evidence:
        films = torch.from_numpy(np.require(pixels, requirements="W"))
        return self._forward(films.to(self.device))


def _fetched(evidence: Evidence) -> Inference:
    return Inference(evidence.logit.cpu().numpy(), evidence.map.cpu().numpy())


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
