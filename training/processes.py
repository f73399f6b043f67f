"""Processes beside this one: they end with it, and one that is killed is told in a line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread

from mura_batch.errors import Transient

_KILLED = (
    "A process beside this one was killed, perhaps for want of memory: free some, and run the same"
    " command again."
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


def side_by_side(works: Sequence[Callable[[], None]]) -> None:
    """Do them in a process each; an error of one of them is raised when it has ended.

    Raises:
        Transient: one of the processes was killed, which ends the others too.
    """
    with pool_of(len(works)) as pool:
        under_way = [pool.submit(work) for work in works]
        pool.submit(int)  # the pool watches a process only from the next submission on
        for ended in as_completed(under_way):
            ended.result()


@contextmanager
def loader_watched() -> Iterator[None]:
    """Around all that is done while a torch loader has workers.

    Raises:
        Transient: a worker was killed; torch raises of it wherever the main thread is just then.
    """
    try:
        yield
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
