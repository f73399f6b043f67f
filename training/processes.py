"""Processes beside this one: they end with it, and one that is killed is told in a line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TypeVar

from mura_batch.errors import Transient

T = TypeVar("T")

_KILLED = (
    "A process beside this one was killed, perhaps for want of memory: run the same command again;"
    " with fewer of them (--jobs, --workers) it needs less."
)


@contextmanager
def pool_of(count: int | None) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of so many processes, one a core for None.

    Raises:
        Transient: one of them was killed, which ends the others too.
    """
    context = get_context("spawn")
    try:
        with ProcessPoolExecutor(count, context, initializer=_end_with_parent) as pool:
            yield pool
    except BrokenProcessPool as exc:
        raise Transient(_KILLED) from exc


def from_workers(batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches of a torch loader with workers.

    Raises:
        Transient: a worker was killed.
    """
    try:
        yield from batches
    except RuntimeError as exc:  # torch has no kind of its own for it
        if "DataLoader worker" not in str(exc):
            raise
        raise Transient(_KILLED) from exc


def _end_with_parent() -> None:
    """End this process when the one that began it has ended, however that was."""

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()
