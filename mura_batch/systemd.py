"""What the daemon tells the service manager: it is ready, it is alive, it is leaving.

The protocol of sd_notify(3) and sd_watchdog_enabled(3): one datagram of ``NAME=value`` lines to
the unix socket that the service manager names in the environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

READY = "READY=1"
ALIVE = "WATCHDOG=1"
STOPPING = "STOPPING=1"


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """The one that started this process, as far as it wants to hear from it.

    Attributes:
        socket: path of its datagram socket, or ``@name`` of an abstract one; empty where the
            process was started by hand.
        watchdog_seconds: it kills the process when :data:`ALIVE` stays away for this long, so
            send it twice as often; None where it does not watch.
    """

    socket: str = ""
    watchdog_seconds: float | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` (microseconds, own pid).

        A watchdog interval that is no positive number, or meant for another process, counts
        as none.
        """
        interval = environment.get("WATCHDOG_USEC", "")
        watched = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        seconds = int(interval) / 1e6 if interval.isascii() and interval.isdigit() else 0.0
        return cls(environment.get("NOTIFY_SOCKET", ""), seconds if watched and seconds else None)

    def notify(self, *lines: str) -> bool:
        """Send ``lines``, such as :data:`READY` or ``"STATUS=3 studies wait"``, as one message.

        Returns:
            Whether it was delivered: False where nobody listens (started by hand, or the
            socket is gone), which is no reason to stop working.
        """
        if not self.socket:
            return False
        address = "\0" + self.socket[1:] if self.socket.startswith("@") else self.socket
        message = "\n".join(lines).encode(errors="replace")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            try:
                channel.connect(address)
                channel.send(message)
            except OSError:
                return False
        return True
