"""Which of the seven areas a radiograph shows, and why: codes, words, folder names, people.

A clue (what a header or a path says) becomes a witness (what that means), and the witnesses of
one image become a decision. The tables are in ``area_terms.py``; how witnesses are weighed is
told at ``decide``. A training label in a path (``positive``, ``negative``) is never evidence.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Literal

from mura_batch import area_terms
from mura_batch.area_terms import GIRDLE, OUTSIDE


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
        code: SCT or legacy SRT code value, such as ``85562004`` or ``T-D8700``; read where
            ``source`` is ``CODE``, since procedure codes are another vocabulary.
    """

    source: Source
    origin: str
    text: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Witness:
    """What one clue says: an area, several or none of them, or a part outside the seven areas.

    Attributes:
        area: the area that it names, where the verdict is ``area``.
        weak: it decides nothing without a second witness.
        term: the codes and words that were recognised; never the whole text, which may hold
            patient data.
        may_mean: every area (or ``area_terms.OUTSIDE``, ``GIRDLE``) that it does not contradict;
            empty where it is too general to contradict anything.
    """

    clue: Clue
    verdict: Literal["area", "ambiguous", "unsupported"]
    area: Area | None
    weak: bool
    term: str = ""
    may_mean: frozenset[str] = frozenset()

    def names(self, place: str) -> bool:
        """Tell whether this witness alone points at ``place``."""
        return self.area == place or self.may_mean == {place}

    def __str__(self) -> str:
        return f'"{self.term}" ({self.clue.origin})'


@dataclass(frozen=True, slots=True)
class Decision:
    """The area of one image, or why there is none.

    Attributes:
        source: of the strongest witness behind the outcome; None where a person is needed.
        why: one sentence that holds recognised terms and origins, and no patient data.
        witnesses: all of them, strongest source first.
        conflicts: those that contradict the area or, where none was decided, one another.
    """

    area: Area | None
    source: Source | None
    outcome: Literal["decided", "needs_person", "unsupported"]
    why: str
    witnesses: tuple[Witness, ...]
    conflicts: tuple[Witness, ...]

    def evidence(self) -> list[dict[str, str]]:
        """Return a JSON-ready row per witness: term, source, origin, verdict, weight, conflict."""
        against = set(self.conflicts)
        return [
            {
                "term": witness.term,
                "source": str(witness.clue.source),
                "origin": witness.clue.origin,
                "verdict": str(witness.area or witness.verdict),
                "weight": "weak" if witness.weak else "full",
                "conflict": "yes" if witness in against else "no",
            }
            for witness in self.witnesses
        ]


@dataclass(frozen=True, slots=True)
class AreaRules:
    """What a site adds to the built-in rules.

    Attributes:
        words: the site's own words and folder names; they are matched like the built-in ones,
            the longest match wins, and one that is built in too takes the site's meaning.
        shoulder_girdle: clavicle, scapula and acromioclavicular joint count as XR_SHOULDER.
    """

    words: Mapping[str, Area] = field(default_factory=dict)
    shoulder_girdle: bool = False


BUILT_IN = AreaRules()


def decide(clues: Iterable[Clue], rules: AreaRules = BUILT_IN) -> Decision:
    """Weigh all clues of one image; their order and repetition do not matter.

    Codes, Body Part Examined, descriptions, folder and file names bind: an area is decided when
    at least one of them names it and all of them allow it. Where they contradict one another
    none wins, however strong: a person decides. A generic word (``UPPER EXTREMITY``) allows
    everything; a text with two areas ("hand + wrist") allows both and names neither.

    Weak witnesses decide nothing alone. The word ``ARM`` suggests XR_HUMERUS, allows every part
    of the arm, and needs a second witness that names the humerus. Image comments never bind: one
    that disagrees is listed among the conflicts and does not hold the study up.

    Returns:
        The decision; where a part outside the seven areas is named and nothing contradicts it,
        the outcome is ``unsupported``. Text of any kind is accepted; nothing is raised.
    """
    witnesses = _witnesses(clues, rules)
    place = _named_by_full(witnesses) or _named_by_weak(witnesses)
    conflicts = tuple(w for w in witnesses if _contradicts(w, witnesses, place))
    if place is None or place == GIRDLE:
        why = _why_a_person(witnesses, conflicts, place)
        return Decision(None, None, "needs_person", why, witnesses, conflicts)
    backers = sorted((w for w in witnesses if w.names(place)), key=lambda w: w.weak)
    why, source = _why(backers, place, conflicts), backers[0].clue.source
    if place == OUTSIDE:
        return Decision(None, source, "unsupported", why, witnesses, conflicts)
    return Decision(Area(place), source, "decided", why, witnesses, conflicts)


def decision_by_person(area: Area, clues: Iterable[Clue], rules: AreaRules = BUILT_IN) -> Decision:
    """Return the decision that a person made; clues that say otherwise stay as its conflicts."""
    witnesses = _witnesses(clues, rules)
    said = Witness(Clue(Source.PERSON, "person"), "area", area, False, area, frozenset({area}))
    conflicts = tuple(w for w in witnesses if _contradicts(w, witnesses, area))
    why = f"a person said {area}"
    return Decision(area, Source.PERSON, "decided", why, (said, *witnesses), conflicts)


# Weighing witnesses.


def _binding(witnesses: Iterable[Witness]) -> list[Witness]:
    return [w for w in witnesses if w.may_mean and w.clue.source is not Source.COMMENT]


def _named_by_full(witnesses: Sequence[Witness]) -> str | None:
    """Return the one place that a full witness names and that every binding witness allows."""
    binding = _binding(witnesses)
    full = [w for w in binding if not w.weak]
    named = {place for w in full if len(w.may_mean) == 1 for place in w.may_mean}
    named = named or {str(w.area) for w in full if w.area}
    allowed = [place for place in named if all(place in w.may_mean for w in binding)]
    return allowed[0] if len(allowed) == 1 else None


def _named_by_weak(witnesses: Sequence[Witness]) -> str | None:
    """Return the area on which weak witnesses of two sources agree, nothing contradicting them.

    Two bare *arm* are one witness: the description repeats what the machine was set to.
    """
    weak = [w for w in witnesses if w.weak and w.area]
    places = {str(w.area) for w in weak}
    two_sources = len({w.clue.source for w in weak}) > 1
    if len(places) != 1 or not two_sources or all(w.may_mean == _ARM.may_mean for w in weak):
        return None
    (place,) = places
    return place if all(place in w.may_mean for w in witnesses if w.may_mean) else None


def _contradicts(witness: Witness, witnesses: Iterable[Witness], place: str | None) -> bool:
    """Tell whether ``witness`` speaks against the place or, without one, against another."""
    if not witness.may_mean:
        return False
    if place is not None:
        return place not in witness.may_mean
    undecided = len(witness.may_mean) > 1 and witness.area is None
    return undecided or any(w.may_mean and not w.may_mean & witness.may_mean for w in witnesses)


def _why(backers: Sequence[Witness], place: str, conflicts: Sequence[Witness]) -> str:
    says = "is outside the seven areas" if place == OUTSIDE else f"says {place}"
    more = len(backers) - 1
    agreed = f", {more} more agree{'s' if more == 1 else ''}" if more else ""
    against = f"; weak and against it: {_listed(conflicts, str, ', ')}" if conflicts else ""
    return f"{backers[0]} {says}{agreed}{against}"


def _why_a_person(
    witnesses: Sequence[Witness], conflicts: Sequence[Witness], place: str | None
) -> str:
    if place:
        named = next(w for w in witnesses if w.names(place))
        return f"{named} is the {place}, which this site has not counted as {Area.XR_SHOULDER}"
    if len(conflicts) > 1:
        return f"these contradict one another: {_listed(conflicts, _said, '; ')}"
    if conflicts:
        return f"nothing decides what {_said(conflicts[0])} means"
    if witnesses:
        return f"too little to decide on: {_listed(witnesses, _said, '; ')}"
    return "no code, word or folder name says which area it is"


_MOST_LISTED = 6


def _listed(witnesses: Sequence[Witness], told: Callable[[Witness], str], between: str) -> str:
    """Return the distinct words of the witnesses, of many only the first."""
    words = list(dict.fromkeys(map(told, witnesses)))
    more = len(words) - _MOST_LISTED
    return between.join(words[:_MOST_LISTED]) + (f"{between}and {more} more" if more > 0 else "")


def _said(witness: Witness) -> str:
    places = [str(witness.area)] if witness.area else sorted(witness.may_mean)
    if witness.may_mean > _ARM.may_mean:
        places = ["any part of the arm", *sorted(witness.may_mean - _ARM.may_mean)]
    return f"{witness}: {' or '.join(places) or 'no area'}{' (weak)' if witness.weak else ''}"


# From a clue to its witnesses.


def _witnesses(clues: Iterable[Clue], rules: AreaRules) -> tuple[Witness, ...]:
    """Return the witnesses of all distinct clues, strongest source first."""
    lexicon = _lexicon(frozenset(rules.words.items()), shoulder_girdle=rules.shoulder_girdle)
    ranks = {source: rank for rank, source in enumerate(Source)}
    ordered = sorted(set(clues), key=lambda c: (ranks[c.source], c.origin, c.code, c.text))
    return tuple(witness for clue in ordered for witness in _read(clue, lexicon))


def _read(clue: Clue, lexicon: _Lexicon) -> Iterator[Witness]:
    """Yield what the code says and what the words say: they are two witnesses."""
    code = clue.code.strip().upper()
    if clue.source is Source.CODE and code in lexicon.codes:
        yield _witness(clue, code, lexicon.codes[code])
    tokens = _tokens(clue.text)
    if clue.source is Source.COMMENT and _tells_history(tokens):
        return
    region = clue.source in {Source.CODE, Source.BODY_PART}
    terms = lexicon.find(tokens, region=region)
    french = region or not lexicon.french.isdisjoint(tokens)
    meanings = {
        term: _GENERIC if term.french and not french else term.meaning
        for term in terms
        if not term.hides
    }
    if not meanings:
        return
    merged = _merged(meanings.values())
    all_tell = len(merged.may_mean) > 1 and not merged.area
    telling = [
        term.shown
        for term, meaning in meanings.items()
        if meaning.may_mean and (all_tell or meaning.weak == merged.weak)
    ]
    shown = " + ".join(dict.fromkeys(telling or (term.shown for term in meanings)))
    yield _witness(clue, shown, merged)


def _witness(clue: Clue, term: str, meaning: _Meaning) -> Witness:
    verdict: Literal["area", "ambiguous", "unsupported"] = "ambiguous"
    if meaning.area:
        verdict = "area"
    elif meaning.may_mean == {OUTSIDE}:
        verdict = "unsupported"
    weak = meaning.weak or clue.source is Source.COMMENT
    return Witness(clue, verdict, meaning.area, weak, term, meaning.may_mean)


def _tells_history(tokens: Sequence[str]) -> bool:
    return "history" in tokens or ("hx", "of") in itertools.pairwise(tokens)


@dataclass(frozen=True, slots=True)
class _Meaning:
    """Places that a term allows, and the area that it stands for when nothing else is said."""

    may_mean: frozenset[str] = frozenset()
    area: Area | None = None
    weak: bool = False


_GENERIC = _Meaning()
_ARM = _Meaning(frozenset(Area) | {GIRDLE}, Area.XR_HUMERUS, weak=True)


def _meaning(*places: str, area: str = "") -> _Meaning:
    named = area or (places[0] if len(places) == 1 else "")
    return _Meaning(frozenset(places), Area(named) if named in list(Area) else None)


def _merged(meanings: Iterable[_Meaning]) -> _Meaning:
    """Return what the terms of one text say together.

    A term with one reading decides those with several that include it ("proximal humerus,
    shoulder"); what is left over makes the text ambiguous. Weak and generic terms count only
    where there is no other, or none that allows them ("arm, knee").
    """
    telling = [m for m in meanings if m.may_mean]
    full = [m for m in telling if not m.weak]
    if not full:
        return telling[0] if telling else _GENERIC
    firm = {place for m in full if len(m.may_mean) == 1 for place in m.may_mean}
    readings = telling if firm else full
    loose = [m for m in readings if len(m.may_mean) > 1 and not m.may_mean & firm]
    areas = {m.area for m in loose if m.area}
    if not firm and len(areas) == 1:
        shared = frozenset.intersection(*(m.may_mean for m in loose))
        if areas <= shared:
            return _Meaning(shared, areas.pop())
    return _meaning(*firm.union(*(m.may_mean for m in loose)))


# Words: normalising, splitting, finding the longest.

_LONGEST_TEXT = 1024  # characters that are read; DICOM has texts without an end
_LONGEST_GAP = 4  # skipped words between two words of one term
_SHORTEST_GLUED = 3  # characters of a term inside a longer word
_LABELS = frozenset({"positive", "negative"})
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_IDEOGRAPHS}]|[^\W\d_{_IDEOGRAPHS}]+|\d+")


def _normal(text: str) -> str:
    """Return ``text`` after NFKC and casefold, without accents and invisible characters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (
        char
        for char in unicodedata.normalize("NFKD", folded)
        if unicodedata.category(char) not in {"Mn", "Cf"}
    )
    return unicodedata.normalize("NFKC", "".join(kept))


def _tokens(text: str) -> tuple[str, ...]:
    """Split into words, numbers and single ideographs; training labels are left out.

    With ideographs as words of their own, the longest run of words is the longest substring.
    """
    found = _TOKEN.findall(_normal(text[:_LONGEST_TEXT]))
    return tuple(token for token in found if token not in _LABELS)


@dataclass(frozen=True, slots=True)
class _Term:
    """Words that mean something together; one that ends in ``*`` stands for any ending."""

    words: tuple[str, ...]
    shown: str
    meaning: _Meaning
    hides: bool = False  # only keeps shorter terms from being seen
    french: bool = False  # counts beside a French word alone
    region: bool = False  # counts in Body Part Examined and region codes alone


@dataclass(frozen=True, slots=True)
class _Lexicon:
    """All terms and codes of one set of rules, ready for look-up."""

    codes: Mapping[str, _Meaning]
    index: Mapping[str, Sequence[_Term]]  # by the first three characters of the first word
    single: frozenset[str]  # words that are a term of their own, for glued names
    skipped: frozenset[str]
    french: frozenset[str]
    before: tuple[str, ...]
    after: tuple[str, ...]

    def find(self, tokens: Sequence[str], *, region: bool) -> list[_Term]:
        """Return the terms in a text, the longest winning; no word is used twice."""
        pieces = {token: self._pieces(token) for token in set(tokens)}
        words = [piece for token in tokens for piece in pieces[token]]
        found = [
            (-sum(len(words[at]) for at in covered), covered, term)
            for start, word in enumerate(words)
            for term in self.index.get(word[:3], ())
            if (region or not term.region) and (covered := self._covers(words, start, term))
        ]
        found.sort(key=lambda match: (match[0], match[1], match[2].words[0].endswith("*")))
        used: set[int] = set()
        kept = {}
        for _, covered, term in found:
            if used.isdisjoint(covered):
                used.update(covered)
                kept[covered] = term
        return [kept[covered] for covered in sorted(kept)]

    def _covers(self, words: Sequence[str], start: int, term: _Term) -> tuple[int, ...]:
        """Return the positions that ``term`` takes from ``start`` on; empty where it does not."""
        covered: list[int] = []
        at = start
        for wanted in term.words:
            last = at + _LONGEST_GAP if covered else at
            while at < last and at < len(words) and not _same(words[at], wanted):
                if words[at] not in self.skipped and not words[at].isdigit():
                    return ()
                at += 1
            if at >= len(words) or not _same(words[at], wanted):
                return ()
            covered.append(at)
            at += 1
        return tuple(covered)

    def _pieces(self, token: str) -> Sequence[str]:
        """Split RHAND, HANDPA or HANDWRIST where the whole of it can be explained."""
        if token in self.single:
            return (token,)
        befores = [before for before in self.before if token.startswith(before)]
        afters = [after for after in self.after if token.endswith(after)]
        for before, after in itertools.product(befores, afters):
            middle = token[len(before) : len(token) - len(after)]
            if len(before) + len(middle) + len(after) != len(token):
                continue
            if middle in self.single:
                return (middle,)
            for cut in range(_SHORTEST_GLUED, len(middle) - _SHORTEST_GLUED + 1):
                if middle[:cut] in self.single and middle[cut:] in self.single:
                    return middle[:cut], middle[cut:]
        return (token,)


def _same(word: str, wanted: str) -> bool:
    return word.startswith(wanted[:-1]) if wanted.endswith("*") else word == wanted


@lru_cache(maxsize=8)
def _lexicon(own: frozenset[tuple[str, Area]], *, shoulder_girdle: bool) -> _Lexicon:
    girdle = _meaning(Area.XR_SHOULDER if shoulder_girdle else GIRDLE)
    terms: dict[tuple[str, ...], _Term] = {}
    for term in _built_in_terms(girdle):
        terms.setdefault(term.words, term)
    for words, area in sorted(own):
        if tokens := _tokens(words):
            terms[tokens] = _Term(tokens, words, _meaning(area))
    index = defaultdict(list)
    for term in terms.values():
        index[term.words[0][:3]].append(term)
    return _Lexicon(
        codes=dict(_codes(girdle)),
        index=dict(index),
        single=frozenset(
            term.words[0]
            for term in terms.values()
            if len(term.words) == 1
            and len(term.words[0]) >= _SHORTEST_GLUED
            and not term.hides | term.region | term.french
        ),
        skipped=_word_set(area_terms.SKIPPED),
        french=_word_set(area_terms.FRENCH_CONTEXT),
        before=("", *sorted(_word_set(area_terms.GLUED_BEFORE))),
        after=("", *sorted(_word_set(area_terms.GLUED_AFTER))),
    )


def _word_set(listed: str) -> frozenset[str]:
    return frozenset(_normal(word).strip() for word in listed.split(","))


def _codes(girdle: _Meaning) -> Iterator[tuple[str, _Meaning]]:
    groups = [(codes, _meaning(area)) for area, codes in area_terms.AREA_CODES.items()]
    groups += [
        (codes, _meaning(*places, area=places[0]))
        for places, codes in area_terms.YIELDING_CODES.items()
    ]
    groups += [
        (area_terms.GIRDLE_CODES, girdle),
        (area_terms.GENERIC_CODES, _GENERIC),
        (area_terms.OUTSIDE_CODES, _meaning(OUTSIDE)),
    ]
    return ((code, meaning) for codes, meaning in groups for code in codes.split())


def _built_in_terms(girdle: _Meaning) -> Iterator[_Term]:
    for area, listed in area_terms.AREA_WORDS.items():
        yield from _terms(listed, _meaning(area))
    for area, listed in area_terms.FRENCH_WORDS.items():
        yield from _terms(listed, _meaning(area), french=True)
    for places, listed in area_terms.YIELDING_WORDS.items():
        yield from _terms(listed, _meaning(*places, area=places[0]))
    for places, listed in area_terms.EITHER_WORDS.items():
        yield from _terms(listed, _meaning(*places))
    yield from _terms(area_terms.ARM_WORDS, _ARM)
    yield from _terms(area_terms.GIRDLE_WORDS, girdle)
    yield from _terms(area_terms.GENERIC_WORDS, _GENERIC)
    yield from _terms(area_terms.NEUTRAL_WORDS, _GENERIC, hides=True)
    yield from _terms(area_terms.OUTSIDE_WORDS, _meaning(OUTSIDE))
    yield from _terms(area_terms.OUTSIDE_PARTS, _meaning(OUTSIDE), region=True)


def _terms(listed: str, meaning: _Meaning, **kinds: bool) -> Iterator[_Term]:
    for shown in filter(None, map(str.strip, listed.split(","))):
        words = tuple(
            part + "*" * stem.endswith("*") * (part == _tokens(stem)[-1])
            for stem in shown.split()
            for part in _tokens(stem)
        )
        yield _Term(words, shown, meaning, **kinds)
