"""Cross-validation: each fold scored by a network that never saw its patients, and the record.

A record is one JSON file that says how a method did: its settings, the data's digest, epochs and
seconds, and what each film out of fold got. Reports and cards are made of records alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, WeightsRefused
from mura_batch.network import weights_of
from mura_batch.runtime import Runtime, load
from training.dataset import ALL_AREAS, Dataset, Film
from training.evaluate import FilmScore, by_study, cases_of, check_readable, score_films
from training.fit import fit
from training.localisation import Localised
from training.metrics import auc_of
from training.run_folder import described, in_turn, made_by, read_settings, write_json
from training.settings import FitSettings, settings_of
from training.start import state_of

_RECORD = "record.json"
_FOLD_NAME = re.compile(r"[\w-][\w.-]*")
_NO_RECORD = (
    *(AttributeError, LookupError, OSError, OverflowError, RecursionError, TypeError, ValueError),
)
FOLD = "{fold}"  # in what training starts with: the name of the fold that is held out
ALL_FOLDS = "all"  # stands there where none is held out


@dataclass(frozen=True, slots=True)
class Fold:
    """One fold of a cross-validation.

    Attributes:
        start: digest of the state that training began with.
        films: that were trained on.
        data: their digest.
        seconds: that the training took.
        losses: mean training loss of each epoch.
        versions: of the packages, Python's and the code's own digest too.
        threads: of the training.
    """

    name: str
    start: str
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
        areas: whose films were scored, in order.
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

    def digest(self) -> str:
        """Return a digest of all of it."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    def of_area(self, area: str) -> list[FilmScore]:
        """Return the scores of an area's films, or those of ``ALL_AREAS``."""
        return [one for one in self.scores if area in (one.film.area, ALL_AREAS)]

    @property
    def scored_areas(self) -> tuple[str, ...]:
        """The areas that scores are of, and ``ALL_AREAS``."""
        return (*sorted({one.film.area for one in self.scores}), ALL_AREAS)

    @classmethod
    def read(cls, file: Path) -> Record:
        """Read a record.

        Raises:
            Misconfigured: it is none.
        """
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            record = cls(
                settings_of(told["settings"]),
                str(told["start"]),
                str(told["target"]),
                tuple(map(Area, told["areas"])),
                tuple(map(_fold_from_json, told["folds"])),
                tuple(map(_score, told["scores"])),
            )
            if not record.folds or not record.scores:
                raise ValueError("no folds, or no scores")
            once = {one.film.identity for one in record.scores}
            if len(once) < len(record.scores):
                raise ValueError("a film stands in it twice")
        except FileNotFoundError as exc:
            raise Misconfigured(f"{file} is not there: `cross-validate` writes it.") from exc
        except (*_NO_RECORD, WeightsRefused) as exc:
            raise Misconfigured(f"{file} is no record of a cross-validation: {exc!r}") from exc
        return record


def _row(score: FilmScore) -> list[Any]:
    film, where = score.film, score.localised
    found = None if where is None else [round(float(v), 4) for v in asdict(where).values()]
    return [
        film.path.name,
        film.frame,
        film.study,
        film.patient,
        film.area,
        film.split,
        film.label,
        None if film.hardware is None else int(film.hardware),
        score.logit,
        found,
    ]


def _fold_from_json(told: Mapping[str, Any]) -> Fold:
    """Return a fold from its JSON; its losses are numbers, its versions text by name."""
    losses = tuple(map(float, told["losses"]))
    versions = {str(name): str(version) for name, version in told["versions"].items()}
    if not (losses and isinstance(told["name"], str) and isinstance(told["start"], str)):
        raise ValueError("a fold without a name, a start, or losses")
    if "torch" not in versions:
        raise ValueError("a fold of no torch")
    counts = {name: int(told[name]) for name in ("films", "seconds", "threads")}
    return Fold(**{**told, **counts, "losses": losses, "versions": versions})


def _score(row: Sequence[Any]) -> FilmScore:
    """Return a score from :func:`_row`; TypeError or ValueError where it is none."""
    name, frame, study, patient, area, split, label, hardware, logit, found = row
    texts = (name, study, patient, split)
    if not (all(isinstance(text, str) for text in texts) and label in (0, 1)):
        raise ValueError(f"the row of {name!r}")
    told = None if hardware is None else bool(hardware)
    film = Film(Path(name), study, patient, Area(area), int(label), frame, split, hardware=told)
    where = None if found is None else Localised(bool(found[0]), *map(float, found[1:]))
    if not math.isfinite(logit):
        raise ValueError(f"the logit of {name!r}")
    return FilmScore(film, float(logit), where)


def cross_validate(
    data: Dataset,
    run: Path,
    settings: FitSettings,
    *,
    folds: Collection[str],
    areas: Collection[str] = tuple(Area),
    start: str = "nothing",
    device: str = "cpu",
    workers: int | None = None,
) -> Record:
    """Train without each fold and score it; write ``run/record.json`` after each.

    Films of other ``areas`` are trained on, not scored. ``start`` is as for
    :func:`training.start.state_of`; a ``{fold}`` in it stands for the fold's name. A run that was
    cut off goes on; folds that the record has already stay in it.

    Raises:
        Misconfigured: the record is of another method, a fold has no films of the areas or one
            cannot be read, and as for :func:`training.start.state_of` and
            :func:`training.fit.fit`.
    """
    record = Record(settings, start, data.target, tuple(sorted(set(areas))), (), ())
    before = _before(run, record)
    if odd := [name for name in folds if not _FOLD_NAME.fullmatch(name)]:
        raise Misconfigured(
            f"The fold {odd[0]!r} cannot name a folder: use letters, digits, - and _."
        )
    data.has_splits(folds)
    _same_data(run, before, data)
    films_of = {
        name: [film for film in data.films if film.split == name and film.area in areas]
        for name in dict.fromkeys(folds)
    }
    if empty := [name for name, films in films_of.items() if not films]:
        raise Misconfigured(f"No film of these areas is in the fold {empty[0]!r}.")
    begins = {name: start.replace(FOLD, name) for name in films_of}
    states = {how: state_of(how) for how in dict.fromkeys(begins.values())}
    first, *_ = films_of.values()  # those of the others are read before the first is scored
    check_readable(first, settings.preprocessing)
    for name, films in films_of.items():
        own, state = run / f"fold-{name}", states[begins[name]]
        fit(data, own, settings, held_out=[name], start=state, device=device, workers=workers)
        scores = score_run(own, films, device)
        record = join(run, record, _fold_of_run(name, own), scores)
    return record


def _same_data(run: Path, before: Record, data: Dataset) -> None:
    """Refuse a record whose scores are of films that this data tells otherwise of.

    Raises:
        Misconfigured: they are.
    """
    told = {film.identity: (film.patient, film.split, film.label) for film in data.films}
    for film in (one.film for one in before.scores):
        if told.get(film.identity) != (film.patient, film.split, film.label):
            raise Misconfigured(
                f"{run / _RECORD} is of other data: it tells otherwise of {film.name}, study"
                f" {film.study}. Name another folder."
            )


def join(run: Path, method: Record, fold: Fold, scores: Sequence[FilmScore]) -> Record:
    """Put a fold into ``run/record.json`` and return all of it; other processes wait meanwhile.

    Raises:
        Misconfigured: it is another method's record.
    """
    with in_turn(run / "record.lock"):
        before = _before(run, method)
        folds = [one for one in before.folds if one.name != fold.name]
        kept = [one for one in before.scores if one.film.split != fold.name]
        joined = replace(
            before,
            folds=tuple(sorted([*folds, fold], key=lambda one: one.name)),
            scores=tuple(sorted([*kept, *scores], key=lambda one: one.film.split)),
        )
        write_json(joined.to_json(), run / _RECORD, indent=None)
    return joined


def _before(run: Path, method: Record) -> Record:
    """Return the record in a folder, one without folds where there is none yet.

    Raises:
        Misconfigured: it is another method's.
    """
    empty = replace(method, folds=(), scores=())
    if not (run / _RECORD).exists():
        return empty
    before = Record.read(run / _RECORD)
    mine, theirs = (replace(it, folds=(), scores=()).to_json() for it in (method, before))
    if differing := [name for name in mine if mine[name] != theirs[name]]:
        raise Misconfigured(
            f"{run / _RECORD} is of another method ({', '.join(differing)} differ): name another"
            " folder."
        )
    return before


def score_run(run: Path, films: Sequence[Film], device: str = "cpu") -> list[FilmScore]:
    """Score films with the network of a run, as the product does.

    Raises:
        Misconfigured: a film cannot be read.
    """
    settings = read_settings(run / "run.json")
    return score_films(load_run(run, device), films, settings.preprocessing)


def load_run(run: Path, device: str = "cpu") -> Runtime:
    """Return the network of a run, ready to score.

    Raises:
        Misconfigured: its files are damaged.
    """
    settings = read_settings(run / "run.json")
    weights = weights_of(made_by(run), settings.architecture)
    return load(weights, settings.preprocessing, device=device)


def _fold_of_run(name: str, run: Path) -> Fold:
    """Return what the folder of a run says of itself.

    Raises:
        Misconfigured: its files are missing or damaged.
    """
    made_of = described(run)
    try:
        outcome = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
        ended = {part: outcome[part] for part in ("seconds", "losses")}
        began = {part: made_of[part] for part in ("start", "films", "data", "versions", "threads")}
        return _fold_from_json({"name": name, **began, **ended})
    except _NO_RECORD as exc:
        raise Misconfigured(f"{run} does not say how its run ended: {exc!r}") from exc


def trunks_of(record: Record, folder: Callable[[str], Path]) -> list[tuple[Fold, FitSettings]]:
    """Return what the folds of a record began with, each with a trunk of its own, and last the
    trunk of ``ALL_FOLDS``; ``folder`` says where the run of each lies.

    Raises:
        Misconfigured: one is missing or damaged, was made otherwise than the others, or held
            other films out than its fold's.
    """
    found: list[tuple[Fold, FitSettings]] = []
    for name in (*(fold.name for fold in record.folds), ALL_FOLDS):
        run = folder(name)
        held_out = [] if name == ALL_FOLDS else [name]
        if (without := described(run)["held_out"]) != held_out:
            told = [", ".join(names) or "no fold" for names in (without, held_out)]
            raise Misconfigured(f"{run} was made without {told[0]}, not without {told[1]}.")
        settings = read_settings(run / "run.json")
        if found and settings != found[0][1]:
            raise Misconfigured(f"{run} was made with other settings than the fold's before it.")
        found.append((_fold_of_run(name, run), settings))
    return found


def paired(one: Record, other: Record, area: str) -> tuple[list[FilmScore], list[FilmScore]]:
    """Return both records' scores of the films of an area that both scored, in one order."""
    both = {score.film.identity for score in one.scores} & {
        score.film.identity for score in other.scores
    }
    mine, theirs = (
        sorted(
            (score for score in record.of_area(area) if score.film.identity in both),
            key=lambda score: score.film.identity,
        )
        for record in (one, other)
    )
    return mine, theirs


def study_figures(record: Record) -> Iterator[str]:
    """Yield a line of the study level's AUC for each area, and for all."""
    for area in record.scored_areas:
        cases = cases_of(by_study(record.of_area(area)), None)
        count, positive = len(cases.labels), int(cases.labels.sum())
        yield f"{area}: {count} studies, {positive} positive, AUC {auc_of(cases).words()}"
