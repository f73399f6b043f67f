"""Claimed files to a frozen study: its views, what hints at their areas, and its digest.

Only headers are read here; pixels are :mod:`mura_batch.radiograph`'s.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO, Literal

from mura_batch.area import Clue, Source
from mura_batch.errors import Rejected, Transient, UnreadableImage
from mura_batch.untrusted import Format, opened, sniff


class Kind(StrEnum):
    """What makes files one study: a DICOM UID, a leaf folder, or being a loose image."""

    DICOM = "dicom"
    FOLDER = "folder"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A claimed file.

    Attributes:
        path: where it lies now.
        name: its path relative to the inbox, ``/`` between the parts; bytes that are no UTF-8
            stand in it as Python's surrogate escapes.
        sha256: hexadecimal digest of the content, or of what is known of the file where its
            content could not be read.
        size: bytes.
        problem: ``symbolic_link``, ``unreadable`` or ``not_a_file`` where the file could not
            even be opened, else empty.
    """

    path: Path
    name: str
    sha256: str
    size: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """One image of a study: a file, or one frame of a multi-frame DICOM file.

    Attributes:
        file: where its pixels are.
        frame: index from 0 inside the file.
        clues: everything that hints at the area, for :func:`mura_batch.area.decide`.
        sop_instance_uid: of a DICOM file that states a usable one.
        problem: why this view can never be scored, known from the header alone.
    """

    file: SourceFile
    frame: int
    clues: tuple[Clue, ...]
    sop_instance_uid: str | None
    problem: Rejected | None


@dataclass(frozen=True, slots=True)
class Study:
    """What is scored together.

    Attributes:
        views: by file name and frame; files of one content count once.
        study_uid, accession: from the first DICOM file that states them.
        digest: :func:`content_digest` of all files.
        conflicts: SOP Instance UIDs that came with more than one content.
    """

    views: tuple[View, ...]
    study_uid: str | None
    accession: str | None
    digest: str
    conflicts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Peek:
    """What the first bytes of a file say; ``study_uid`` groups DICOM files."""

    kind: Literal["dicom", "raster", "other"]
    study_uid: str | None
    accession: str | None = None


def peek(path: Path) -> Peek:
    """Say what a file is like :func:`identify`, or ``other``; nothing is raised."""
    try:
        return identify(path)
    except Transient:
        return Peek("other", None)


def identify(path: Path) -> Peek:
    """Say what a file is from its first bytes, by content and never by its name.

    Of DICOM no more is read than the header up to the Study Instance UID. Hostile or vanished
    files give no UID, or ``other``.

    Raises:
        Transient: the file system failed, not the file.
    """
    kind: Literal["dicom", "raster", "other"] = "other"
    try:
        with opened(path) as stream:
            kind = _KINDS[sniff(stream.read(132))]
            if kind != "dicom":
                return Peek(kind, None)
            dicom_file = _dicom_file()
            dataset = dicom_file.read_header(stream, _IDENTIFIERS, last="StudyInstanceUID").dataset
            return Peek(kind, *_identifiers(dicom_file, dataset))
    except Rejected:
        return Peek(kind, None)


_IDENTIFIERS = ("SpecificCharacterSet", "AccessionNumber", "StudyInstanceUID")
_KINDS: dict[Format, Literal["dicom", "raster", "other"]] = {
    "png": "raster",
    "jpeg": "raster",
    "dicom": "dicom",
    "other": "other",
}


def _dicom_file() -> ModuleType:
    """Import the DICOM reader when the first DICOM file comes.

    pydicom takes a third of a second to import, and commands that only show results import this
    module too.
    """
    return importlib.import_module("mura_batch.dicom_file")


def read_study(files: Sequence[SourceFile]) -> Study:
    """Read the headers of ``files`` into a study; nothing about a file's content raises.

    A file that is no image, or whose header cannot be read, is a view with its ``problem``.

    Raises:
        Transient: the file system failed, not a file.
    """
    contents: dict[str, SourceFile] = {}
    for file in sorted(files, key=lambda file: file.name):
        contents.setdefault(file.sha256, file)
    found = [_read(file) for file in contents.values()]
    views = tuple(view for one in found for view in one.views)
    by_uid: dict[str, set[str]] = {}
    for view in views:
        if view.sop_instance_uid:
            by_uid.setdefault(view.sop_instance_uid, set()).add(view.file.sha256)
    return Study(
        views=views,
        study_uid=next((one.study_uid for one in found if one.study_uid), None),
        accession=next((one.accession for one in found if one.accession), None),
        digest=content_digest(file.sha256 for file in files),
        conflicts=tuple(sorted(uid for uid, hashes in by_uid.items() if len(hashes) > 1)),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What one file adds to a study."""

    views: tuple[View, ...]
    study_uid: str | None = None
    accession: str | None = None


_MOST_FRAMES = 1000  # of one file; a radiograph has one, a tomosynthesis or cine run some hundred


def _read(file: SourceFile) -> _Found:
    path_clues = tuple(_path_clues(file.name))
    try:
        if file.problem:
            raise UnreadableImage(file.problem, _PROBLEMS.get(file.problem, "see its code"))
        with opened(file.path) as stream:
            head = stream.read(132)
            if not head:
                raise UnreadableImage("empty", "the file has no content: copy it again")
            kind = sniff(head)
            if kind == "other":
                raise UnreadableImage(
                    "not_an_image", "this is no PNG, JPEG or DICOM image: remove or convert it"
                )
            if kind == "dicom":
                return _read_dicom(file, stream, path_clues)
    except Rejected as problem:
        return _Found((View(file, 0, path_clues, None, problem),))
    return _Found((View(file, 0, path_clues, None, None),))


_PROBLEMS = {
    "symbolic_link": "links are not followed: drop the file itself",
    "unreadable": "the file may not be read: check its permissions",
    "too_large": "the file is larger than any film: export it again",
    "not_a_file": "this is no regular file: drop the image itself",
}


def _read_dicom(file: SourceFile, stream: BinaryIO, path_clues: tuple[Clue, ...]) -> _Found:
    dicom_file = _dicom_file()
    header = dicom_file.read_header(stream, _KEYWORDS)
    dataset = header.dataset
    problem: Rejected | None = None
    frames = max(1, dicom_file.integer(dataset, "NumberOfFrames", 1))
    if header.pixels is None:
        problem = UnreadableImage(
            "no_pixels",
            "this DICOM object holds no image, or was cut off before its pixels: send the image",
        )
    elif frames > _MOST_FRAMES:
        problem = UnreadableImage(
            "too_large", f"it claims {frames} frames: export the radiographs among them alone"
        )
    uid = dicom_file.uid(dataset, "SOPInstanceUID")
    common = _header_clues(dicom_file, dataset)
    views = tuple(
        View(
            file,
            frame,
            (*_region_clues(dicom_file, dataset, frame), *common, *path_clues),
            uid,
            problem,
        )
        for frame in range(1 if problem else frames)
    )
    return _Found(views, *_identifiers(dicom_file, dataset))


def _identifiers(dicom_file: Any, dataset: Any) -> tuple[str | None, str | None]:
    """Return the Study Instance UID and the accession number, fit to be shown."""
    accession = masked(dicom_file.text(dataset, "AccessionNumber"))[:64]
    return dicom_file.uid(dataset, "StudyInstanceUID"), accession or None


# Text that may name the body part, strongest first.
_TEXTS = {
    "BodyPartExamined": Source.BODY_PART,
    "ProtocolName": Source.DESCRIPTION,
    "SeriesDescription": Source.DESCRIPTION,
    "PerformedProcedureStepDescription": Source.DESCRIPTION,
    "RequestedProcedureDescription": Source.DESCRIPTION,
    "StudyDescription": Source.DESCRIPTION,
    "ImageComments": Source.COMMENT,
}
_MOST_ITEMS = 16  # of a sequence are read: honest ones have one or two
_PROCEDURE_CODES = ("PerformedProtocolCodeSequence", "ProcedureCodeSequence")
_KEYWORDS = (
    *_IDENTIFIERS,
    "SOPInstanceUID",
    "NumberOfFrames",
    "AnatomicRegionSequence",
    "RequestAttributesSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *_TEXTS,
    *_PROCEDURE_CODES,
)
_SNOMED = {"SCT", "SRT", "SNM3", "99SDM"}  # schemes of area.py's codes, retired names included
_SNOMED_FORM = re.compile(r"[0-9]{6,18}|[A-Z]-[0-9A-F]{4,5}")


def _header_clues(dicom_file: Any, dataset: Any) -> tuple[Clue, ...]:
    """Return the clues that hold for every frame of a DICOM file."""
    clues = [
        Clue(source, keyword, dicom_file.text(dataset, keyword))
        for keyword, source in _TEXTS.items()
    ]
    for keyword in _PROCEDURE_CODES:
        clues += [
            Clue(Source.DESCRIPTION, keyword, dicom_file.text(item, "CodeMeaning"))
            for item in dicom_file.items(dataset, keyword)[:_MOST_ITEMS]
        ]
    clues += [
        Clue(
            Source.DESCRIPTION,
            "RequestedProcedureDescription",
            dicom_file.text(item, "RequestedProcedureDescription"),
        )
        for item in dicom_file.items(dataset, "RequestAttributesSequence")[:_MOST_ITEMS]
    ]
    return tuple(clue for clue in clues if clue.text)


def _region_clues(dicom_file: Any, dataset: Any, frame: int) -> Iterator[Clue]:
    """Yield the coded anatomic regions of one frame: the file's, or the frame's own."""
    groups = [
        *dicom_file.items(dataset, "PerFrameFunctionalGroupsSequence")[frame : frame + 1],
        *dicom_file.items(dataset, "SharedFunctionalGroupsSequence")[:1],
    ]
    anatomy = [
        item
        for group in groups
        for item in dicom_file.items(group, "FrameAnatomySequence")[:_MOST_ITEMS]
    ]
    for holder in (dataset, *anatomy):
        for item in dicom_file.items(holder, "AnatomicRegionSequence")[:_MOST_ITEMS]:
            scheme = dicom_file.text(item, "CodingSchemeDesignator").upper()
            code = dicom_file.text(item, "CodeValue") or dicom_file.text(item, "LongCodeValue")
            known = scheme in _SNOMED or (not scheme and _SNOMED_FORM.fullmatch(code))
            meaning = dicom_file.text(item, "CodeMeaning")
            if meaning or (code and known):
                yield Clue(Source.CODE, "AnatomicRegionSequence", meaning, code if known else "")


def _path_clues(name: str) -> Iterator[Clue]:
    """Yield a clue for each folder of ``name`` and one for the file, without MURA's labels."""
    path = PurePosixPath(_LABEL_SUFFIX.sub("", name.encode("utf-8", "replace").decode()))
    for folder in path.parts[:-1]:
        yield Clue(Source.FOLDER, "folder", folder)
    if path.stem:
        yield Clue(Source.FILE_NAME, "file name", path.stem)


def content_digest(hashes: Iterable[str]) -> str:
    """Return the SHA-256 over the sorted distinct content hashes: order and copies do not count."""
    return hashlib.sha256("\n".join(sorted(set(hashes))).encode()).hexdigest()


_LABEL = re.compile("positive|negative", re.IGNORECASE)
_LABEL_SUFFIX = re.compile(f"[ _-]?(?:{_LABEL.pattern})", re.IGNORECASE)


def masked(name: str) -> str:
    """Return ``name`` fit to be shown: labels as ``*``, unprintable characters escaped.

    MURA's folders carry the truth (``study1_positive``); it must not reach a page or an export.
    """
    shown = name if name.isprintable() else "".join(map(_displayable, name))
    return _LABEL.sub("*", shown)


def _displayable(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # noqa: PLR2004 - PEP 383: a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 - one byte
