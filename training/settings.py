"""What a training run is made of, and the settings for each way of beginning one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from mura_batch.errors import Misconfigured
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights_card import ARCHITECTURE, ARCHITECTURES, preprocessing_of

Phase = Literal["head", "all"]
Imbalance = Literal["mura", "balanced", "none"]
Precision = Literal["f32", "bf16", "fp16"]

CELL = 32  # input pixels a side of a cell of DenseNet's last map
_MOST_EPOCHS = 10_000
FROZEN = 3  # dense blocks at most: above the last there is the head alone
_STRONGEST = 2.0  # augmentation: twice as much as published
_WORDS = {
    "architecture": ARCHITECTURES,
    "imbalance": get_args(Imbalance),
    "precision": get_args(Precision),
    "swa": (True, False),
}
_INTEGERS = {"head_epochs": (0, _MOST_EPOCHS), "batch": (2, math.inf), "seed": (0, 2**32 - 1)}
_NUMBERS = {
    "head_rate": (0, 1),
    "rate": (0, 1),
    "block_decay": (0, 1),
    "weight_decay": (0, 10),
    "augmentation": (0, _STRONGEST),
    "average": (0, 1),
    "aside": (0.01, 0.5),
    "inside": (0, 100),
    "steady": (0, 100),
    "joint": (0, 100),
}


def _whole(value: object, low: float, high: float) -> bool:
    return isinstance(value, int) and low <= value <= high


@dataclass(frozen=True, slots=True)
class Stage:
    """Epochs of one input size.

    Raises:
        ValueError: saying what cannot be.

    Attributes:
        size: side of the network's input in pixels, a multiple of 32.
        crops: of parts of the films at the scale of whole ones: they show the same detail at a
            fraction of the cost, and a part of a film with boxes that shows none is a negative.
            Where most positive films have no boxes, all films stay whole.
        frozen: dense blocks, from the input on, that stay as they are: they are the most costly
            to train, and see on whole films what they saw on crops.
        inside: weight of the evidence's energy inside the boxes in this stage; None: the run's.
    """

    size: int
    epochs: int
    crops: bool = False
    frozen: int = 0
    inside: float | None = None

    def __post_init__(self) -> None:
        if not (_whole(self.size, CELL, math.inf) and self.size % CELL == 0):
            raise ValueError(f"a stage's size of {self.size!r} is no multiple of {CELL}")
        if not (_whole(self.epochs, 1, _MOST_EPOCHS) and _whole(self.frozen, 0, FROZEN)):
            raise ValueError(
                f"a stage of {self.epochs!r} epochs with {self.frozen!r} frozen blocks:"
                f" 1 to {_MOST_EPOCHS}, and 0 to {FROZEN}"
            )
        if self.crops not in (True, False):
            raise ValueError(f"crops {self.crops!r} of a stage is neither true nor false")
        low, high = _NUMBERS["inside"]
        if not (self.inside is None or low <= self.inside <= high):
            raise ValueError(f"inside {self.inside!r} of a stage is no number from {low} to {high}")

    def words(self) -> str:
        """Return what it is, such as ``3 epochs of films of 320, 2 blocks frozen``."""
        what = "crops" if self.crops else "films"
        frozen = f", {_counted(self.frozen, 'block')} frozen" if self.frozen else ""
        inside = f", weight inside boxes {self.inside:g}" if self.inside is not None else ""
        return f"{_counted(self.epochs, 'epoch')} of {what} of {self.size}{frozen}{inside}"


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What a run is made of; the same settings, data and start repeat it.

    Raises:
        ValueError: saying what cannot be.

    Attributes:
        architecture: of :data:`mura_batch.weights_card.ARCHITECTURES`.
        head_epochs: of phase one, in which only the classifier learns, at ``head_rate``.
        stages: of phase two, one after the other: small inputs cost a fraction of the time, the
            last stage has the size that scoring uses.
        rate: of the classifier at each stage's height, from which it falls to 0; each block below
            learns at ``block_decay`` of the rate of the one above.
        imbalance: ``mura`` weighs each class by the other's share, as the MURA paper does;
            ``balanced`` draws both equally often.
        augmentation: see :func:`training.loader.augmentation`.
        average: decay of the moving average of the weights, which is what is measured and kept.
        patience: epochs of the last stage without a better study AUC on the patients kept aside
            (``aside``, a share of them) before the run stops; its best epoch is taken. None keeps
            nobody aside, runs all epochs and takes the last.
        swa: without patience, take the mean of the networks that the stages of the last size end
            with (stochastic weight averaging, P. Izmailov et al. 2018) instead of the last one.
        inside: weight of the evidence's energy inside the boxes in the loss.
        steady: weight of the evidence's steadiness under mirroring and shifting in the loss.
        joint: weight of telling region and view in the loss.
        precision: of forward and backward pass (autocast).
    """

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    architecture: str = ARCHITECTURE
    head_epochs: int = 2
    head_rate: float = 1e-3
    stages: tuple[Stage, ...] = (Stage(224, 20),)
    rate: float = 3e-4
    block_decay: float = 0.7
    weight_decay: float = 0.05
    imbalance: Imbalance = "mura"
    augmentation: float = 1.0
    average: float = 0.99
    patience: int | None = 5
    aside: float = 0.15
    swa: bool = False
    inside: float = 0.0
    steady: float = 0.0
    joint: float = 0.0
    precision: Precision = "f32"
    batch: int = 16
    seed: int = 20

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if (value := getattr(self, name)) not in words:
                raise ValueError(f"{name} {value!r} is none of {', '.join(map(str, words))}")
        for name, (low, high) in _INTEGERS.items():
            if not _whole(value := getattr(self, name), low, high):
                raise ValueError(f"{name} {value!r} is no whole number from {low} to {high}")
        for name, (least, most) in _NUMBERS.items():
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and least <= value <= most):
                raise ValueError(f"{name} {value!r} is no number from {least} to {most}")
        if not (self.patience is None or _whole(self.patience, 1, _MOST_EPOCHS)):
            raise ValueError(f"patience {self.patience!r} is neither none nor 1 to {_MOST_EPOCHS}")
        if not self.stages:
            raise ValueError("there is no stage")
        last = self.stages[-1]
        if not last.crops and last.size != self.preprocessing.size:
            raise ValueError(
                f"the last stage of whole films has size {last.size}, scoring"
                f" {self.preprocessing.size}"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """After how many epochs the networks stand whose mean is taken; none if none is."""
        if not self.swa or self.patience is not None:
            return ()
        done = itertools.accumulate(stage.epochs for stage in self.stages)
        ended = zip(done, self.stages, strict=True)
        size = self.stages[-1].size
        return tuple(self.head_epochs + n for n, stage in ended if stage.size == size)

    def course(self) -> str:
        """Return which epochs there are, and what is taken in the end."""
        head = _counted(self.head_epochs, "epoch")
        phases = [f"{head} of the head alone"] if self.head_epochs else []
        phases += [stage.words() for stage in self.stages]
        ends = ", ".join(map(str, self.ends))
        mean = f"; the mean of the networks after epochs {ends}" if ends else ""
        return ", then ".join(phases) + mean

    def words(self) -> str:
        """Return what the run does, in one line."""
        aside = "nobody" if self.patience is None else f"{self.aside:.0%} of the patients"
        return (
            f"{self.architecture}: {self.course()}; rate {self.rate:g}, classes {self.imbalance},"
            f" batches of {self.batch}, {self.precision}, {aside} kept aside to choose the epoch by"
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


LIMB = Preprocessing(size=320, crop="foreground", fit="pad", decode="reduced")

# Whole films from a trunk, crops of them first: small fractures are 20 pixels wide in them. Then
# more of both, in the end with more weight on where the evidence lies, and the mean of what the
# stages of whole films end with.
LIMB_FILMS = FitSettings(
    LIMB,
    "densenet121-lse",
    head_epochs=0,
    stages=(
        Stage(96, 20, crops=True),
        Stage(320, 3, frozen=2),
        Stage(96, 5, crops=True),
        Stage(320, 2, frozen=2),
        Stage(320, 2, frozen=2, inside=3.0),
    ),
    rate=5e-4,
    block_decay=0.9,
    imbalance="balanced",
    patience=None,
    swa=True,
    inside=1.0,
)

# The whole way from nothing, without a trunk.
FROM_NOTHING = replace(LIMB_FILMS, rate=1e-3, block_decay=1.0)

# A trunk: crops alone, because most films are wide and a fracture small.
TRUNK = replace(
    FROM_NOTHING,
    stages=(Stage(96, 10, crops=True),),
    swa=False,
    inside=0.3,
    joint=0.3,
    batch=32,
)


def two_phases(spec: Preprocessing, architecture: str) -> FitSettings:
    """Return the default settings for weights of this kind that see films so.

    Raises:
        Misconfigured: training cannot go on from weights that see films at such a size.
    """
    if spec.size % CELL:
        raise Misconfigured(
            f"These weights see films at {spec.size} pixels; training needs a multiple of {CELL}:"
            " begin with others."
        )
    return FitSettings(spec, architecture, stages=(Stage(spec.size, 20),))


def settings_of(told: Mapping[str, Any]) -> FitSettings:
    """Return settings from their JSON; KeyError, TypeError or ValueError where it is not theirs.

    Raises:
        WeightsRefused: its preprocessing is none.
    """
    return FitSettings(
        **{
            **told,
            "preprocessing": preprocessing_of(told["preprocessing"], "settings: preprocessing"),
            "stages": tuple(Stage(**stage) for stage in told["stages"]),
        }
    )
