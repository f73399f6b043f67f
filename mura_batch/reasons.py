"""Why something lies in quarantine and what to do about it: ``reason.json``, for a person."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mura_batch.atomic import write_atomic

REASON_FILE = "reason.json"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something lies in quarantine, for a person: no patient data in any field."""

    code: str
    stage: str
    message: str
    what_to_do: str


_FIELDS = tuple(field.name for field in dataclasses.fields(Reason))


def explain(
    folder: str, note: Mapping[str, object], entry: Mapping[str, str] | None = None
) -> None:
    """Write ``reason.json`` whole: ``note`` over what it says already, one ``entry`` a file.

    ``whole`` says that the claim as a whole is in quarantine. The ``code``, ``stage``,
    ``message`` and ``what_to_do`` are the claim's then, else its first file's.
    """
    known = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **told(folder), **note}
    if entry is not None:
        entries = {file["id"]: file for file in known.get("files", [])} | {entry["id"]: entry}
        known["files"] = list(entries.values())
        known = {key: entry[key] for key in _FIELDS} | known
    text = json.dumps(known, indent=1, ensure_ascii=False)
    content = text.encode(errors="backslashreplace")
    write_atomic(Path(folder, REASON_FILE), lambda stream: stream.write(content))


def told(folder: str) -> dict[str, Any]:
    """Return what ``reason.json`` says; nothing where there is none, or a spoilt one."""
    with suppress(FileNotFoundError, ValueError):
        return dict(json.loads(Path(folder, REASON_FILE).read_bytes()))
    return {}


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
