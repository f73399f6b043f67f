from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import made_dicom
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from mura_batch.area import AreaRules, Clue, Source
from mura_batch.assessment import divide
from mura_batch.study import Peek, SourceFile, content_digest, masked, peek, read_study

PIXELS = np.zeros((4, 4), np.uint16)
DATA = Path(__file__).parent / "data"
NAMES = st.text(st.characters() | st.sampled_from("\udc80\udcff\n\"'"))


def source(path: Path, name: str | None = None) -> SourceFile:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return SourceFile(path, name or path.name, digest, len(content))


def clues(path: Path, name: str = "x") -> list[Clue]:
    return list(read_study([source(path, name)]).views[0].clues)


def coded(value: str, meaning: str, scheme: str | None) -> Sequence:
    item = Dataset()
    item.CodeValue = value
    item.CodeMeaning = meaning
    if scheme:
        item.CodingSchemeDesignator = scheme
    return Sequence([item])


def test_every_hint_of_a_header_is_a_clue_in_order_of_strength(tmp_path):
    request = Dataset()
    request.RequestedProcedureDescription = "wrist two views"
    path = made_dicom.write(
        tmp_path / "film",
        PIXELS,
        AnatomicRegionSequence=coded("T-15460", "Wrist joint", "SRT"),
        BodyPartExamined="WRIST",
        ProtocolName="Handgelenk ap",
        SeriesDescription="PA",
        PerformedProtocolCodeSequence=coded("X1", "Wrist protocol", "99LOCAL"),
        PerformedProcedureStepDescription="XR wrist",
        ProcedureCodeSequence=coded("73100", "X-ray of wrist", "C4"),
        RequestAttributesSequence=Sequence([request]),
        StudyDescription="XRAY WRIST",
        ImageComments="no fracture",
        PatientName="SECRET^NAME",
    )
    found = clues(path, "XR_HAND/patient1/study1_positive/wrist_negative.dcm")
    assert found[0] == Clue(Source.CODE, "AnatomicRegionSequence", "Wrist joint", "T-15460")
    assert found[1] == Clue(Source.BODY_PART, "BodyPartExamined", "WRIST")
    described = {clue.origin: clue.text for clue in found if clue.source is Source.DESCRIPTION}
    assert described == {
        "ProtocolName": "Handgelenk ap",
        "SeriesDescription": "PA",
        "PerformedProtocolCodeSequence": "Wrist protocol",
        "PerformedProcedureStepDescription": "XR wrist",
        "ProcedureCodeSequence": "X-ray of wrist",
        "RequestedProcedureDescription": "wrist two views",
        "StudyDescription": "XRAY WRIST",
    }
    assert Clue(Source.COMMENT, "ImageComments", "no fracture") in found
    assert [c.text for c in found if c.source is Source.FOLDER] == ["XR_HAND", "patient1", "study1"]
    assert found[-1] == Clue(Source.FILE_NAME, "file name", "wrist")
    assert not any("SECRET" in clue.text for clue in found)


@pytest.mark.parametrize(
    ("value", "scheme", "code"),
    [
        ("85562004", "SCT", "85562004"),
        ("T-D8700", "SNM3", "T-D8700"),
        ("T-D8700", None, "T-D8700"),
        ("85562004", "99LOCAL", ""),
        ("HAND", None, ""),
    ],
)
def test_a_code_counts_in_its_own_scheme_only(tmp_path, value, scheme, code):
    sequence = coded(value, "Hand", scheme)
    path = made_dicom.write(tmp_path / "film", PIXELS, AnatomicRegionSequence=sequence)
    assert clues(path)[0] == Clue(Source.CODE, "AnatomicRegionSequence", "Hand", code)


@pytest.mark.parametrize(
    ("charset", "raw", "text"),
    [
        ("ISO_IR 100", "Ellenbogen später".encode("latin-1"), "Ellenbogen später"),
        ("ISO_IR 144", "локоть".encode("iso8859-5"), "локоть"),
        ("ISO_IR 192", "кисть".encode(), "кисть"),
        ("GB18030", "手腕".encode("gb18030"), "手腕"),
        ("\\ISO 2022 IR 87", b"\x1b$B\x3c\x6a\x1b(B", "手"),
        ("NO_SUCH_SET", "запястье".encode(), "запястье"),
        (None, "кисть".encode(), "кисть"),
        ("ISO_IR 192", b"hand \xff\xfe", "hand ÿþ"),
    ],
)
def test_text_is_read_in_its_charset_and_a_bad_one_never_stops_a_study(
    tmp_path, charset, raw, text
):
    length = len(raw) + len(raw) % 2
    path = made_dicom.write(tmp_path / "film", PIXELS, StudyDescription="#" * length)
    content = path.read_bytes().replace(b"#" * length, raw.ljust(length))
    if charset:
        value = charset.encode().ljust(len(charset) + len(charset) % 2)
        element = b"\x08\x00\x05\x00CS" + len(value).to_bytes(2, "little") + value
        start = content.index(b"\x08\x00\x16\x00UI")
        content = content[:start] + element + content[start:]
    path.write_bytes(content)
    assert Clue(Source.DESCRIPTION, "StudyDescription", text) in clues(path)


def test_each_frame_is_a_view_and_may_have_its_own_region(tmp_path):
    groups = []
    for meaning in ("Hand", "Elbow joint"):
        anatomy, group = Dataset(), Dataset()
        anatomy.AnatomicRegionSequence = coded("1", meaning, "99X")
        group.FrameAnatomySequence = Sequence([anatomy])
        groups.append(group)
    frames = np.zeros((2, 4, 4), np.uint16)
    path = made_dicom.write(
        tmp_path / "film", frames, PerFrameFunctionalGroupsSequence=Sequence(groups)
    )
    study = read_study([source(path)])
    assert [view.frame for view in study.views] == [0, 1]
    assert [view.clues[0].text for view in study.views] == ["Hand", "Elbow joint"]


def test_identical_files_count_once_and_order_does_not_count(tmp_path):
    film = tmp_path / "b.jpg"
    film.write_bytes((DATA / "hand_grey.jpg").read_bytes())
    other = tmp_path / "a.jpg"
    other.write_bytes((DATA / "forearm_rgb.jpg").read_bytes())
    files = [source(film), source(film, "copy/b.jpg"), source(other)]
    study = read_study(files)
    assert [view.file.name for view in study.views] == ["a.jpg", "b.jpg"]
    assert read_study(files[::-1]) == study
    assert study.digest == content_digest({file.sha256 for file in files})
    assert read_study(files[:2]).digest != study.digest


def test_one_sop_uid_with_two_contents_is_a_conflict_and_both_are_views(tmp_path):
    one = made_dicom.write(tmp_path / "one", PIXELS, AccessionNumber="A1")
    two = made_dicom.write(tmp_path / "two", PIXELS + 1)
    same = made_dicom.write(tmp_path / "same", PIXELS, AccessionNumber="A1")
    study = read_study([source(one), source(two), source(same)])
    assert study.conflicts == (made_dicom.SOP_UID,)
    assert len(study.views) == 2
    assert (study.study_uid, study.accession) == (made_dicom.STUDY_UID, "A1")
    assert read_study([source(one), source(same)]).conflicts == ()


@pytest.mark.parametrize("problem", ["symbolic_link", "unreadable", "not_a_file"])
def test_a_file_that_could_not_be_opened_is_a_view_with_its_problem(tmp_path, problem):
    study = read_study([SourceFile(tmp_path / "gone", "gone", "", 0, problem)])
    assert study.views[0].problem is not None
    assert study.views[0].problem.code == problem


def test_objects_without_pixels_do_not_stop_the_others(tmp_path):
    report = made_dicom.write(tmp_path / "report", None)
    film = made_dicom.write(tmp_path / "film", PIXELS)
    problems = [view.problem for view in read_study([source(film), source(report)]).views]
    assert problems[0] is None
    assert problems[1] is not None
    assert problems[1].code == "no_pixels"


def test_peek_goes_by_content(tmp_path):
    dicom = made_dicom.write(tmp_path / "film.png", PIXELS)
    assert peek(dicom) == Peek("dicom", made_dicom.STUDY_UID)
    assert peek(DATA / "hand_grey.jpg") == Peek("raster", None)
    (tmp_path / "note.dcm").write_text("a note")
    assert peek(tmp_path / "note.dcm") == Peek("other", None)
    assert peek(tmp_path / "gone") == Peek("other", None)
    assert peek(tmp_path) == Peek("other", None)
    os.mkfifo(tmp_path / "pipe.png")
    assert peek(tmp_path / "pipe.png") == Peek("other", None)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"])
def test_peek_reads_other_encodings_and_files_without_preamble(tmp_path, syntax):
    path = made_dicom.write(tmp_path / "film", PIXELS, syntax)
    assert peek(path).study_uid == made_dicom.STUDY_UID
    path.write_bytes(path.read_bytes()[132:])
    assert peek(path).study_uid == made_dicom.STUDY_UID


def test_peek_finds_the_uid_behind_a_large_private_element(tmp_path):
    path = made_dicom.write(tmp_path / "film", PIXELS)
    content = path.read_bytes()
    start = content.index(b"\x20\x00\x0d\x00UI")
    private = b"\x19\x00\x01\x10OB\0\0" + (300_000).to_bytes(4, "little") + b"\1" * 300_000
    path.write_bytes(content[:start] + private + content[start:])
    assert peek(path).study_uid == made_dicom.STUDY_UID


def test_labels_never_show(tmp_path):
    assert masked("XR_HAND/patient1/study1_positive/i.png") == "XR_HAND/patient1/study1_*/i.png"
    assert masked('a\n"b"\x1b[31m\udcff\u202e') == 'a\\x0a"b"\\x1b[31m\\xff\\u202e'
    path = tmp_path / "image1.jpg"
    path.write_bytes((DATA / "hand_grey.jpg").read_bytes())
    names = ("XR_HAND/p/study1_positive/a_POSITIVE.jpg", "XR_HAND/p/study1_negative/a_negative.jpg")
    assert clues(path, names[0]) == clues(path, names[1])


@given(NAMES)
def test_a_masked_name_is_one_printable_line_without_a_label(name):
    shown = masked(name)
    assert shown.isprintable()
    assert "positive" not in shown.lower()
    shown.encode("utf-8")


@given(NAMES)
def test_any_name_gives_clues(name):
    study = read_study([SourceFile(Path("/nowhere/at/all"), name, "", 0)])
    assert study.views[0].problem is not None


@given(st.lists(st.text("0123456789abcdef", min_size=64, max_size=64), min_size=1))
def test_the_digest_is_of_the_set_of_contents(hashes):
    assert content_digest(hashes) == content_digest(sorted(hashes * 2, reverse=True))
    assert content_digest(hashes) != content_digest([*hashes, "0" * 63 + "x"])


def test_records_without_dicom_do_not_import_pydicom():
    script = "import sys, mura_batch.study; assert 'pydicom' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_header_of_thousands_of_codes_is_no_burden(tmp_path):
    parts = [f"{part} {number}" for number in range(2000) for part in ("hand", "knee")]
    codes = Sequence([coded("1", part, "99X")[0] for part in parts])
    film = made_dicom.write(
        tmp_path / "x", PIXELS, ProcedureCodeSequence=codes, AnatomicRegionSequence=codes
    )
    read = read_study([source(film)])
    assert len(read.views[0].clues) < 50
    (part,) = divide(read, AreaRules(), None)
    assert part.decision.outcome == "needs_person"
    assert len(part.decision.why) < 1000
