"""Films made as small as a network's input on its device, bit for bit as Pillow makes them."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mura_batch.network_input import Box, Luminance, Resize, resized

log = logging.getLogger(__name__)

_BITS = 22  # of Pillow's fixed-point weights
_TURNS = 3
_TRIED_ON = (2500, 2048)  # rows and columns of a film as plates give them


class DeviceResize:
    """Pillow's bilinear resize with antialiasing, computed on a torch device.

    Pillow weighs pixels with whole numbers of 1/2^22 and rounds after each of the two directions,
    and so does this: in float64, which holds these sums exactly in whatever order they are made.
    Only regions as wide as high are computed here: where one side is reduced more than the other,
    it depends on Pillow's version which direction comes first. Thread-safe.

    Args:
        device: a torch device that has float64.
    """

    def __init__(self, device: str) -> None:
        self.device: Final = device
        self._streams = threading.local()

    @torch.inference_mode()
    def __call__(self, luminance: Luminance, box: Box, size: int) -> Luminance:
        """Return what :func:`mura_batch.network_input.resized` does."""
        if box.right - box.left != box.bottom - box.top:
            return resized(luminance, box, size)
        try:
            with torch.cuda.stream(self._stream()):
                return self._resized(luminance, box, size).cpu().numpy()
        except torch.OutOfMemoryError:
            return resized(luminance, box, size)

    def _resized(self, luminance: Luminance, box: Box, size: int) -> Tensor:
        height, width = luminance.shape
        rows = slice(max(box.top, 0), min(box.bottom, height))
        columns = slice(max(box.left, 0), min(box.right, width))
        seen = np.require(luminance[rows, columns], requirements=["C", "W"])
        film = torch.from_numpy(seen).to(self.device).double()
        weights = self._weights(box.right - box.left, size)
        # Outside the film all is black, and weighs nothing.
        across = weights[:, columns.start - box.left : columns.stop - box.left]
        down = weights[:, rows.start - box.top : rows.stop - box.top]
        return _rounded(down @ _rounded(film @ across.T)).to(torch.uint8)

    def _weights(self, length: int, size: int) -> Tensor:
        """Return with what each of ``length`` pixels counts in each of ``size``, in 1/2^22."""
        first, weights = pillow_weights(length, size)
        places = torch.from_numpy(first[:, np.newaxis] + np.arange(weights.shape[1]))
        whole = torch.zeros(
            (size, length + weights.shape[1]), dtype=torch.float64, device=self.device
        )
        whole.scatter_(1, places.to(self.device), torch.from_numpy(weights).to(self.device))
        return whole[:, :length]

    def _stream(self) -> torch.cuda.Stream | None:
        """Return this thread's own stream; None, which changes nothing, on a CPU."""
        if not self.device.startswith("cuda"):
            return None
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch has no types for it
        stream: torch.cuda.Stream = self._streams.own
        return stream


def _rounded(sums: Tensor) -> Tensor:
    return sums.add_(1 << (_BITS - 1)).div_(1 << _BITS).floor_().clamp_(0, 255)


def pillow_weights(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return Pillow's bilinear weights along a side of ``length`` pixels that is made ``size``.

    Returns:
        The first pixel that counts in each of ``size``, and the weights (size, taps), whole
        numbers of 1/2^22, of it and of those after it.

    Source: Pillow, src/libImaging/Resample.c, ``precompute_coeffs`` and ``normalize_coeffs_8bpc``;
    sums are made in its order, so that they round as its do.
    """
    scale = length / size
    support = max(scale, 1.0)
    taps = int(np.ceil(support)) * 2 + 1
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), length)
    places = first[:, np.newaxis] + np.arange(taps)
    weights = 1.0 - np.abs((places - centre[:, np.newaxis] + 0.5) * (1.0 / support))
    weights[(weights < 0) | (places >= last[:, np.newaxis])] = 0.0
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]
    return first, np.floor(0.5 + weights * (1 << _BITS))


def quicker_resize(device: str, size: int) -> Resize:
    """Return how films are made ``size`` pixels wide and high: on a CUDA device, where that is
    right and faster on this machine, else by Pillow.
    """
    if not device.startswith("cuda"):
        return resized
    height, width = _TRIED_ON
    film = np.random.default_rng(0).integers(0, 256, _TRIED_ON).astype(np.uint8)
    margin = (height - width) // 2
    box = Box(-margin, 0, width + margin, height)
    own = DeviceResize(device)
    try:
        if not np.array_equal(own(film, box, size), resized(film, box, size)):
            return resized
        times = [
            min(_seconds(one, film, box, size) for _ in range(_TURNS)) for one in (own, resized)
        ]
    except RuntimeError as exc:
        log.warning("films are resized on the CPU", extra={"why": str(exc).partition("\n")[0]})
        return resized
    told = {"device_ms": round(1000 * times[0], 1), "cpu_ms": round(1000 * times[1], 1)}
    log.info("a large film resized", extra=told)
    return own if times[0] < times[1] else resized


def _seconds(resize: Resize, film: Luminance, box: Box, size: int) -> float:
    began = time.perf_counter()
    resize(film, box, size)
    return time.perf_counter() - began
