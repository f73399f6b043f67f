"""A trained network to weights with an honest card: measured on studies that it never saw."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from mura_batch.area import Area
from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured
from mura_batch.network import weights_of
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime import Runtime, load
from mura_batch.weights import sha256_of
from mura_batch.weights_card import Calibration, Card, Metric, OperatingPoint, Origin
from training.calibration import POINTS, cross_fitted_rates, fit_calibration, thresholds
from training.crossval import ALL_FOLDS, FOLD, Record, paired, trunks_of
from training.dataset import Film
from training.evaluate import (
    Deciding,
    FilmScore,
    both_labels,
    by_study,
    cases_of,
    score_films,
    where_evidence_lies,
)
from training.metrics import Cases, Estimate, auc_of, difference, roc_auc
from training.run_folder import described, made_by, read_settings, state_digest
from training.settings import FitSettings
from training.start import state_of

_TRAINED_ON = (
    "FracAtlas (Abedeen et al., Scientific Data 10, 521, 2023; CC BY 4.0), upper limb; {start}; one"
    " network for all areas; {course}; computed in {precision}"
)
_STARTS = {
    "nothing": "begun with random weights, no ImageNet weights",
    "runs/trunk-{fold}/network.pt": (
        "begun with a trunk of all its films, legs and hips too (out of fold: of all but the"
        " fold's), which began with random weights: no ImageNet weights"
    ),
}
_NOTES = (
    "Starting weights, not specialists: the same network serves all seven areas. The label is"
    " fracture, not MURA's abnormal. FracAtlas has no finger films of their own and few films of"
    " wrists alone, humeri and shoulders. Trained on all of its upper-limb exams here; measured,"
    " calibrated and given its thresholds on the pooled out-of-fold logits of {folds} networks that"
    " were trained in the same way, each without the exams that it scored. Sensitivity and"
    " specificity are cross-fitted over two halves of these exams. Not tested on any other"
    " hospital's films."
)
_SPECIALIST = (
    " Fine-tuned for {areas}, it reached an AUC of {own} on {studies} studies out of fold ({folds}"
    " folds), where this one reached {this}: {gain}, paired."
)
_DECODED = (
    " Films are decoded at reduced size, as these weights ask: over the {films} films that are"
    " large enough, a film's probability differs from that of a full decoding by {mean:.3f} in the"
    " mean and by {most:.3f} at most."
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What weights reach on studies that they never saw.

    Attributes:
        scores: of those studies' films.
        target: what their labels say.
        on: what they are, in words.
    """

    scores: Sequence[FilmScore]
    target: str
    on: str


@dataclass(frozen=True, slots=True)
class Origins:
    """What a card says of where weights come from."""

    training_data: str
    licence: str
    origin: Origin
    source: str
    notes: str


def card_for(
    area: Area, file: Path, settings: FitSettings, found: Measured, origins: Origins
) -> Card:
    """Return the card of weights for an area: calibrated, with thresholds, and what they reach.

    Raises:
        Misconfigured: what was measured has one label only.
    """
    exams = by_study(found.scores)
    raw = cases_of(exams, None)
    if not both_labels(exams):
        raise Misconfigured("The studies to measure on have one label only: give more studies.")
    deciding = decided_by(exams, found.on)
    rates = cross_fitted_rates(raw)
    return Card(
        area=area,
        target="fracture" if found.target == "fracture" else "abnormal",
        sha256=sha256_of(file),
        architecture=settings.architecture,
        preprocessing=settings.preprocessing,
        operating_points=tuple(
            OperatingPoint(
                name=name,
                threshold=deciding.thresholds[name],
                sensitivity=_rounded(rates[name][0].value),
                specificity=_rounded(rates[name][1].value),
            )
            for name in POINTS
        ),
        calibration=deciding.calibration,
        training_data=origins.training_data,
        metrics=_metrics(found.scores, deciding, area, found.on),
        licence=origins.licence,
        origin=origins.origin,
        source=origins.source,
        notes=origins.notes,
    )


def publish_bundled(
    films: Sequence[Film],
    record: Record,
    run: Path,
    folder: Path,
    specialists: Sequence[Record] = (),
) -> Path:
    """Write the run's network in half precision, and a card for each area, into ``folder``.

    ``record`` is the cross-validation of the same settings; calibration, thresholds and figures
    come from it. The cards say how much better ``specialists`` of their area are. Return the
    weights' file.

    Nothing is replaced before all of it is made.

    Raises:
        Misconfigured: the record is of other settings or another start than the run, or the run
            held films out.
    """
    settings = read_settings(run / "run.json")
    if settings != record.settings:
        raise Misconfigured(f"{run} was made with other settings than the record's: fit it again.")
    made_of = described(run)
    if made_of["start"] not in _starts(record):
        raise Misconfigured(f"{run} began otherwise than the record's folds: fit it again.")
    if made_of["held_out"]:
        raise Misconfigured(f"{run} was trained without some folds: publish one of all films.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        file = Path(made) / "generalist.safetensors"
        half = write_weights(run, file, torch.float16)
        cards = _cards(films, record, specialists, file, half)
        file.replace(folder / file.name)
    for card in cards:
        _write_card(folder / "cards" / f"{card.area}.json", card)
    return folder / file.name


def _starts(record: Record) -> set[str]:
    """Return the digest of what a network of all films may have begun with: what all folds did, or
    where each had its own, what was made in the same way of all films.

    Raises:
        Misconfigured: that is missing, or was made otherwise.
    """
    if FOLD not in record.start:
        starts = {fold.start for fold in record.folds}
        return starts if len(starts) == 1 else set()

    def file_of(name: str) -> Path:
        return Path(record.start.replace(FOLD, name))

    trunks_of(record, lambda name: file_of(name).parent)
    for fold in record.folds:
        if _digest_of(file_of(fold.name)) != fold.start:
            raise Misconfigured(f"The fold {fold.name} did not begin with {file_of(fold.name)}.")
    return {_digest_of(file_of(ALL_FOLDS))}


def _digest_of(file: Path) -> str:
    """Return the digest of what a run that starts with this file begins with."""
    return state_digest(state_of(str(file)) or {})


def _beside(record: Record, specialist: Record, area: Area) -> str:
    """Say how a specialist does beside the generalist on one of its areas; empty on others."""
    own, this = paired(specialist, record, area)
    if area not in specialist.areas or not both_labels(by_study(own)):
        return ""
    cases, others = (cases_of(by_study(scores), None) for scores in (own, this))
    return _SPECIALIST.format(
        areas=" and ".join(specialist.areas),
        own=auc_of(cases).words(),
        studies=len(cases.labels),
        folds=len({score.film.split for score in own}),
        this=auc_of(others).words(),
        gain=difference(cases, others, roc_auc).words("+.3f"),
    )


def _cards(
    films: Sequence[Film],
    record: Record,
    specialists: Sequence[Record],
    file: Path,
    half: dict[str, Tensor],
) -> list[Card]:
    settings = record.settings
    notes = _NOTES.format(folds=len(record.folds))
    spec = settings.preprocessing
    if spec.enough is not None:
        weights = weights_of(half, settings.architecture)
        runtime = load(weights, spec, runtime="torch", device="cpu")
        notes += _decoded(runtime, films, spec, spec.enough)
    origins = Origins(
        training_data=_TRAINED_ON.format(
            start=_STARTS.get(record.start, f"begun with {record.start}"),
            course=settings.course(),
            precision=settings.precision,
        ),
        licence="MIT; trained on CC BY 4.0 data, attribution above",
        origin="bundled",
        source="training/fit.py",
        notes=notes,
    )
    on = f"FracAtlas, out of fold ({len(record.folds)} folds)"
    found = Measured(record.scores, record.target, on)

    def with_notes_of(area: Area) -> Origins:
        beside = "".join(_beside(record, one, area) for one in specialists)
        return replace(origins, notes=notes + beside)

    return [card_for(area, file, settings, found, with_notes_of(area)) for area in Area]


def write_weights(run: Path, file: Path, precision: torch.dtype) -> dict[str, Tensor]:
    """Write a run's network as safetensors and return its tensors, as they were rounded."""
    state = made_by(run)
    kept = {n: t.to(precision).contiguous() for n, t in state.items() if t.is_floating_point()}
    write_atomic(file, lambda stream: stream.write(save(kept)))
    return kept


def _write_card(target: Path, card: Card) -> None:
    """Write a card whole or not at all."""
    text = card.to_json().encode()
    write_atomic(target, lambda stream: stream.write(text))


def _decoded(runtime: Runtime, films: Sequence[Film], spec: Preprocessing, enough: int) -> str:
    """Say what decoding at reduced size changes in the probabilities of large films."""
    large = [film for film in films if _longer_side(film.path) >= 2 * enough]
    if not large:
        return ""
    reduced, full = (
        cases_of([[one] for one in score_films(runtime, large, how)], None).probabilities
        for how in (spec, replace(spec, decode="full"))
    )
    apart = np.abs(reduced - full)
    return _DECODED.format(films=len(large), mean=apart.mean(), most=apart.max())


def _longer_side(path: Path) -> int:
    with Image.open(path) as film:
        return max(film.size)


def decided_by(exams: Sequence[Sequence[FilmScore]], on: str) -> Deciding:
    """Return calibration and thresholds fitted on scored studies, which are ``on`` in words.

    Calibrated by Platt's scaling, but for a network that orders studies no better than chance.
    """
    cases = cases_of(exams, None)
    how = fit_calibration(cases.logits, cases.labels)
    calibration = None
    if how is not None:
        slope, intercept = (round(value, 5) for value in how)
        calibration = Calibration(slope, intercept, f"{_count(cases)}; {on}")
    points = thresholds(cases_of(exams, calibration).probabilities, cases.labels)
    return Deciding(calibration, {name: round(value, 4) for name, value in points.items()})


def deciding_of(record: Record) -> Deciding:
    """Return calibration and thresholds fitted on a record's out-of-fold logits."""
    return decided_by(by_study(record.scores), "out of fold")


def _metrics(
    scores: Sequence[FilmScore], deciding: Deciding, area: Area, on: str
) -> dict[str, Metric]:
    """Return the AUC of this area's studies and, where there are others, of all; and how often the
    peak of the evidence touches a box in this area's found films.
    """
    own = [one for one in scores if one.film.area == area]
    found: dict[str, tuple[Estimate, str]] = {}
    if len(own) < len(scores):
        cases = cases_of(by_study(scores), None)
        found["study_auc_all_areas"] = auc_of(cases), _count(cases)
    if own:
        cases = cases_of(by_study(own), None)
        found["study_auc"] = auc_of(cases), _count(cases)
    for one in where_evidence_lies(own, deciding, area):
        if one.stratum == "found":
            found["peak_touches_box"] = one.figures["hit"], f"{one.count} found films with boxes"
    return {
        name: Metric(
            round(told.value, 4),
            _rounded(told.low),
            _rounded(told.high),
            f"{of}; {on}; 95 % bootstrap over patients",
        )
        for name, (told, of) in found.items()
        if told.value is not None
    }


def _count(cases: Cases) -> str:
    return f"{len(cases.labels)} studies, {int(cases.labels.sum())} positive"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
