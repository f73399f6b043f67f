"""The lock that a daemon holds in its home, seen from other processes."""

from __future__ import annotations

import fcntl
from pathlib import Path

LOCK_FILE = ".watch.lock"


def is_watched(home: Path) -> bool:
    """Return whether a daemon works in ``home``."""
    try:
        with (home / LOCK_FILE).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
