"""The error tree. Every message says what happened and what to do next.

MuraError
├── Transient       the same input may work later: try again
├── Rejected        this input will never work unchanged: quarantine, with a code
│   ├── UnreadableImage
│   └── UnsupportedArea
└── Misconfigured   the site or the command is wrong: stop and tell
    ├── NoWeights
    └── WeightsRefused
"""

from __future__ import annotations

from collections.abc import Sequence


class MuraError(Exception):
    """Root of every error that this package raises on purpose."""


class Transient(MuraError):
    """The same work may succeed later (full disk, lost share, no memory)."""


class Rejected(MuraError):
    """The input can never be scored as it is.

    Attributes:
        code: short machine-readable reason, such as ``truncated`` (``reason.json`` and
            ``query --reason`` use it).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class UnreadableImage(Rejected):
    """The file is not a decodable radiograph; the code says in which way."""


class UnsupportedArea(Rejected):
    """The radiograph shows a body part outside the seven areas."""


class Misconfigured(MuraError):
    """A setting, a flag or the site itself is wrong; nothing was changed."""


class NoWeights(Misconfigured):
    """An area has no active weights; the message names the command that fixes it."""


class WeightsRefused(Misconfigured):
    """A checkpoint or stored weights file does not fit, or is not what its card says."""


_MOST_TOLD = 5


def listed(problems: Sequence[str]) -> str:
    """Return the first problems in words, and how many there are besides."""
    more = len(problems) - _MOST_TOLD
    return "; ".join(problems[:_MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")
