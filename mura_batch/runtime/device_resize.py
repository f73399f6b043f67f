"""Films made as small as a network's input on its device, bit for bit as Pillow makes them."""

from __future__ import annotations

import logging
import time
from functools import cache
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

    As in Pillow, pixels are weighed with whole numbers of 1/2^22, and rounded after each of the two
    directions. Only regions as wide as high are computed here: where one side is reduced more than
    the other, it depends on Pillow's version which direction comes first. Thread-safe.

    Args:
        device: a torch device; the work is queued on its default stream, beside what networks
            compute on theirs.
    """

    def __init__(self, device: str) -> None:
        self.device: Final = device

    @torch.inference_mode()
    def __call__(self, luminance: Luminance, box: Box, size: int) -> Luminance:
        """Return what :func:`mura_batch.network_input.resized` does; it where the device fails."""
        if box.right - box.left != box.bottom - box.top:
            return resized(luminance, box, size)
        try:
            return self._resized(luminance, box, size).cpu().numpy()
        except RuntimeError as exc:  # no memory, a lost device: no fault of the film
            told = str(exc).partition("\n")[0]
            log.warning("a film is resized on the CPU", extra={"why": told})
            return resized(luminance, box, size)

    def _resized(self, luminance: Luminance, box: Box, size: int) -> Tensor:
        first, weights = pillow_weights(box.right - box.left, size)
        film = torch.from_numpy(np.array(luminance, order="C")).to(self.device)
        narrow = self._weighed(film, first + box.left, weights)
        return self._weighed(narrow.T, first + box.top, weights).T

    def _weighed(
        self, film: Tensor, first: NDArray[np.int64], weights: NDArray[np.int32]
    ) -> Tensor:
        """Return a film's columns weighed; those outside of it are black, and weigh nothing."""
        places = first[:, np.newaxis] + np.arange(weights.shape[1])
        weights = np.where((places >= 0) & (places < film.shape[1]), weights, 0)
        columns = torch.from_numpy(places.clip(0, film.shape[1] - 1)).to(self.device)
        counts = torch.from_numpy(weights).to(self.device)
        half = 1 << (_BITS - 1)
        sums = torch.full((len(film), len(first)), half, dtype=torch.int32, device=self.device)
        for tap in range(weights.shape[1]):
            sums += film[:, columns[:, tap]].int() * counts[:, tap]
        return (sums >> _BITS).clamp(0, 255).to(torch.uint8)


def pillow_weights(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
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
    return first, (0.5 + weights * (1 << _BITS)).astype(np.int32)


@cache
def resize_on(device: str, size: int) -> Resize:
    """Return how films are made ``size`` pixels wide and high: on a CUDA device, where that is
    right and quicker on this machine, else by Pillow. Tried once in a process.
    """
    return quicker(DeviceResize(device), size) if device.startswith("cuda") else resized


def quicker(own: Resize, size: int) -> Resize:
    """Return ``own`` where it gives a large film as Pillow does, and sooner; else Pillow's."""
    height, width = _TRIED_ON
    film = np.random.default_rng(0).integers(0, 256, _TRIED_ON).astype(np.uint8)
    margin = (height - width) // 2
    box = Box(-margin, 0, width + margin, height)
    if not np.array_equal(own(film, box, size), resized(film, box, size)):
        return resized
    ours, pillows = (
        min(_seconds(one, film, box, size) for _ in range(_TURNS)) for one in (own, resized)
    )
    told = {"device_ms": round(1000 * ours, 1), "cpu_ms": round(1000 * pillows, 1)}
    log.info("a large film resized", extra=told)
    return own if ours < pillows else resized


def _seconds(resize: Resize, film: Luminance, box: Box, size: int) -> float:
    began = time.perf_counter()
    resize(film, box, size)
    return time.perf_counter() - began
