"""What holds for an area decision whatever the texts say."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from random import Random
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from mura_batch import area_terms
from mura_batch.area import Area, AreaRules, Clue, Source, decide, decision_by_person

WORDS = [
    word.strip().replace("*", "")
    for listed in (
        *area_terms.AREA_WORDS.values(),
        *area_terms.EITHER_WORDS.values(),
        area_terms.ARM_WORDS,
        area_terms.OUTSIDE_WORDS,
        area_terms.GENERIC_WORDS,
    )
    for word in listed.split(",")
    if word.strip()
]
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from([*WORDS, "links", "2", "ap", "main", "face"]), max_size=3).map(
        " ".join
    ),
)
CLUES = st.builds(
    Clue,
    st.sampled_from([source for source in Source if source != Source.PERSON]),
    st.sampled_from(["folder", "BodyPartExamined", "StudyDescription"]),
    TEXTS,
    st.sampled_from(["", "85562004", "T-D9200", "40983000", "nonsense"]),
)


def told(text: str) -> Clue:
    return Clue(Source.DESCRIPTION, "StudyDescription", text)


@given(st.lists(CLUES, max_size=6), st.builds(AreaRules, shoulder_girdle=st.booleans()))
def test_any_text_gives_a_consistent_decision(clues: list[Clue], rules: AreaRules) -> None:
    decision = decide(clues, rules)
    assert (decision.area is None) == (decision.outcome != "decided")
    assert (decision.source is None) == (decision.outcome == "needs_person")
    assert set(decision.conflicts) <= set(decision.witnesses)
    assert len(decision.evidence()) == len(decision.witnesses)
    if decision.outcome != "needs_person":
        assert all(w.clue.source == Source.COMMENT for w in decision.conflicts)
        assert any(w.clue.source != Source.COMMENT for w in decision.witnesses)


@given(st.lists(CLUES, max_size=6), st.randoms(use_true_random=False))
def test_order_and_repetition_of_clues_change_nothing(clues: list[Clue], random: Random) -> None:
    shuffled = clues + clues[:2]
    random.shuffle(shuffled)
    assert decide(shuffled) == decide(clues)


@given(st.lists(CLUES, max_size=5), st.sampled_from(["_positive", "_negative", " POSITIVE"]))
def test_a_label_behind_any_text_changes_nothing(clues: list[Clue], label: str) -> None:
    labelled = [Clue(c.source, c.origin, c.text + label, c.code) for c in clues]
    plain, other = decide(clues), decide(labelled)
    assert (plain.area, plain.outcome, plain.why) == (other.area, other.outcome, other.why)


@given(
    st.sampled_from(WORDS),
    st.sampled_from(["_", "-", ".", " ", "  ", "\t", "\n", " 3 ", "^"]),
    st.sampled_from([str.upper, str.lower, str.title]),
    st.sampled_from(["NFC", "NFD", "NFKD"]),
)
def test_case_accents_spaces_and_form_change_nothing(
    word: str, space: str, case: Callable[[str], str], form: Literal["NFC", "NFD", "NFKD"]
) -> None:
    written = unicodedata.normalize(form, space + case(word).replace(" ", space) + space)
    plain, other = decide([told(word)]), decide([told(written)])
    assert (plain.area, plain.outcome, plain.why) == (other.area, other.outcome, other.why)


@settings(max_examples=30)
@given(st.lists(CLUES, max_size=5), st.sampled_from(Area))
def test_a_person_s_word_always_stands(clues: list[Clue], area: Area) -> None:
    decision = decision_by_person(area, clues)
    assert (decision.area, decision.outcome) == (area, "decided")
    assert decision.witnesses[1:] == decide(clues).witnesses
