"""The card of weights: what they are, how they want their input, and how good they were."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, cast, get_args

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, WeightsRefused
from mura_batch.preprocessing import Preprocessing

Target = Literal["abnormal", "fracture"]
Origin = Literal["bundled", "published", "imported", "trained"]
PointName = Literal["balanced", "high_sensitivity", "high_specificity"]

ARCHITECTURE = "densenet121"
ARCHITECTURES = (ARCHITECTURE, "densenet121-lse", "densenet121-transformer")
_DECIDING = (
    "area",
    "target",
    "sha256",
    "architecture",
    "preprocessing",
    "operating_points",
    "calibration",
)
_FORMAT = 1  # of the JSON; another number is another program's card
_MOST_FLIPPED = 0.01  # share of decisions that int8 makes otherwise than f32
_MOST_DIFFERENT = 0.01  # mean absolute difference of a study's probability
_MOST_AUC_LOST = 0.005
_ACTIVATION = (1e-9, 1e6)  # the largest one of a layer in a network that works
_SIZES = (32, 4096)  # pixels of the network's input that DenseNet-121 and a machine can bear


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A decision threshold with what it reached where it was chosen.

    Attributes:
        threshold: 0 to 1; of the calibrated probability where the card has a calibration, of the
            raw sigmoid where it has none. At or above it a study is positive.
        sensitivity, specificity: 0 to 1, or None where nobody measured them.
    """

    name: PointName
    threshold: float
    sensitivity: float | None = None
    specificity: float | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling: the calibrated probability is ``sigmoid(slope · logit + intercept)``.

    Attributes:
        fitted_on: the studies that it was fitted on, in words.
    """

    slope: float
    intercept: float
    fitted_on: str


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured figure.

    Attributes:
        low, high: its 95 % interval, or None where none was computed.
        on: the studies or views that it was measured on, in words.
    """

    value: float
    low: float | None
    high: float | None
    on: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What travels with weights.

    Attributes:
        area: the area that these weights score.
        architecture: of ``ARCHITECTURES``, see :mod:`mura_batch.network`.
        target: what a high probability means.
        sha256: of the safetensors file, 64 hexadecimal digits: the digest of the weights.
        operating_points: ``balanced``, which decides by default, and where they are known
            ``high_sensitivity`` and ``high_specificity``.
        metrics: figures by name, such as ``study_auc``.
        source: the file name or URL that the weights were made from.
        source_sha256: of that file, or empty.
    """

    area: Area
    target: Target
    sha256: str
    operating_points: tuple[OperatingPoint, ...]
    training_data: str
    licence: str
    origin: Origin
    architecture: str = ARCHITECTURE
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    calibration: Calibration | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict, hash=False)
    source: str = ""
    source_sha256: str = ""
    notes: str = ""

    @property
    def short(self) -> str:
        """The first twelve digits of the digest, as people see and type it."""
        return self.sha256[:12]

    @property
    def threshold(self) -> float:
        """The threshold of the balanced operating point."""
        return self.point("balanced").threshold

    def point(self, name: PointName) -> OperatingPoint:
        """Return the operating point ``name``.

        Raises:
            Misconfigured: the card has none of that name.
        """
        for point in self.operating_points:
            if point.name == name:
                return point
        known = ", ".join(point.name for point in self.operating_points)
        raise Misconfigured(
            f"the weights {self.short} of {self.area} state no operating point {name!r}, only"
            f" {known}: set operating_point to one of these, or set a threshold"
        )

    def scores_like(self, other: Card) -> bool:
        """Whether both cards make the same decisions from the same image."""
        return all(getattr(self, name) == getattr(other, name) for name in _DECIDING)

    def to_json(self) -> str:
        """Return the card as JSON text, ASCII, with a newline at its end."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Read what :meth:`to_json` wrote.

        Raises:
            WeightsRefused: says which member is missing, unknown or out of its range.
        """
        members = _Members.read(text, "card")
        card = cls(
            area=Area(members.word("area", tuple(Area))),
            target=cast("Target", members.word("target", get_args(Target))),
            sha256=members.digest("sha256"),
            architecture=members.word("architecture", ARCHITECTURES),
            preprocessing=preprocessing_of(members.take("preprocessing"), "card: preprocessing"),
            operating_points=tuple(map(_point, members.children("operating_points"))),
            calibration=_calibration(members),
            training_data=members.text("training_data"),
            metrics=_metrics(members.child("metrics")),
            licence=members.text("licence"),
            origin=cast("Origin", members.word("origin", get_args(Origin))),
            source=members.text("source"),
            source_sha256=members.digest("source_sha256", empty=True),
            notes=members.text("notes"),
        )
        members.finish()
        names = [point.name for point in card.operating_points]
        if "balanced" not in names or len(set(names)) < len(names):
            raise WeightsRefused("card: operating_points need one balanced, and no name twice")
        return card


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Form:
    """How weights run in int8, and how the result compares with f32 on studies held out of it.

    The weights themselves are rounded from the f32 ones where the network is compiled.

    Attributes:
        sha256: the digest of the weights.
        ranges: the largest input of each convolution that runs in int8, by its name.
        flipped: share of (study, operating point) pairs that are decided otherwise.
        different: mean absolute difference of the studies' probabilities.
        auc_lost: study AUC of f32 less that of int8; None where no labels exist.
        studies: that these figures are of.
        on: what ranges and figures were measured on, in words.
    """

    sha256: str
    ranges: Mapping[str, float] = field(hash=False)
    flipped: float
    different: float
    auc_lost: float | None
    studies: int
    on: str

    @property
    def refusal(self) -> str:
        """Why these weights run in f32; empty where int8 is as good."""
        if not self.flipped <= _MOST_FLIPPED:
            return f"{self.flipped:.2%} of the decisions flip, more than {_MOST_FLIPPED:.0%}"
        if not self.different < _MOST_DIFFERENT:
            return f"probabilities differ by {self.different:.4f}, not less than {_MOST_DIFFERENT}"
        if self.auc_lost is not None and not self.auc_lost < _MOST_AUC_LOST:
            return f"the AUC falls by {self.auc_lost:.4f}, not less than {_MOST_AUC_LOST}"
        return ""

    def words(self) -> str:
        """Return the verdict and its figures in one line."""
        auc = ", AUC not known" if self.auc_lost is None else f", AUC {-self.auc_lost:+.4f}"
        verdict = f"int8 refused: {self.refusal}" if self.refusal else "int8 accepted"
        return (
            f"{verdict} ({self.flipped:.1%} of the decisions flip, probabilities differ by"
            f" {self.different:.4f} in the mean{auc}; {self.studies} studies; {self.on})"
        )

    def to_json(self) -> str:
        """Return it as JSON text, ASCII, with a newline at its end."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Int8Form:
        """Read what :meth:`to_json` wrote.

        Raises:
            WeightsRefused: says which member is missing, unknown or out of its range.
        """
        members = _Members.read(text, "int8 form")
        ranges = members.child("ranges")
        form = cls(
            sha256=members.digest("sha256"),
            ranges={name: ranges.number(name, *_ACTIVATION) for name in ranges.names()},
            flipped=members.number("flipped", 0, 1),
            different=members.number("different", 0, 1),
            auc_lost=members.number_or_none("auc_lost", -1, 1),
            studies=int(members.number("studies", 1)),
            on=members.text("on"),
        )
        members.finish()
        if not form.ranges:
            raise WeightsRefused("int8 form: ranges of no convolution")
        return form


class _Members:
    """The members of one JSON object, each taken once, with its place for messages."""

    def __init__(self, data: object, place: str) -> None:
        if not isinstance(data, dict):
            raise WeightsRefused(f"{place}: must be a JSON object")
        self._left: dict[str, object] = dict(data)
        self._place = place

    @classmethod
    def read(cls, text: str, what: str) -> _Members:
        """Return the members of a JSON text of this program's format; ``what`` it is."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise WeightsRefused(f"the {what} is not JSON: {exc}") from exc
        members = cls(data, what)
        if members.take("format") != _FORMAT:
            raise WeightsRefused(f"the {what} is not of format {_FORMAT}: update mura-batch")
        return members

    def default(self, name: str, value: object) -> None:
        self._left.setdefault(name, value)

    def take(self, name: str) -> object:
        if name not in self._left:
            raise WeightsRefused(f"{self._place}: {name} is missing")
        return self._left.pop(name)

    def finish(self) -> None:
        if self._left:
            raise WeightsRefused(f"{self._place}: unknown {', '.join(sorted(self._left))}")

    def names(self) -> tuple[str, ...]:
        return tuple(self._left)

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise WeightsRefused(f"{self._place}: {name} must be text")
        return value

    def word(self, name: str, words: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in words:
            raise WeightsRefused(f"{self._place}: {name} is none of {', '.join(words)}")
        return value

    def digest(self, name: str, *, empty: bool = False) -> str:
        value = self.text(name)
        if not re.fullmatch(r"[0-9a-f]{64}", value) and not (empty and value == ""):
            raise WeightsRefused(f"{self._place}: {name} must be 64 hexadecimal digits")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        return _number(self.take(name), f"{self._place}: {name}", low, high)

    def number_or_none(
        self, name: str, low: float = -math.inf, high: float = math.inf
    ) -> float | None:
        value = self.take(name)
        return None if value is None else _number(value, f"{self._place}: {name}", low, high)

    def three(self, name: str, low: float, high: float) -> tuple[float, float, float]:
        value = self.take(name)
        place = f"{self._place}: {name}"
        match value:
            case [red, green, blue]:
                return (
                    _number(red, place, low, high),
                    _number(green, place, low, high),
                    _number(blue, place, low, high),
                )
        raise WeightsRefused(f"{place} must be three numbers")

    def child(self, name: str) -> _Members:
        return _Members(self.take(name), f"{self._place}: {name}")

    def children(self, name: str) -> list[_Members]:
        value = self.take(name)
        if not isinstance(value, list):
            raise WeightsRefused(f"{self._place}: {name} must be a list")
        return [_Members(item, f"{self._place}: {name}[{i}]") for i, item in enumerate(value)]


def _number(value: object, place: str, low: float, high: float) -> float:
    """Return a finite float in [low, high]."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and low <= number <= high:
            return number
    raise WeightsRefused(f"{place} must be a number from {low:g} to {high:g}")


def preprocessing_of(told: object, place: str) -> Preprocessing:
    """Return what its JSON says; ``place`` is where that stands, for messages.

    Raises:
        WeightsRefused: says which member is missing, unknown or out of its range.
    """
    members = _Members(told, place)
    members.default("decode", "full")  # cards from before it was thought of
    size = members.number("size", *_SIZES)
    if not size.is_integer():
        raise WeightsRefused(f"{place}: size must be whole pixels")
    spec = Preprocessing(
        size=int(size),
        crop=cast('Literal["none", "foreground"]', members.word("crop", ("none", "foreground"))),
        fit=cast('Literal["squash", "pad"]', members.word("fit", ("squash", "pad"))),
        mean=members.three("mean", 0, 1),
        std=members.three("std", 1e-3, 10),
        decode=cast('Literal["full", "reduced"]', members.word("decode", ("full", "reduced"))),
    )
    members.finish()
    return spec


def _point(members: _Members) -> OperatingPoint:
    point = OperatingPoint(
        cast("PointName", members.word("name", get_args(PointName))),
        members.number("threshold", 0, 1),
        members.number_or_none("sensitivity", 0, 1),
        members.number_or_none("specificity", 0, 1),
    )
    members.finish()
    return point


def _calibration(card: _Members) -> Calibration | None:
    value = card.take("calibration")
    if value is None:
        return None
    members = _Members(value, "card: calibration")
    slope = members.number("slope")
    if slope <= 0:
        raise WeightsRefused("card: calibration: slope must be above 0, or it turns scores round")
    calibration = Calibration(slope, members.number("intercept"), members.text("fitted_on"))
    members.finish()
    return calibration


def _metrics(members: _Members) -> dict[str, Metric]:
    metrics = {}
    for name in members.names():
        figure = members.child(name)
        metrics[name] = Metric(
            figure.number("value"),
            figure.number_or_none("low"),
            figure.number_or_none("high"),
            figure.text("on"),
        )
        figure.finish()
    return metrics
