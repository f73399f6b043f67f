"""Which of the seven areas a radiograph shows, and why: codes, words, folder names, people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class Area(StrEnum):
    """The seven areas of the upper limb that weights exist for, named as MURA names them."""

    XR_ELBOW = "XR_ELBOW"
    XR_FINGER = "XR_FINGER"
    XR_FOREARM = "XR_FOREARM"
    XR_HAND = "XR_HAND"
    XR_HUMERUS = "XR_HUMERUS"
    XR_SHOULDER = "XR_SHOULDER"
    XR_WRIST = "XR_WRIST"


class Source(StrEnum):
    """Where a clue was found, strongest first (a person's word stands above all of them)."""

    CODE = "code"
    BODY_PART = "body_part"
    DESCRIPTION = "description"
    FOLDER = "folder"
    FILE_NAME = "file_name"
    COMMENT = "comment"
    PERSON = "person"


@dataclass(frozen=True, slots=True)
class Clue:
    """One piece of raw material, as ``study.py`` gathers it from a header or a path.

    Attributes:
        source: how much it counts.
        origin: the DICOM keyword it stood under, or ``folder`` or ``file name``.
        text: words, or the meaning of a code.
        code: SCT or legacy SRT code value, such as ``85562004`` or ``T-D8700``.
    """

    source: Source
    origin: str
    text: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Witness:
    """What one clue says: an area, several, or a part outside the seven areas.

    Attributes:
        term: the code or word that was recognised; never the whole text, which may hold
            patient data.
        weak: it decides nothing without a second witness.
    """

    clue: Clue
    verdict: Literal["area", "ambiguous", "unsupported"]
    area: Area | None
    weak: bool
    term: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The area of one image, or why there is none."""

    area: Area | None
    source: Source | None
    outcome: Literal["decided", "needs_person", "unsupported"]
    why: str
    witnesses: tuple[Witness, ...]
    conflicts: tuple[Witness, ...]

    def evidence(self) -> list[dict[str, str]]:
        """Return a JSON-ready row per witness: term, source, origin, verdict."""
        return [
            {
                "term": w.term,
                "source": str(w.clue.source),
                "origin": w.clue.origin,
                "verdict": w.area or w.verdict,
            }
            for w in self.witnesses
        ]


@dataclass(frozen=True, slots=True)
class AreaRules:
    """What a site adds to the built-in rules.

    Attributes:
        words: the site's own words and folder names; they are matched like the built-in
            ones, and the longest match wins.
        shoulder_girdle: clavicle, scapula and acromioclavicular joint count as XR_SHOULDER.
    """

    words: Mapping[str, Area] = field(default_factory=dict)
    shoulder_girdle: bool = False


BUILT_IN = AreaRules()


def decide(clues: Iterable[Clue], rules: AreaRules = BUILT_IN) -> Decision:
    """Weigh the clues of one image."""
    _ = tuple(clues), rules
    return Decision(None, None, "needs_person", "nothing names an area", (), ())


def decision_by_person(area: Area, clues: Iterable[Clue]) -> Decision:
    """Return the decision that a person made, with the clues kept as witnesses."""
    _ = tuple(clues)
    return Decision(area, Source.PERSON, "decided", "set by a person", (), ())
