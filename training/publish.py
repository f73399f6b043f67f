"""A trained network to weights with an honest card for each of the seven areas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from mura_batch.area import Area
from mura_batch.atomic import write_atomic
from mura_batch.network import EvidenceNet
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime import Runtime, load
from mura_batch.weights import sha256_of
from mura_batch.weights_card import Calibration, Card, Metric, OperatingPoint
from training.calibration import POINTS, cross_fitted_rates, fit_calibration, thresholds
from training.dataset import Film
from training.evaluate import FilmScore, by_study, cases_of, score_films
from training.metrics import Cases, Estimate, estimate, roc_auc

_TRAINED_ON = (
    "FracAtlas (Abedeen et al., Scientific Data 10, 521, 2023; CC BY 4.0): {films} films, upper"
    " limb but for fold {held_out}, and legs and hips; one network from random weights for all"
    " areas, no ImageNet weights, {epochs}, the last one taken; computed in {precision}"
)
_NOTES = (
    "Starting weights, not specialists: the same network serves all seven areas. The label is"
    " fracture, not MURA's abnormal. FracAtlas has no finger films of their own and few films of"
    " wrists alone, humeri and shoulders. Calibration and thresholds were fitted on the same"
    " held-back exams (fold 0) that the AUC is of; sensitivity and specificity are cross-fitted"
    " over two halves of them. Not tested on any other hospital's films."
)
_DECODED = (
    " Measured with films decoded at reduced size, as these weights ask; with films decoded in full"
    " the study AUC is {auc:.4f}. Over the {films} films that are large enough to be reduced, those"
    " trained on included, a film's probability differs by {mean:.3f} in the mean and by"
    " {most:.3f} at most."
)


@dataclass(frozen=True, slots=True)
class Published:
    """Where the weights went and what they reached over all areas."""

    file: Path
    auc: Estimate


def publish_bundled(films: Sequence[Film], run: Path, folder: Path) -> Published:
    """Write the run's network in half precision, and a card for each area, into ``folder``.

    What is measured is the network as it ships: rounded to half precision first.
    """
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))
    spec = _preprocessing(told["settings"]["preprocessing"])
    state = torch.load(run / "network.pt", weights_only=True)
    half = {name: t.half().contiguous() for name, t in state.items() if t.is_floating_point()}
    file = folder / "generalist.safetensors"
    write_atomic(file, lambda stream: stream.write(save(half)))

    network = EvidenceNet()
    network.load_state_dict({name: t.float() for name, t in half.items()}, strict=False)
    held_back = [film for film in films if film.split in told["held_out"]]
    runtime = load(network, spec, runtime="torch", device="cpu")
    exams = by_study(score_films(runtime, held_back, spec))
    raw = cases_of(exams, None)
    overall = _auc(raw)
    calibration = _calibration(raw)
    points = thresholds(cases_of(exams, calibration).probabilities, raw.labels)
    notes = _NOTES
    if spec.enough is not None:
        notes += _decoded(runtime, films, held_back, spec, spec.enough)
    rates = cross_fitted_rates(raw)
    for area in Area:
        card = Card(
            area=area,
            target="fracture",
            sha256=sha256_of(file),
            preprocessing=spec,
            operating_points=tuple(
                OperatingPoint(
                    name=name,
                    threshold=round(points[name], 4),
                    sensitivity=_rounded(rates[name][0].value),
                    specificity=_rounded(rates[name][1].value),
                )
                for name in POINTS
            ),
            calibration=calibration,
            training_data=_trained_on(told),
            metrics=_metrics(exams, area),
            licence="MIT; trained on CC BY 4.0 data, attribution above",
            origin="bundled",
            source="training/fit.py",
            notes=notes,
        )
        _write_card(folder / "cards" / f"{area}.json", card)
    return Published(file, overall)


def _decoded(
    runtime: Runtime,
    films: Sequence[Film],
    held_back: Sequence[Film],
    spec: Preprocessing,
    enough: int,
) -> str:
    """Say what decoding at reduced size changes: the AUC, and the probabilities of large films."""
    whole = replace(spec, decode="full")
    large = [film for film in films if _longer_side(film.path) >= 2 * enough]
    reduced, full = (
        cases_of([[one] for one in score_films(runtime, large, how)], None).probabilities
        for how in (spec, whole)
    )
    apart = np.abs(reduced - full)
    return _DECODED.format(
        auc=_auc(cases_of(by_study(score_films(runtime, held_back, whole)), None)).value,
        films=len(large),
        mean=apart.mean(),
        most=apart.max(),
    )


def _longer_side(path: Path) -> int:
    with Image.open(path) as film:
        return max(film.size)


def _trained_on(told: dict[str, Any]) -> str:
    settings = told["settings"]
    epochs = " and ".join(f"{count} epochs at {size} pixels" for size, count in settings["epochs"])
    held_out = " and ".join(told["held_out"])
    return _TRAINED_ON.format(
        films=told["films"], held_out=held_out, epochs=epochs, precision=settings["precision"]
    )


def _calibration(cases: Cases) -> Calibration | None:
    """Return Platt's scaling, or None for a network that orders exams no better than chance."""
    slope, intercept = fit_calibration(cases.logits, cases.labels)
    if slope <= 0:
        return None
    fitted_on = f"{_count(cases)}, all areas, fold 0"
    return Calibration(round(slope, 5), round(intercept, 5), fitted_on)


def _metrics(exams: Sequence[Sequence[FilmScore]], area: Area) -> dict[str, Metric]:
    """Return the AUC over all areas, and over this area's exams where both classes are there."""
    own = [exam for exam in exams if exam[0].film.area == area]
    found = {"study_auc_all_areas": cases_of(exams, None)}
    if own:
        found["study_auc"] = cases_of(own, None)
    estimates = {name: (_auc(cases), cases) for name, cases in found.items()}
    return {
        name: Metric(
            round(told.value, 4),
            _rounded(told.low),
            _rounded(told.high),
            f"{_count(cases)}, held back (fold 0); 95 % bootstrap over exams",
        )
        for name, (told, cases) in estimates.items()
        if told.value is not None
    }


def _auc(cases: Cases) -> Estimate:
    return estimate(lambda w: roc_auc(cases.logits, cases.labels, w), cases.patients)


def _count(cases: Cases) -> str:
    return f"{len(cases.labels)} exams of FracAtlas, {int(cases.labels.sum())} with a fracture"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _preprocessing(data: dict[str, Any]) -> Preprocessing:
    mean, std = tuple(data["mean"]), tuple(data["std"])
    return Preprocessing(**(data | {"mean": mean, "std": std}))


def _write_card(target: Path, card: Card) -> None:
    text = card.to_json().encode()
    write_atomic(target, lambda stream: stream.write(text))
