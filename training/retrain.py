"""A site's own network for an area: trained beside the daemon, measured, stored, put in use.

It is put in use where it is not worse than what is in use, on studies of patients that it never
saw: the lower end of the paired bootstrap interval of the AUCs' difference may lie ``MARGIN``
below 0 (non-inferiority). Who was kept aside once is kept aside for good (``aside.json``), because
each network goes on from the one before. All that is here goes on after a kill when it is called
again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mura_batch.area import Area
from mura_batch.config import Settings
from mura_batch.errors import Misconfigured
from mura_batch.network import network_with
from mura_batch.runtime import load
from mura_batch.weights import Card, WeightsStore
from training.crossval import score_run
from training.dataset import Dataset, Film
from training.evaluate import FilmScore, by_study, cases_of, check_readable, score_films
from training.fit import fit
from training.folds import fold_numbers
from training.metrics import Cases, Estimate, auc_of, difference, roc_auc
from training.publish import Measured, Origins, card_for, write_weights
from training.quantize import Sample, quantize
from training.run_folder import data_digest, write_json
from training.search import search
from training.settings import FitSettings, Stage, two_phases

MARGIN = 0.05
_ASIDE = ("valid", "test")  # splits of this name are measured on
_FOLDS = 5  # else one of so many folds of the patients
_KEPT = "kept aside"  # the split of those


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of a retraining.

    Attributes:
        trials: of a search for settings before it; 0 searches nothing.
        epochs: of phase two at most, None for the default.
        activate: put the weights in use, if they are not worse.
        force: why they are put in use even if they are worse; empty for not.
    """

    trials: int = 0
    epochs: int | None = None
    activate: bool = False
    force: str = ""
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Retrained:
    """What came of it.

    Attributes:
        new: study AUC of the new weights.
        on: what it was measured on, in words.
        before: card of the weights that were in use, None where there were none.
        gain: how much higher the new AUC is than theirs on the same studies.
        good: it is not worse than theirs, or there were none.
        activated: the new weights are in use.
        int8: how they run in int8, in words, or why that was not measured.
        run: the folder of all that was made on the way.
    """

    card: Card
    new: Estimate
    on: str
    before: Card | None
    gain: Estimate | None
    good: bool
    activated: bool
    int8: str
    run: Path


def retrain(site: Settings, area: Area, data: Dataset, plan: Plan) -> Retrained:
    """Train weights for ``area`` from what is in use, measure and store them.

    Raises:
        Misconfigured: as for :func:`training.fit.fit`, or the studies are too few to measure on.
        WeightsRefused: the weights in use are damaged.
    """
    store = WeightsStore(site.weights_dir)
    before = store.active(area)
    folder = site.home / "training" / area
    data, aside = divided(data.checked().only([area]), folder / "aside.json")
    seen = [film for film in data.films if film.split in aside and film.area == area]
    if {film.label for film in seen} != {0, 1}:
        raise Misconfigured(f"The studies of {area} kept aside to measure on lack one label.")
    base, start = FitSettings(), None
    if before is not None:
        base = two_phases(before.preprocessing, before.architecture)
        start = network_with(store.load(before)).state_dict()
    if plan.epochs is not None:
        base = replace(base, stages=(Stage(base.preprocessing.size, plan.epochs),))
    check_readable(seen, base.preprocessing)  # before hours of training
    made_of = (data_digest(data.films), aside, base, plan.trials, before and before.sha256)
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    run = folder / name
    settings = base
    if plan.trials:
        settings = search(
            data,
            run / "search",
            base,
            trials=plan.trials,
            held_out=aside,
            start=start,
            device=plan.device,
        ).settings
    fit(data, run / "fit", settings, held_out=aside, start=start, device=plan.device)
    file = run / "weights.safetensors"
    write_weights(run / "fit", file, torch.float32)

    scores = score_run(run / "fit", seen, plan.device)
    cases = _cases(scores)
    gain = None if before is None else _gain(cases, store, before, seen, plan.device)
    card = card_for(
        area,
        file,
        settings,
        Measured(scores, data.target, f"this site's data ({', '.join(aside)})"),
        Origins(
            training_data=f"{sum(f.split not in aside for f in data.films)} films of this site",
            licence="this site's own",
            origin="trained",
            source=f"{before.area} {before.short}" if before else "random weights",
            notes=_comparison(before, gain),
        ),
    )
    card = store.add(file, card)
    _tidy(run)
    good = gain is None or not_worse(gain)
    activated = plan.activate and (good or bool(plan.force))
    if activated:
        store.activate(area, card.sha256, "" if good else plan.force)
    int8 = _int8(store, card, data)
    on = f"{len(cases.labels)} studies, {int(cases.labels.sum())} positive, kept aside"
    return Retrained(card, auc_of(cases), on, before, gain, good, activated, int8, run)


def divided(data: Dataset, file: Path) -> tuple[Dataset, list[str]]:
    """Return the data, and the splits that are measured on: those named so, or a fifth.

    ``file`` says which studies were kept aside before, and which were not: their patients stay
    where they are. Of those who came since, each fifth goes aside.

    Raises:
        Misconfigured: the file is damaged, the patients are too few, or the splits would have
            someone on another side than before.
    """
    named = sorted({film.split for film in data.films} & set(_ASIDE))
    before = _read(file)
    studies: defaultdict[str, set[str]] = defaultdict(set)
    for film in data.films:
        studies[film.patient].add(hashlib.sha256(film.study.encode()).hexdigest()[:16])
    if named:
        aside = {film.patient for film in data.films if film.split in named}
        crossed = [
            patient
            for patient, own in studies.items()
            if any(before.get(study, patient in aside) != (patient in aside) for study in own)
        ]
        if crossed:
            raise Misconfigured(
                f"By these splits, patient {crossed[0]} ({len(crossed)} in all) would change sides:"
                f" {file} says whom networks of this home have learned from. Leave the splits out."
            )
    elif before:
        aside = {patient for patient, own in studies.items() if _stays_aside(own, before)}
    else:
        first = fold_numbers(data.films, _FOLDS, FitSettings().seed) == 0
        aside = {film.patient for film, it in zip(data.films, first, strict=True) if it}
    told = {study: patient in aside for patient, own in studies.items() for study in own}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(before | told, file)
    if named:
        return data, named
    films = (replace(f, split=_KEPT if f.patient in aside else "train") for f in data.films)
    return replace(data, films=tuple(films)), [_KEPT]


def _stays_aside(studies: set[str], before: Mapping[str, bool]) -> bool:
    """Return whether a patient was kept aside; of one who is new, what the digests draw."""
    if known := studies & set(before):
        return all(before[study] for study in known)
    return int(min(studies), 16) % _FOLDS == 0


def _read(file: Path) -> dict[str, bool]:
    if not file.exists():
        return {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return {str(study): bool(aside) for study, aside in told.items()}
    except (OSError, ValueError, AttributeError) as exc:
        raise Misconfigured(
            f"{file} is damaged. It says whom no network of this home has learned from: restore it;"
            " without it the next figures are too good."
        ) from exc


def _int8(store: WeightsStore, card: Card, data: Dataset) -> str:
    """Measure the new weights in int8, so that they run as fast as others did."""
    try:
        form = quantize(store, card, Sample(data.films, labelled=True, name="the same data"))
    except Misconfigured as exc:
        return f"int8 not measured, so they run in f32: {exc}"
    store.add_int8_form(form, card)
    return form.words()


def _tidy(run: Path) -> None:
    """Remove what only a run that goes on needs: films of patients, and hundreds of megabytes."""
    for folder in (run / "films", run / "search/films"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (run / "weights.safetensors", run / "fit/state.pt", run / "fit/best.pt"):
        file.unlink(missing_ok=True)


def _cases(scores: list[FilmScore]) -> Cases:
    return cases_of(by_study(scores), None)


def _gain(
    new: Cases, store: WeightsStore, before: Card, films: list[Film], device: str
) -> Estimate:
    """Return the paired difference of the study AUCs of the new weights and those in use."""
    runtime = load(store.load(before), before.preprocessing, device=device)
    old = _cases(score_films(runtime, films, before.preprocessing))
    return difference(new, old, roc_auc)


def _comparison(before: Card | None, gain: Estimate | None) -> str:
    if before is None or gain is None:
        return "Trained where no weights were in use."
    return (
        f"Fine-tuned from {before.short}. On the same studies its AUC is {gain.words('+.3f')}"
        " against theirs, which may have been trained on some of them."
    )


def not_worse(gain: Estimate) -> bool:
    """Return whether the interval of a gain says that nothing is lost but a margin."""
    return gain.low is not None and gain.low >= -MARGIN
