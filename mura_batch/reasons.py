"""What to do about a study or file that could not be scored, by the code of its reason."""

from __future__ import annotations

_ADVICE = {
    "unsupported_area": "not one of the seven areas: nothing to do, or set the area by hand with"
    " `mura-batch rerun STUDY --set-area AREA` if that is wrong",
    "symbolic_link": "copy the file itself into the inbox instead of a link to it",
    "not_a_file": "drop regular files only",
    "unreadable": "give the daemon's user the right to read the file and drop it again",
    "too_large": "more than any film has: export the image again from its source and drop it again",
    "deleted": 'the source was deleted after its first result (archive = "delete"): drop the'
    " whole study again",
    "interrupted": "look at its files and at the machine's memory; `mura-batch rerun STUDY` tries"
    " again",
    "defect": "report it with the log; `mura-batch rerun STUDY` tries again",
}


def what_to_do(code: str) -> str:
    """Return advice for the reason code that ``reason.json`` and ``query --reason`` show."""
    return _ADVICE.get(code, "export the image again from its source and drop it again")
