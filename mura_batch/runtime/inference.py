"""What every runtime gives back, and how it says that a batch was too large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mura_batch.errors import Transient

Precision = Literal["f32", "fp16", "int8", "int8+bf16"]


class OutOfMemory(Transient):
    """The batch does not fit into the device's memory; a smaller one may."""


@dataclass(frozen=True, slots=True)
class Inference:
    """One forward pass over N views.

    Attributes:
        logits: float32, shape (N,); the sigmoid is the probability of the target.
        maps: float32, shape (N, h, w); signed evidence in logit units (see
            :mod:`mura_batch.network`).
    """

    logits: NDArray[np.float32]
    maps: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Return all that :meth:`Runtime.infer` yields as one; at least one part."""
        found = list(parts)
        return cls(
            np.concatenate([part.logits for part in found]),
            np.concatenate([part.maps for part in found]),
        )


class Runtime(Protocol):
    """A network ready to score; for one thread at a time, which may start several passes."""

    @property
    def name(self) -> str:
        """``torch`` or ``openvino``."""
        ...

    @property
    def device(self) -> str:
        """``cpu``, ``cuda:0``, ``mps``."""
        ...

    @property
    def precision(self) -> Precision:
        """``f32``, ``fp16``, ``int8``, or ``int8+bf16``: bf16 for what is not int8."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that it keeps while it is warm, in bytes, estimated."""
        ...

    def infer(self, pixels: NDArray[np.uint8]) -> Iterator[Inference]:
        """Start to score luminance of shape (N, S, S), N at least 1, S the side the weights want.

        Returns:
            The views in their order, some at a time; to take the next ones waits for them. A pass
            that is started while another is under way keeps the device at work between them.

        Raises:
            OutOfMemory: the batch is too large for the device; also while parts are taken.
        """
        ...


def watched(parts: Iterable[Inference], views: int, device: str) -> Iterator[Inference]:
    """Yield the parts of a pass that was started, with :func:`memory_watched` over them."""
    with memory_watched(views, device):
        yield from parts


_MARKS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "bad alloc")


@contextmanager
def memory_watched(views: int, device: str) -> Iterator[None]:
    """Turn the many ways in which libraries report a full memory into :class:`OutOfMemory`."""
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and not any(mark in str(exc).lower() for mark in _MARKS):
            raise
        raise OutOfMemory(
            f"{device} has too little free memory for {views} views at once: set `batch` lower"
            " or free memory"
        ) from exc


def words(runtime: Runtime) -> str:
    """Return how results name what computed them: ``openvino int8 cpu``."""
    return f"{runtime.name} {runtime.precision} {runtime.device}"
