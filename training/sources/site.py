"""The labels that people stored at a site (``mura-batch label``), with the films that it scored."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mura_batch.assessment import PersonAnswer, divide
from mura_batch.config import Settings, load
from mura_batch.custody import Custody
from mura_batch.errors import MuraError
from mura_batch.records import LabelRow, Place, StoredFile, StoredStudy
from mura_batch.store import Store
from mura_batch.study import SourceFile, read_study
from training.dataset import Dataset, Film, Problem
from training.sources.dicom import Patients, part_films

_PATIENT = re.compile(r"patient\d+", re.IGNORECASE)  # a folder's name, as in MURA


def is_one(folder: Path) -> bool:
    """Say whether a folder is a site's home."""
    return any((folder / name).is_file() for name in ("results.db", "config.toml"))


def read(home: Path) -> Dataset:
    """Return the films of a site's labelled studies.

    A label of one area comes before that of its whole study. The patient is the DICOM Patient ID,
    else a ``patientN`` folder above the study, else the study itself.

    Raises:
        Misconfigured: there is no database.
        Transient: it does not answer.
    """
    settings = load(home, {})
    films: list[Film] = []
    problems: list[Problem] = []
    patients = Patients()
    with Store.open(settings.database_url) as store:
        labels: defaultdict[str, list[LabelRow]] = defaultdict(list)
        for row in store.labels():
            labels[row.study].append(row)
        for study in store.studies(labels):
            films += _films(settings, study, labels[study.id], patients, problems)
    return Dataset(tuple(films), tuple(problems))


def _films(
    settings: Settings,
    stored: StoredStudy,
    labels: list[LabelRow],
    patients: Patients,
    problems: list[Problem],
) -> Iterator[Film]:
    custody = Custody(settings)
    where = f"study {stored.id}"
    try:
        files = [_file(custody, stored.id, file) for file in stored.files]
        study = read_study(files)
    except MuraError as exc:
        problems.append(Problem(where, str(exc)))
        return
    answer = PersonAnswer(stored.set_area, stored.set_all) if stored.set_area else None
    by_area = {row.area: row.label for row in labels}
    patient = next(filter(None, (patients.of(file.path) for file in files)), "") or _named(stored)
    for part in divide(study, settings.rules, answer):
        word = by_area.get(part.area, by_area.get(None))
        if word is not None:
            like = Film(Path(), stored.id, patient, "", int(word == "positive"), where=where)
            yield from part_films(part, like, problems)


def _file(custody: Custody, study: str, file: StoredFile) -> SourceFile:
    name = file.source if file.place is Place.OUTSIDE else file.name
    path = custody.locate(file.place, study, file.claim, name)
    return SourceFile(path, file.name, file.sha256, file.size)


def _named(stored: StoredStudy) -> str:
    parts = stored.files[0].name.split("/") if stored.files else []
    return next((part for part in parts if _PATIENT.fullmatch(part)), stored.id)
