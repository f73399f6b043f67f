"""Cross-validation: each fold scored by a network that never saw its patients, and the record.

A record is one JSON file that says how a method did: its settings, the data's digest, epochs and
seconds, and what each film out of fold got. Reports and cards are made of records alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from mura_batch.runtime import load
from mura_batch.weights import fitted
from training.dataset import Dataset, Film
from training.evaluate import ALL_AREAS, FilmScore, by_study, cases_of, score_films
from training.fit import fit
from training.localisation import Localised
from training.metrics import auc_of
from training.run_folder import read_settings, write_json
from training.settings import FitSettings, settings_of


@dataclass(frozen=True, slots=True)
class Fold:
    """One fold of a cross-validation.

    Attributes:
        films: that were trained on.
        data: their digest.
        seconds: that the training took.
        losses: mean training loss of each epoch.
        versions: of the packages, Python's too.
        threads: of the training.
    """

    name: str
    films: int
    data: str
    seconds: int
    losses: tuple[float, ...]
    versions: Mapping[str, str]
    threads: int


@dataclass(frozen=True, slots=True)
class Record:
    """How a method did on folds that it had not seen.

    Attributes:
        start: what training began with, as it was asked for.
        areas: whose films were scored.
        scores: of the films out of fold; their paths are names alone.
    """

    settings: FitSettings
    start: str
    target: str
    areas: tuple[str, ...]
    folds: tuple[Fold, ...]
    scores: tuple[FilmScore, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`read` reads."""
        return {
            "settings": asdict(self.settings),
            "start": self.start,
            "target": self.target,
            "areas": self.areas,
            "folds": [asdict(fold) for fold in self.folds],
            "scores": [_row(score) for score in self.scores],
        }

    @classmethod
    def read(cls, file: Path) -> Record:
        """Read a record.

        Raises:
            Misconfigured: it is none.
        """
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                settings_of(told["settings"]),
                told["start"],
                told["target"],
                tuple(told["areas"]),
                tuple(Fold(**{**fold, "losses": tuple(fold["losses"])}) for fold in told["folds"]),
                tuple(map(_score, told["scores"])),
            )
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise Misconfigured(f"{file} is no record of a cross-validation: {exc!r}") from exc


def _row(score: FilmScore) -> list[Any]:
    film, where = score.film, score.localised
    found = None if where is None else [round(float(v), 4) for v in asdict(where).values()]
    return [
        film.path.name,
        film.study,
        film.patient,
        film.area,
        film.split,
        film.label,
        None if film.hardware is None else int(film.hardware),
        score.logit,
        found,
    ]


def _score(row: Sequence[Any]) -> FilmScore:
    name, study, patient, area, split, label, hardware, logit, found = row
    told = None if hardware is None else bool(hardware)
    film = Film(Path(name), study, patient, area, label, split=split, hardware=told)
    where = None if found is None else Localised(bool(found[0]), *found[1:])
    return FilmScore(film, logit, where)


def cross_validate(
    data: Dataset,
    run: Path,
    settings: FitSettings,
    *,
    folds: Collection[str],
    areas: Collection[str] = tuple(Area),
    start: Mapping[str, Tensor] | None = None,
    begins: str = "nothing",
    device: str = "cpu",
    workers: int = 2,
) -> Record:
    """Train without each fold and score it; write ``run/record.json`` after each.

    Films of other ``areas`` are trained on, not scored. A run that was cut off goes on.

    Raises:
        Misconfigured: there is no such fold, and as for :func:`training.fit.fit`.
    """
    data.has_splits(folds)
    done: list[Fold] = []
    scores: list[FilmScore] = []
    for name in folds:
        own = run / f"fold-{name}"
        fit(data, own, settings, held_out=[name], start=start, device=device, workers=workers)
        films = [f for f in data.films if f.split == name and f.area in areas]
        scores += score_run(own, films, device)
        done.append(_fold(name, own))
        record = Record(settings, begins, data.target, tuple(areas), tuple(done), tuple(scores))
        write_json(record.to_json(), run / "record.json", indent=None)
    return record


def score_run(run: Path, films: Sequence[Film], device: str = "cpu") -> list[FilmScore]:
    """Score films with the network of a run, as the product does.

    Raises:
        Misconfigured: a film cannot be read.
    """
    settings = read_settings(run / "run.json")
    state = torch.load(run / "network.pt", weights_only=True)
    runtime = load(fitted(state, settings.architecture), settings.preprocessing, device=device)
    return score_films(runtime, films, settings.preprocessing)


def _fold(name: str, run: Path) -> Fold:
    made_of = json.loads((run / "run.json").read_text(encoding="utf-8"))
    outcome = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    return Fold(
        name=name,
        films=made_of["films"],
        data=made_of["data"],
        seconds=outcome["seconds"],
        losses=tuple(outcome["losses"]),
        versions=made_of["versions"],
        threads=made_of["threads"],
    )


def study_figures(record: Record) -> Iterator[str]:
    """Yield a line of the study level's AUC for each area, and for all."""
    for area in (*sorted({one.film.area for one in record.scores}), ALL_AREAS):
        own = [one for one in record.scores if area in (one.film.area, ALL_AREAS)]
        cases = cases_of(by_study(own), None)
        count, positive = len(cases.labels), int(cases.labels.sum())
        yield f"{area}: {count} studies, {positive} positive, AUC {auc_of(cases).words()}"
