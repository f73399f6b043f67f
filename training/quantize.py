"""The int8 form of weights: ranges from some films, and what int8 costs on the studies of others.

Post-training quantization with one range for the inputs of each convolution, and a step for each
of its output channels. NNCF, OpenVINO's tool for it, by default also rounds what is concatenated
in dense blocks, the first convolution and the classifier: on the bundled weights probabilities
then differ by 0.08 in the mean. Told to leave these, it finds the ranges that are taken here
(difference 0.002 both times).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from mura_batch.network import EvidenceNet, network_with
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from mura_batch.runtime.quantization import activation_ranges
from mura_batch.study import peek
from mura_batch.weights import Card, Int8Form, WeightsStore
from training.dataset import Film
from training.evaluate import FilmScore, by_study, cases_of, score_films
from training.metrics import roc_auc
from training.sources import is_known, read

_CALIBRATING = 64  # films
_CHECKED = 600  # films at most
_FEWEST = 34  # studies, with three points each: one flip is less than one in a hundred
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """Films to measure on.

    Attributes:
        labelled: their labels are known; else they are all 0 and mean nothing.
    """

    films: tuple[Film, ...]
    labelled: bool
    name: str


def sample_of(path: Path, labels: Path | None, area: Area) -> Sample:
    """Return labelled films as :func:`training.sources.read` finds them, else all images of a
    folder as films of ``area`` without a label.

    Raises:
        Misconfigured: they are contradictory, or there are none.
    """
    if labels is None and path.is_dir() and not is_known(path):
        return Sample(tuple(_films_in(path, area)), labelled=False, name=path.resolve().name)
    return Sample(read(path, labels).checked().films, labelled=True, name=path.resolve().name)


def _films_in(folder: Path, area: Area) -> Iterator[Film]:
    """Yield the images below a folder; those of one DICOM study or one subfolder are a study."""
    for file in sorted(folder.rglob("[!.]*")):
        if file.is_file() and (seen := peek(file)).kind != "other":
            place = file if file.parent == folder else file.parent
            study = seen.study_uid or place.relative_to(folder).as_posix()
            yield Film(file, study, study, area, 0, where=str(file))


def quantize(store: WeightsStore, card: Card, sample: Sample) -> Int8Form:
    """Measure the int8 form of stored weights, over all areas that use them.

    Raises:
        Misconfigured: the films are too few, cannot be read, or OpenVINO is not there or cannot run
            these weights.
        WeightsRefused: the weights are damaged.
    """
    try:
        from mura_batch.runtime.compiled import compiled  # noqa: PLC0415 - an extra
    except ImportError as exc:
        raise Misconfigured("int8 needs OpenVINO: pip install 'mura-batch[openvino]'.") from exc
    weights, spec = store.load(card), card.preprocessing
    network = network_with(weights)
    if not isinstance(network, EvidenceNet):
        raise Misconfigured("OpenVINO cannot run a hybrid network, so it has no int8 form.")
    cards = {str(one.area): one for one in store.cards() if one.sha256 == card.sha256}
    calibrating, checked = _split(
        [film for film in sample.films if film.area in cards], sample.name
    )
    ranges = activation_ranges(network, spec, _batches(calibrating, spec))
    exact, quick = (
        _Said.of(score_films(compiled(weights, spec, how), checked, spec), cards)
        for how in ({}, ranges)
    )
    known = sample.labelled and len(set(exact.labels.tolist())) > 1
    return Int8Form(
        sha256=card.sha256,
        ranges={name: round(value, 5) for name, value in ranges.items()},
        flipped=float(np.mean(exact.decisions != quick.decisions)),
        different=float(np.abs(exact.probabilities - quick.probabilities).mean()),
        auc_lost=exact.auc() - quick.auc() if known else None,
        studies=len(exact.labels),
        on=f"ranges of {len(calibrating)} films of {sample.name}, the figures of other patients'",
    )


def _split(films: Sequence[Film], name: str) -> tuple[list[Film], list[Film]]:
    """Return films to take ranges from, and films of other patients to check them on.

    Raises:
        Misconfigured: the studies are too few.
    """
    patients: defaultdict[str, list[Film]] = defaultdict(list)
    for film in films:
        patients[film.patient].append(film)
    calibrating: list[Film] = []
    checked: list[Film] = []
    for patient in sorted(patients, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(calibrating) < _CALIBRATING:
            calibrating += patients[patient]
        elif len(checked) < _CHECKED:
            checked += patients[patient]
    if len({(film.study, film.area) for film in checked}) < _FEWEST:
        raise Misconfigured(
            f"{name}: {len(films)} films of {len(patients)} patients of these weights' areas are"
            f" too few: {_CALIBRATING} films give the ranges, {_FEWEST} studies of other patients"
            " say what int8 costs."
        )
    return calibrating, checked


def _batches(films: Sequence[Film], spec: Preprocessing) -> Iterator[NDArray[np.uint8]]:
    for start in tqdm(range(0, len(films), _BATCH), desc="ranges", disable=None):
        some = []
        for film in films[start : start + _BATCH]:
            with film.named():
                some.append(read_film(film.path, film.frame, spec)[1].pixels)
        yield np.stack(some)


@dataclass(frozen=True, slots=True)
class _Said:
    """What a form of weights says of studies, each with the card of its area.

    Attributes:
        decisions: of all studies at all operating points.
    """

    probabilities: NDArray[np.float64]
    decisions: NDArray[np.bool_]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, scores: Sequence[FilmScore], cards: Mapping[str, Card]) -> _Said:
        cases = {
            area: cases_of(by_study([s for s in scores if s.film.area == area]), card.calibration)
            for area, card in cards.items()
            if any(s.film.area == area for s in scores)
        }
        return cls(
            np.concatenate([some.probabilities for some in cases.values()]),
            np.concatenate(
                [
                    some.probabilities >= point.threshold
                    for area, some in cases.items()
                    for point in cards[area].operating_points
                ]
            ),
            np.concatenate([some.labels for some in cases.values()]),
        )

    def auc(self) -> float:
        """Return the area under the ROC curve of all probabilities."""
        return float(roc_auc(self.probabilities, self.labels, np.ones((1, len(self.labels))))[0])
