"""What weights do on labelled films: image and study level, with intervals, and where they look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mura_batch.area import Area
from mura_batch.config import load as load_settings
from mura_batch.errors import Misconfigured
from mura_batch.network_input import Luminance, NetworkInput
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from mura_batch.runtime import Inference, Runtime, load
from mura_batch.scoring import sigmoid
from mura_batch.tensors import Weights
from mura_batch.weights import WeightsStore, load_bundled
from mura_batch.weights_card import Calibration, Card, PointName
from training.dataset import ALL_AREAS, Film
from training.localisation import Localised, localise
from training.metrics import Cases, Estimate, figures, resampled

_BATCH = 16


@dataclass(frozen=True, slots=True)
class FilmScore:
    """What weights said of one film, and where of those that have boxes."""

    film: Film
    logit: float
    localised: Localised | None


@dataclass(frozen=True, slots=True)
class Deciding:
    """How logits become probabilities and decisions.

    Attributes:
        thresholds: by the operating point's name.
    """

    calibration: Calibration | None
    thresholds: Mapping[PointName, float]

    @classmethod
    def of(cls, card: Card) -> Deciding:
        """Return what a card says."""
        points = {point.name: point.threshold for point in card.operating_points}
        return cls(card.calibration, points)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one group of images or studies.

    Attributes:
        level: ``image``, ``study``, or ``box`` for where the evidence lies.
        stratum: ``all``, ``with hardware`` or ``without hardware``; of boxes ``all`` or ``found``,
            those that were decided positive at the balanced point.
        count, positive: of images or studies.
    """

    area: str
    level: str
    stratum: str
    count: int
    positive: int
    figures: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Findings:
    """What :func:`evaluate_areas` found.

    Attributes:
        studies: the study level's cases, by the evaluations' areas.
        cards: of the weights that scored each area.
    """

    evaluations: tuple[Evaluation, ...]
    studies: Mapping[str, Cases]
    scores: tuple[FilmScore, ...]
    cards: Mapping[str, Card]


def evaluate_areas(
    films: Sequence[Film], areas: Sequence[str], home: Path | None, digest: str | None
) -> Findings:
    """Score the films of each area with its weights and measure them; all areas together too,
    where the same weights decide in the same way everywhere.

    The weights are a home's active ones, or those of its store whose digest begins with
    ``digest``, for areas too that they are not stored for; without a home the bundled ones.

    Raises:
        Misconfigured: there are no films of these areas, no such weights, or a film cannot be read.
    """
    of_area = {area: [f for f in films if f.area == area] for area in sorted(set(areas))}
    weights = {area: _weights(Area(area), home, digest) for area, own in of_area.items() if own}
    if not weights:
        raise Misconfigured(f"There are no films of {', '.join(areas)} here.")
    cards = {area: card for area, (_, card) in weights.items()}
    for area, card in cards.items():  # all of them before the first is scored
        check_readable(of_area[area], card.preprocessing)
    scores: dict[str, list[FilmScore]] = {}
    for area, (tensors, card) in weights.items():
        runtime = load(tensors, card.preprocessing)
        scores[area] = score_films(runtime, of_area[area], card.preprocessing)
    groups = dict(scores)
    if len(scores) > 1 and len({_same(card) for card in cards.values()}) == 1:
        groups[ALL_AREAS] = [one for some in scores.values() for one in some]
    any_card = next(iter(cards.values()))
    evaluations: list[Evaluation] = []
    studies: dict[str, Cases] = {}
    for area, some in groups.items():
        card = cards.get(area, any_card)
        evaluations += evaluate(some, Deciding.of(card), area)
        studies[area] = cases_of(by_study(some), card.calibration)
    every = tuple(one for some in scores.values() for one in some)
    return Findings(tuple(evaluations), studies, every, cards)


def _weights(area: Area, home: Path | None, digest: str | None) -> tuple[Weights, Card]:
    if home is None:
        if digest is not None:
            raise Misconfigured("Name the home that has these weights, with --home.")
        return load_bundled(area)
    store = WeightsStore(load_settings(home, {}).weights_dir)
    card = store.require(area) if digest is None else store.find(None, digest)
    own = (one for one in store.cards(area) if one.sha256 == card.sha256)
    card = next(own, card)
    return store.load(card), card


def _same(card: Card) -> tuple[object, ...]:
    """Return all of a card that decides what is said of a film."""
    points = tuple((point.name, point.threshold) for point in card.operating_points)
    return card.sha256, card.preprocessing, card.calibration, points


def score_films(runtime: Runtime, films: Sequence[Film], spec: Preprocessing) -> list[FilmScore]:
    """Score films as the product does.

    Raises:
        Misconfigured: a film cannot be read, or the network gives no number for it.
    """
    scores: list[FilmScore] = []
    for start in tqdm(range(0, len(films), _BATCH), desc="scoring", disable=None):
        some = films[start : start + _BATCH]
        read = [_read(film, spec) for film in some]
        found = Inference.joined(runtime.infer(np.stack([seen.pixels for _, seen in read])))
        for film, (luminance, seen), logit, evidence in zip(
            some, read, found.logits, found.maps, strict=True
        ):
            if not np.isfinite(logit):
                raise Misconfigured(f"{film.where}: {film.name}: these weights say {logit} of it.")
            size = (luminance.shape[0], luminance.shape[1])
            where = localise(evidence, film.boxes, seen.box, size) if film.boxes else None
            scores.append(FilmScore(film, float(logit), where))
    return scores


def check_readable(films: Sequence[Film], spec: Preprocessing) -> None:
    """Read films that are scored after hours, to know now that they can be read.

    Raises:
        Misconfigured: one cannot.
    """
    for film in tqdm(films, desc="reading", disable=None):
        _read(film, spec)


def _read(film: Film, spec: Preprocessing) -> tuple[Luminance, NetworkInput]:
    with film.named():
        return read_film(film.path, film.frame, spec)


def evaluate(scores: Sequence[FilmScore], deciding: Deciding, area: str) -> list[Evaluation]:
    """Return the figures of films that are decided alike: both levels, strata, and where.

    ``area`` is the group's name.
    """
    found: list[Evaluation] = []
    for level, groups in (("image", [[one] for one in scores]), ("study", by_study(scores))):
        cases = cases_of(groups, deciding.calibration)
        for stratum, chosen in _strata(groups).items():
            some = cases.only(chosen)
            count, positive = len(some.labels), int(some.labels.sum())
            told = figures(some, deciding.thresholds)
            found.append(Evaluation(area, level, stratum, count, positive, told))
    return [*found, *where_evidence_lies(scores, deciding, area)]


def _strata(groups: Sequence[Sequence[FilmScore]]) -> dict[str, NDArray[np.bool_]]:
    """Return which groups are in each stratum; those of nobody knows what, and all, in ``all``."""
    told = [{one.film.hardware for one in group} for group in groups]
    strata = {
        "all": np.ones(len(groups), bool),
        "with hardware": np.array([True in words for words in told]),
        "without hardware": np.array([words == {False} for words in told]),
    }
    return {name: chosen for name, chosen in strata.items() if name == "all" or chosen.any()}


def where_evidence_lies(
    scores: Sequence[FilmScore], deciding: Deciding, area: str
) -> Iterator[Evaluation]:
    """Yield how the evidence lies to the boxes of the films that have some."""
    boxed = [one for one in scores if one.localised is not None]
    if not boxed:
        return
    cases = cases_of([[one] for one in boxed], deciding.calibration)
    found = cases.probabilities >= deciding.thresholds["balanced"]
    for stratum, chosen in (("all", np.ones(len(boxed), bool)), ("found", found)):
        told = {
            name: resampled(
                np.array([float(getattr(one.localised, name)) for one in boxed]),
                cases.patients,
                chosen,
            )
            for name in ("hit", "chance", "energy", "overlap")
        }
        count = int(chosen.sum())
        yield Evaluation(area, "box", stratum, count, count, told)


def cases_of(groups: Sequence[Sequence[FilmScore]], calibration: Calibration | None) -> Cases:
    """Return a case a group of films: its mean logit, and positive where any film is.

    Its probability is what the product concludes: calibrated from the mean logit, without a
    calibration the mean of the films' sigmoids.
    """
    logits = np.array([np.mean([one.logit for one in group]) for group in groups])
    if calibration is None:
        told = [sum(sigmoid(one.logit) for one in group) / len(group) for group in groups]
    else:
        told = [sigmoid(calibration.slope * x + calibration.intercept) for x in logits.tolist()]
    return Cases(
        logits,
        np.array(told, np.float64),
        np.array([max(one.film.label for one in group) for group in groups], np.int64),
        tuple(group[0].film.patient for group in groups),
    )


def both_labels(groups: Iterable[Sequence[FilmScore]]) -> bool:
    """Say whether there are groups of films with the target, and without."""
    return {max(one.film.label for one in group) for group in groups} == {0, 1}


def by_study(scores: Sequence[FilmScore]) -> list[list[FilmScore]]:
    """Return the films that are scored together: those of one study and area."""
    groups: defaultdict[tuple[str, str], list[FilmScore]] = defaultdict(list)
    for one in scores:
        groups[one.film.study, one.film.area].append(one)
    return list(groups.values())
