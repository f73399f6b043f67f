"""A folder of DICOM files with a CSV of labels: ``study, label[, area, patient, split]``.

``study`` is a Study Instance UID or an accession number. A label without an area holds for every
area of its study; the areas are those that scoring would decide on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mura_batch.area import Area, AreaRules
from mura_batch.assessment import Part, divide
from mura_batch.dicom_file import read_header, text
from mura_batch.errors import Misconfigured, MuraError
from mura_batch.moves import digest
from mura_batch.study import SourceFile, identify, read_study
from mura_batch.untrusted import opened
from training.dataset import Dataset, Film, Problem
from training.sources.tables import Row, gather, read_table


def read(folder: Path, labels: Path) -> Dataset:
    """Return the films of the labelled studies; files of others are passed over.

    Raises:
        Misconfigured: the folder holds no DICOM file, or the table cannot be read.
    """
    problems: list[Problem] = []
    patients = Patients()
    studies, names = _studies(folder, problems)
    if not studies:
        raise Misconfigured(f"{folder} holds no DICOM file.")

    def films_of(row: Row) -> Iterator[Film]:
        found = names.get(row.need("study"), set())
        if len(found) != 1:
            many = f"{len(found)} studies have" if found else f"no file in {folder} is of"
            raise ValueError(f"{many} the study {row['study']}")
        (uid,) = found
        return _films(studies[uid], uid, row, patients, problems)

    films, wrong = gather(read_table(labels, ("study", "label")), films_of)
    return Dataset(tuple(films), (*problems, *wrong))


def _studies(
    folder: Path, problems: list[Problem]
) -> tuple[dict[str, list[SourceFile]], dict[str, set[str]]]:
    """Return the files of each study UID, and the UIDs that each UID and accession leads to."""
    studies: defaultdict[str, list[SourceFile]] = defaultdict(list)
    names: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            found = identify(path)
        except MuraError as exc:
            problems.append(Problem(str(path), str(exc)))
            continue
        if found.study_uid is None:
            continue
        name = path.relative_to(folder).as_posix()
        status = path.stat()
        sha256, trouble = digest(path, name, status)
        studies[found.study_uid].append(SourceFile(path, name, sha256, status.st_size, trouble))
        for known_as in filter(None, (found.study_uid, found.accession)):
            names[known_as].add(found.study_uid)
    return studies, names


def _films(
    files: list[SourceFile], uid: str, row: Row, patients: Patients, problems: list[Problem]
) -> Iterator[Film]:
    """Yield a study's films; those that no area or no picture can be had of are problems."""
    label, area = row.label("label"), row["area"].upper()
    if area not in {"", *Area}:
        raise ValueError(f"the area {row['area']!r} is none of {', '.join(Area)}")
    patient = row["patient"] or patients.of(files[0].path) or uid
    like = Film(Path(), uid, patient, area, label, split=row["split"], where=row.where)
    for part in divide(read_study(files), AreaRules(), None):
        if not area or part.area in {None, area}:
            yield from part_films(part, like, problems)


def part_films(part: Part, like: Film, problems: list[Problem]) -> Iterator[Film]:
    """Yield the films of one part of a study, ``like`` a film that says all the rest."""
    undecided = part.decision.outcome == "needs_person"
    area = part.area or (like.area if undecided else "")
    for view in part.views:
        name = view.file.name
        if view.problem is not None:
            problems.append(Problem(like.where, f"{name}: {view.problem}"))
        elif not area:
            problems.append(Problem(like.where, f"{name}: {part.decision.why}"))
        else:
            yield Film(
                view.file.path,
                like.study,
                like.patient,
                area,
                like.label,
                frame=view.frame,
                split=like.split,
                where=like.where,
            )


class Patients:
    """Numbers for patients, so that nothing that is written tells who they are."""

    def __init__(self) -> None:
        self._numbers: dict[str, str] = {}

    def of(self, path: Path) -> str:
        """Return a name for a DICOM file's patient, or empty text where it states none."""
        try:
            with opened(path) as stream:
                stated = text(read_header(stream, ("PatientID",)).dataset, "PatientID")
        except MuraError:
            return ""
        return self._numbers.setdefault(stated, f"p{len(self._numbers) + 1}") if stated else ""
