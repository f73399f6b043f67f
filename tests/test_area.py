"""Each trap of the design page is a test here."""

from __future__ import annotations

import unicodedata

import pytest
from pydicom.sr._cid_dict import cid_concepts
from pydicom.sr._concepts_dict import concepts
from pydicom.sr._snomed_dict import mapping

from mura_batch import area_terms
from mura_batch.area import (
    Area,
    AreaRules,
    Clue,
    Decision,
    Source,
    decide,
    decision_by_person,
)

ELBOW, FINGER, FOREARM, HAND, HUMERUS, SHOULDER, WRIST = Area
PERSON, OUTSIDE = "needs_person", "unsupported"


def code(value: str, meaning: str = "") -> Clue:
    return Clue(Source.CODE, "AnatomicRegionSequence", meaning, value)


def part(text: str) -> Clue:
    return Clue(Source.BODY_PART, "BodyPartExamined", text)


def study(text: str) -> Clue:
    return Clue(Source.DESCRIPTION, "StudyDescription", text)


def series(text: str) -> Clue:
    return Clue(Source.DESCRIPTION, "SeriesDescription", text)


def folder(text: str) -> Clue:
    return Clue(Source.FOLDER, "folder", text)


def name(text: str) -> Clue:
    return Clue(Source.FILE_NAME, "file name", text)


def comment(text: str) -> Clue:
    return Clue(Source.COMMENT, "ImageComments", text)


def found(*clues: Clue, rules: AreaRules | None = None) -> Area | str:
    """Return the decided area, or the outcome where there is none."""
    decision = decide(clues, rules or AreaRules())
    assert (decision.area is not None) == (decision.outcome == "decided")
    return decision.area or decision.outcome


def terms(decision: Decision) -> list[str]:
    return [witness.term for witness in decision.conflicts]


# Codes.

# The design page's table, written out again: a slip in the tables must not pass.
CODES = {
    ELBOW: "16953009 T-15430 76248009 T-D8300",
    FINGER: "7569003 T-D8800 125682004 T-15516 76505004 T-D8810",
    FOREARM: (
        "14975008 T-D8500 55797009 T-12402 62413002 T-12420 23416004 T-12430 110535000 T-12403"
    ),
    HAND: "85562004 T-D8700 24097009 T-12600 36455000 T-12540",
    HUMERUS: "85050009 T-12410 40983000 T-D8200",
    SHOULDER: "16982005 T-D2220",
    WRIST: "74670003 T-15460 8205005 T-D8600 30518006 T-12450 75129005 T-1242B",
}


@pytest.mark.parametrize(
    ("area", "value"), [(area, value) for area, row in CODES.items() for value in row.split()]
)
def test_every_code_of_the_page_decides_its_area(area: Area, value: str) -> None:
    decision = decide([code(value)])
    assert (decision.area, decision.source) == (area, Source.CODE)
    assert value in decision.why
    assert found(code(f" {value.lower()} ")) == area


def test_sct_and_srt_codes_are_pairs_of_pydicom_s_dictionary() -> None:
    older = {"76248009", "55797009"}
    for row in CODES.values():
        values = row.split()
        for sct, srt in zip(values[::2], values[1::2], strict=True):
            assert sct in older or mapping["SCT"][sct] == srt


def test_every_common_anatomic_region_is_known_and_its_meaning_never_contradicts_its_code() -> None:
    for concept in cid_concepts[4031]["SCT"]:
        meanings: dict[str, tuple[str, list[int]]] = concepts["SCT"][concept]  # type: ignore[assignment]  # pydicom's own type is too wide
        for value, (meaning, _) in meanings.items():
            decision = decide([code(value, meaning)])
            assert decision.witnesses, (value, meaning)
            assert not decision.conflicts, (value, meaning, decision.why)
            legacy = mapping["SCT"].get(value)
            if legacy:
                assert found(code(legacy)) == found(code(value))


def test_an_unknown_code_is_read_by_its_meaning() -> None:
    assert found(code("L-WR-2", "Handgelenk links")) == WRIST
    assert found(code("L-WR-2", "")) == PERSON


def test_a_code_that_contradicts_its_meaning_goes_to_a_person() -> None:
    decision = decide([code("85562004", "Wrist joint")])
    assert decision.outcome == PERSON
    assert terms(decision) == ["85562004", "wrist"]


def test_a_region_code_counts_in_the_region_sequence_alone() -> None:
    procedure = Clue(Source.DESCRIPTION, "ProcedureCodeSequence", "", "85562004")
    assert found(procedure) == PERSON


@pytest.mark.parametrize("value", ["24028007", "G-A100", "7771000", "G-A101", "51440002"])
def test_a_laterality_code_is_no_area(value: str) -> None:
    assert not decide([code(value, "Right")]).witnesses


# Body Part Examined.


@pytest.mark.parametrize(
    ("text", "area"),
    [
        ("ELBOW", ELBOW),
        ("FINGER", FINGER),
        ("THUMB", FINGER),
        ("FOREARM", FOREARM),
        ("RADIUS", FOREARM),
        ("ULNA", FOREARM),
        ("RADIUSULNA", FOREARM),
        ("HAND", HAND),
        ("HUMERUS", HUMERUS),
        ("UPPERARM", HUMERUS),
        ("SHOULDER", SHOULDER),
        ("WRIST", WRIST),
        ("CARPUS", WRIST),
        ("RHAND", HAND),
        ("HANDPA", HAND),
        ("LT_WRIST", WRIST),
        ("UP_EXM ELBOW", ELBOW),
        ("MAIN", HAND),
    ],
)
def test_body_part_examined_exact_and_contained(text: str, area: Area) -> None:
    assert found(part(text)) == area


@pytest.mark.parametrize("text", ["CHARM", "CODOMAIN", "HANDLED", "HANDSOME", "SHIP", "LIMBO"])
def test_a_part_inside_another_word_is_no_witness(text: str) -> None:
    assert not decide([part(text), study(text)]).witnesses


def test_body_part_examined_does_not_win_over_a_description() -> None:
    decision = decide([part("HAND"), series("Handgelenk seitlich")])
    assert decision.outcome == PERSON
    assert terms(decision) == ["hand", "Handgelenk"]
    assert "BodyPartExamined" in decision.why
    assert "SeriesDescription" in decision.why


def test_agreeing_witnesses_decide_and_the_strongest_is_the_source() -> None:
    decision = decide([series("hand pa"), part("HAND")])
    assert (decision.area, decision.source, decision.conflicts) == (HAND, Source.BODY_PART, ())


# Ambiguous terms.


def test_arm_as_a_word_needs_a_second_witness_for_the_humerus() -> None:
    assert found(part("ARM")) == PERSON
    assert found(part("ARM"), study("left arm ap")) == PERSON
    assert found(part("ARM"), folder("arm"), name("arm")) == PERSON
    assert found(part("ARM"), comment("humerus ap")) == HUMERUS
    assert found(part("ARM"), series("humerus ap")) == HUMERUS
    assert decide([part("ARM"), series("humerus ap")]).source == Source.DESCRIPTION
    assert found(code("40983000", "Arm")) == HUMERUS


def test_arm_may_mean_any_part_of_the_arm_but_not_a_knee() -> None:
    assert found(part("ARM"), series("elbow lat")) == ELBOW
    assert found(part("ARM"), series("knee lat")) == PERSON
    assert found(series("arm, knee")) == PERSON
    assert found(part("ARM"), comment("humerus"), comment("wrist")) == PERSON
    assert found(part("ARM"), comment("humerus"), series("dedo")) == PERSON


@pytest.mark.parametrize(
    "text", ["UPPERLIMB", "UPPER EXTREMITY", "EXTREMITY", "EXTREMETY", "UP_EXM", "上肢"]
)
def test_generic_words_decide_nothing_and_contradict_nothing(text: str) -> None:
    assert found(part(text)) == PERSON
    assert found(part(text), study("Wrist 2 views")) == WRIST
    assert found(part(text), study("Non-ossifying fibroma of distal tibia")) == OUTSIDE
    assert found(part(text), study("knee")) == OUTSIDE
    assert found(part(text), comment("knee")) == PERSON


@pytest.mark.parametrize("value", ["53120007", "T-D8000", "66019005", "T-D0300"])
def test_generic_codes_decide_nothing(value: str) -> None:
    assert found(code(value)) == PERSON
    assert found(code(value), study("elbow")) == ELBOW


@pytest.mark.parametrize(
    "clue",
    [part("CLAVICLE"), part("SCAPULA"), part("ACJOINT"), code("85856004"), study("Schulterblatt")],
)
def test_the_shoulder_girdle_is_a_person_s_unless_the_site_opts_in(clue: Clue) -> None:
    assert found(clue) == PERSON
    assert found(clue, part("SHOULDER")) == PERSON
    assert found(clue, rules=AreaRules(shoulder_girdle=True)) == SHOULDER


@pytest.mark.parametrize(
    "clue",
    [
        part("SCJOINT"),
        part("HIP"),
        part("LOW_EXM"),
        part("HEAD"),
        code("7844006"),
        code("T-D9200"),
        code("816094009"),
        study("distal tibia"),
        study("chest pa"),
        study("Knie rechts"),
        study("Fuß d.p."),
        study("LWS"),
        study("genou gauche"),
        study("cheville"),
        study("rodilla"),
        study("dedo del pie"),
        study("Рентгенография коленного сустава"),
        study("палец левой стопы"),
        study("左膝关节"),
        study("足趾"),
        study("胸锁关节"),
        folder("ankle"),
        name("toe_1"),
    ],
)
def test_parts_outside_the_upper_limb_are_unsupported_and_never_a_guess(clue: Clue) -> None:
    decision = decide([clue])
    assert (decision.outcome, decision.area, decision.source) == (OUTSIDE, None, clue.source)
    assert found(clue, part("HAND") if clue.source != Source.BODY_PART else study("hand")) == PERSON


def test_a_head_or_neck_counts_only_where_a_region_is_named() -> None:
    assert found(study("fracture of the radial head")) == ELBOW
    assert found(study("metacarpal head")) == HAND
    assert found(study("surgical neck of humerus")) == HUMERUS


@pytest.mark.parametrize(
    ("text", "neighbour", "word"),
    [
        ("proximal humerus", SHOULDER, "shoulder"),
        ("Humerus proximal rechts", SHOULDER, "Schulter"),
        ("distal left humerus", ELBOW, "elbow"),
        ("肱骨远端", ELBOW, "肘关节"),
    ],
)
def test_an_end_of_the_humerus_gives_way_to_its_neighbour(
    text: str, neighbour: Area, word: str
) -> None:
    assert found(study(text)) == HUMERUS
    assert found(study(text), series("humerus")) == HUMERUS
    assert found(study(text), series(word)) == neighbour
    assert found(study(f"{text}, {word}")) == neighbour
    other = "shoulder" if neighbour == ELBOW else "elbow"
    assert found(study(text), series(other)) == PERSON


def test_two_areas_in_one_text_are_decided_by_the_series_or_a_person() -> None:
    both = study("XR hand + wrist")
    decision = decide([both])
    assert decision.outcome == PERSON
    assert terms(decision) == ["hand + wrist"]
    assert found(both, series("hand pa")) == HAND
    assert found(both, series("wrist lat")) == WRIST
    assert found(both, series("elbow")) == PERSON
    assert found(both, study("wrist, forearm")) == PERSON
    assert found(part("HAND WRIST")) == PERSON
    assert found(part("HANDWRIST")) == PERSON


# Words.


@pytest.mark.parametrize(
    ("area", "texts"),
    [
        (ELBOW, "elbow|Ellenbogen|Ellbogen|coude|codo|локоть|локтевой сустав|肘|肘关节"),
        (FINGER, "finger|digit|phalanx|thumb|Daumen|doigt|pouce|dedo de la mano|pulgar"),
        (FINGER, "палец кисти|手指|指骨|拇指|пальцы правой кисти|dedo 2 de la mano"),
        (FOREARM, "forearm|radius/ulna|Unterarm|U ARM|avant-bras|antebrazo|предплечье|前臂|尺桡骨"),
        (HAND, "hand|metacarpal|Mittelhand|Hände|main droite|métacarpe|mano|кисть|手|手部|掌骨"),
        (HUMERUS, "humerus|upper arm|Oberarm|O ARM|humérus|bras|húmero|brazo|плечевая кость"),
        (HUMERUS, "上臂|肱骨|upper left arm"),
        (SHOULDER, "shoulder|glenohumeral|Schulter|épaule|l'épaule|hombro|плечевой сустав"),
        (SHOULDER, "肩|肩关节|right_shoulder_2"),
        (WRIST, "wrist|carpal|scaphoid|Handgelenk|poignet|muñeca|запястье|腕|腕关节"),
        (WRIST, "лучезапястный сустав|distal radius|distaler Radius"),
    ],
)
def test_the_words_of_six_languages(area: Area, texts: str) -> None:
    for text in texts.split("|"):
        apart = unicodedata.normalize("NFD", text)
        bare = "".join(char for char in apart if not unicodedata.combining(char))
        for written in (text, text.upper(), text.title(), apart, bare, f"Rx {text}, 2 x"):
            assert found(study(written)) == area, written


@pytest.mark.parametrize(
    ("text", "area"),
    [
        ("Рентгенография левого локтевого сустава", ELBOW),
        ("кости предплечья", FOREARM),
        ("Рентгенография кисти в 2 проекциях", HAND),
        ("правой плечевой кости", HUMERUS),
        ("обоих плечевых суставов", SHOULDER),
        ("левого лучезапястного сустава", WRIST),
    ],
)
def test_russian_words_are_found_in_their_cases(text: str, area: Area) -> None:
    assert found(study(text)) == area


def test_a_cyst_is_no_hand_in_russian() -> None:
    for text in ("киста", "кисты", "кистозная перестройка"):
        assert not decide([study(text)]).witnesses


def test_the_longest_word_wins_on_word_boundaries() -> None:
    assert found(study("Handgelenk")) == WRIST
    assert found(study("Unterarm")) == FOREARM
    assert found(study("Oberarm")) == HUMERUS
    assert found(study("forearm")) == FOREARM
    assert found(study("Hand\N{SOFT HYPHEN}gelenk")) == WRIST
    assert found(study("ＷＲＩＳＴ")) == WRIST
    assert found(study("ℍ𝔸ℕ𝔻")) == HAND


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("左手正位", HAND),
        ("右手指", FINGER),
        ("手腕", WRIST),
        ("左手腕關節正侧位", WRIST),
        ("手肘", ELBOW),
        ("手臂", PERSON),
        ("左手术后", PERSON),
        ("曝光不足", PERSON),
        ("手和腕", PERSON),
        ("前腕", FOREARM),
        ("上腕骨", HUMERUS),
        ("手関節", WRIST),
    ],
)
def test_chinese_and_japanese_take_the_longest_substring(text: str, expected: Area | str) -> None:
    assert found(study(text)) == expected


@pytest.mark.parametrize("text", ["плечо", "Рентген левого плеча"])
def test_plecho_is_a_conflict_and_not_an_answer(text: str) -> None:
    decision = decide([study(text)])
    assert decision.outcome == PERSON
    assert len(decision.conflicts) == 1
    assert found(study(text), part("SHOULDER")) == SHOULDER
    assert found(study(text), part("HUMERUS")) == HUMERUS
    assert found(study(text), part("HAND")) == PERSON


@pytest.mark.parametrize("text", ["палец", "dedo", "dedos", "пальцев"])
def test_a_finger_that_may_be_a_toe_needs_another_witness(text: str) -> None:
    assert found(study(text)) == PERSON
    assert found(study(text), part("FINGER")) == FINGER
    assert found(study(text), part("TOE")) == OUTSIDE
    assert found(study(text), part("WRIST")) == PERSON


def test_main_is_a_hand_beside_french_words_only() -> None:
    assert found(study("main")) == PERSON
    assert found(folder("main")) == PERSON
    assert found(folder("main"), folder("XR_WRIST")) == WRIST
    assert found(study("Main hospital, wrist")) == WRIST
    assert found(study("Main droite")) == HAND
    assert found(study("radiographie des deux mains")) == HAND
    assert found(folder("main_gauche")) == HAND
    assert found(study("main face"), part("HAND")) == HAND


@pytest.mark.parametrize("text", ["face", "profil", "C-arm", "left hand side", "MURA-v1.1"])
def test_views_and_figures_of_speech_are_no_evidence(text: str) -> None:
    assert not decide([study(text), folder(text), name(text)]).witnesses


def test_swedish_underarm_is_the_forearm() -> None:
    assert found(study("underarm hö")) == FOREARM


# Folders, file names, comments, the site's own words.


@pytest.mark.parametrize("area", Area)
def test_mura_folders(area: Area) -> None:
    way = ("MURA-v1.1", "valid", area, "patient00011", "study1_positive")
    decision = decide([*map(folder, way), name("image1")])
    assert (decision.area, decision.source) == (area, Source.FOLDER)


def test_a_file_name_decides_alone_and_against_its_folder_it_is_a_conflict() -> None:
    assert decide([name("left-hand_2")]).source == Source.FILE_NAME
    decision = decide([folder("XR_WRIST"), name("hand")])
    assert decision.outcome == PERSON
    assert terms(decision) == ["wrist", "hand"]


def test_a_comment_is_weak() -> None:
    assert found(comment("left hand")) == PERSON
    assert found(comment("knee")) == PERSON
    decision = decide([part("HAND"), comment("pain from the shoulder down")])
    assert decision.area == HAND
    assert terms(decision) == ["shoulder"]
    assert "shoulder" in decision.why


@pytest.mark.parametrize(
    "text", ["History: wrist fracture", "HX OF wrist fracture", "hx  of wrist"]
)
def test_a_comment_about_the_past_is_skipped(text: str) -> None:
    assert not decide([comment(text)]).witnesses
    assert decide([part("HAND"), comment(text)]).conflicts == ()


def test_a_site_s_own_words_match_like_the_built_in_ones() -> None:
    rules = AreaRules(words={"Hd li": HAND, "Raum 3": ELBOW, "ARM": FOREARM, "wrist guard": FINGER})
    assert found(folder("hd_LI"), rules=rules) == HAND
    assert found(folder("Hd re"), rules=rules) == PERSON
    assert found(folder("raum-3"), rules=rules) == ELBOW
    assert found(folder("raum-4"), rules=rules) == PERSON
    assert found(part("ARM"), rules=rules) == FOREARM
    assert found(study("wrist guard"), rules=rules) == FINGER
    assert found(study("wrist"), rules=rules) == WRIST


def test_a_label_is_no_evidence_even_as_a_site_s_own_word() -> None:
    rules = AreaRules(words={"positive": HAND})
    assert not decide([folder("study1_positive"), name("positive")], rules).witnesses


# Decisions and what they keep.


def test_a_person_decides_and_what_was_said_before_stays() -> None:
    decision = decision_by_person(HAND, [part("HAND"), series("Handgelenk"), comment("knee")])
    assert (decision.area, decision.source, decision.outcome) == (HAND, Source.PERSON, "decided")
    assert terms(decision) == ["Handgelenk", "knee"]
    assert decision.evidence()[0] == {
        "term": "XR_HAND",
        "source": "person",
        "origin": "person",
        "verdict": "XR_HAND",
        "weight": "full",
        "conflict": "no",
    }


def test_the_evidence_holds_terms_and_never_the_text_around_them() -> None:
    patient = "Meier, Anna 1961"
    clues = [part("HAND"), study(f"{patient} Handgelenk"), comment(f"{patient} knee, up exm")]
    decision = decide(clues)
    shown = f"{decision.why} {decision.evidence()}"
    assert "Meier" not in shown
    assert "1961" not in shown
    assert [row["term"] for row in decision.evidence()] == ["hand", "Handgelenk", "knee"]
    assert [row["conflict"] for row in decision.evidence()] == ["yes", "yes", "yes"]


def test_nothing_known_needs_a_person() -> None:
    decision = decide([folder("patient00011"), name("image1")])
    assert (decision.outcome, decision.witnesses, decision.source) == (PERSON, (), None)
    assert decide([]).outcome == PERSON


def test_no_word_of_the_tables_has_two_meanings() -> None:
    groups = [
        *area_terms.AREA_WORDS.values(),
        *area_terms.FRENCH_WORDS.values(),
        *area_terms.YIELDING_WORDS.values(),
        *area_terms.EITHER_WORDS.values(),
        area_terms.ARM_WORDS,
        area_terms.GIRDLE_WORDS,
        area_terms.GENERIC_WORDS,
        area_terms.NEUTRAL_WORDS,
        area_terms.OUTSIDE_WORDS,
        area_terms.OUTSIDE_PARTS,
    ]
    seen: dict[str, int] = {}
    for number, listed in enumerate(groups):
        for word in filter(None, map(str.strip, listed.casefold().split(","))):
            assert seen.setdefault(word, number) == number, word


def test_hostile_texts_are_read_in_bounded_time() -> None:
    for text in ("dedo 1 " * 200_000, "\ud800\udcff hand \0", "手" * 100_000, "e\u0301" * 50_000):
        decide([study(text), comment(text), code(text, text)])


def test_real_headers_of_other_parts_are_unsupported() -> None:
    assert found(part("HIP"), study("HIP JOINT"), comment("JPEG lossless SV1")) == OUTSIDE
    fibroma = study("Non-ossifying fibroma of distal tibia")
    assert found(part("EXTREMITY"), fibroma, comment("JPEG lossless SV1")) == OUTSIDE
    assert found(part("HAND"), study("XRAY RIGHT HAND"), series("PA")) == HAND
