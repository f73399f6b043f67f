"""Word from one thread to another that there is something to look at."""

from __future__ import annotations

from contextlib import suppress
from queue import Empty, SimpleQueue


class News:
    """Like ``threading.Event``, but safe in a signal handler.

    A handler that interrupts its own thread inside ``Event.set`` waits there for itself for ever.
    """

    def __init__(self) -> None:
        self._told: SimpleQueue[None] = SimpleQueue()

    def tell(self) -> None:
        """End the present wait, or the next one."""
        if self._told.empty():
            self._told.put(None)

    def wait(self, timeout: float) -> None:
        """Return after ``timeout`` seconds, or sooner where something was told since the last."""
        with suppress(Empty):
            self._told.get(timeout=timeout)
            while True:
                self._told.get_nowait()
