"""The network on a CUDA device: passes recorded once for each size, copies beside the work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.backends import cudnn

from mura_batch.network import Evidence, EvidenceNet, Network, network_with
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.choice import refusal
from mura_batch.runtime.inference import Inference, OutOfMemory, memory_watched, watched
from mura_batch.runtime.torch_runtime import Passes
from mura_batch.tensors import Weights

log = logging.getLogger(__name__)

_LARGEST = 64  # views of one pass; what a batch has more goes in further ones, queued behind it
_WARM_UP = 3  # passes before one is recorded: cuDNN tries its algorithms in them

_Recording = Callable[[Tensor], Evidence]


class CudaRuntime:
    """Torch on one GPU, in f32 (not TF32) or float16; the network is taken over.

    A batch goes in parts, each filled up to a power of two. The pass of each size is recorded
    as a CUDA graph when it is first wanted and replayed from then on: a DenseNet-121 is some
    four hundred short kernels, which Python cannot start as fast as a GPU ends them. Films are
    copied as uint8 from pinned memory on a stream of their own, beside the pass of the part
    before; each network computes on its own stream, so that those of several areas share the
    device.

    Args:
        device: ``cuda:N``.
    """

    name: Final = "torch"

    def __init__(
        self, network: Network, spec: Preprocessing, device: str, precision: Literal["f32", "fp16"]
    ) -> None:
        self.device: Final = device
        self.precision: Final = precision
        # The hybrid's map comes by autograd, which computes on threads of its own.
        self._recordable = isinstance(network, EvidenceNet)
        with memory_watched(0, device):
            self._forward = Passes(network, spec, device, precision)
            self._copying, self._computing = (
                torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
                for _ in range(2)
            )
            self._computing.wait_stream(torch.cuda.current_stream(device))  # for the weights
        self._recordings: dict[int, _Recording] = {}
        self._room = torch.cuda.graph_pool_handle()  # one after the other they need it once
        self._recorded_bytes = 0

    @property
    def nbytes(self) -> int:
        """See :class:`mura_batch.runtime.Runtime`."""
        return self._forward.nbytes + self._recorded_bytes

    def infer(self, pixels: NDArray[np.uint8]) -> Iterator[Inference]:
        """Score luminance of shape (N, S, S); see :class:`mura_batch.runtime.Runtime`."""
        with memory_watched(len(pixels), self.device):
            started = [self._started(part) for part in portions(pixels)]
        return watched((fetched() for fetched in started), len(pixels), self.device)

    @torch.inference_mode()
    def _started(self, part: NDArray[np.uint8]) -> Callable[[], Inference]:
        """Queue a pass of at most ``_LARGEST`` views; the result waits for it."""
        pinned = torch.from_numpy(filled(part)).pin_memory()
        with torch.cuda.stream(self._copying):
            films = pinned.to(self.device, non_blocking=True)
        self._computing.wait_stream(self._copying)
        with (
            torch.cuda.stream(self._computing),
            cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
        ):
            films.record_stream(self._computing)
            evidence = self._recording(films)(films)
            logits, maps = (
                found[: len(part)].to("cpu", non_blocking=True) for found in evidence
            )  # into pinned memory
            # To wait for it takes no core from the decoders.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves its constructor untyped
            done.record(self._computing)

        def fetched() -> Inference:
            done.synchronize()
            return Inference(logits.numpy().copy(), maps.numpy().copy())

        return fetched

    def _recording(self, films: Tensor) -> _Recording:
        """Return the pass of films of this shape, recorded where that can be."""
        size = len(films)
        if size not in self._recordings:
            try:
                recording = self._recorded(films) if self._recordable else self._forward
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as exc:
                told = str(exc).partition("\n")[0]
                log.warning("passes cannot be recorded here: they take longer", extra={"why": told})
                recording = self._forward
            self._recordings[size] = recording
        return self._recordings[size]

    def _recorded(self, films: Tensor) -> _Recording:
        wanted = films.clone()  # the recording reads this memory for ever
        for _ in range(_WARM_UP):
            self._forward(wanted)
        torch.cuda.empty_cache()  # as the recording does first
        before = int(torch.cuda.memory_reserved(self.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, self._room, self._computing, capture_error_mode="thread_local"
        ):
            evidence = self._forward(wanted)
        self._recorded_bytes += max(0, int(torch.cuda.memory_reserved(self.device)) - before)

        def replayed(films: Tensor) -> Evidence:
            wanted.copy_(films)
            graph.replay()
            return evidence

        return replayed


def cuda_runtime(weights: Weights, spec: Preprocessing, device: str, *, exact: bool) -> CudaRuntime:
    """Return the network in float16, where that is right and faster here; else in f32.

    ``exact`` asks for f32 in any case.
    """
    sure = CudaRuntime(network_with(weights), spec, device, "f32")
    if exact:
        return sure
    try:
        quick = CudaRuntime(network_with(weights), spec, device, "fp16")
        why = refusal(quick, sure, spec)
    except (RuntimeError, OutOfMemory) as exc:  # an old device, or no room for both
        why = str(exc).partition("\n")[0]
    if why:
        log.warning("float16 is not used on this machine", extra={"why": why})
        return sure
    return quick


def portions(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Yield the views (N, S, S) in their order, at most ``_LARGEST`` at a time."""
    for at in range(0, len(pixels), _LARGEST):
        yield pixels[at : at + _LARGEST]


def filled(part: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the views (N, S, S) with black ones behind them up to a power of two."""
    size = 1 << (len(part) - 1).bit_length()
    whole = np.zeros((size, *part.shape[1:]), np.uint8)
    whole[: len(part)] = part
    return whole
