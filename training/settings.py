"""What a training run is made of, and the settings for each way of beginning one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mura_batch.preprocessing import Preprocessing
from mura_batch.weights_card import ARCHITECTURE

Phase = Literal["head", "all"]
Imbalance = Literal["mura", "balanced", "none"]
Precision = Literal["f32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class Stage:
    """Epochs of one input size.

    Attributes:
        size: side of the network's input in pixels, a multiple of 32.
        crops: of parts of the films at the scale of whole ones: they show the same detail at a
            fraction of the cost, and a part of a film with boxes that shows none is a negative.
            Films without boxes stay whole.
        frozen: dense blocks, from the input on, that stay as they are: they are the most costly
            to train, and see on whole films what they saw on crops.
    """

    size: int
    epochs: int
    crops: bool = False
    frozen: int = 0


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What a run is made of; the same settings, data and start repeat it.

    Attributes:
        architecture: of :data:`mura_batch.weights_card.ARCHITECTURES`.
        head_epochs: of phase one, in which only the classifier learns, at ``head_rate``.
        stages: of phase two, one after the other: small inputs cost a fraction of the time, the
            last stage has the size that scoring uses.
        rate: of the classifier in phase two; each block below learns at ``block_decay`` of the
            rate of the one above.
        imbalance: ``mura`` weighs each class by the other's share, as the MURA paper does;
            ``balanced`` draws both equally often.
        augmentation: see :func:`training.loader.augmentation`.
        average: decay of the moving average of the weights, which is what is measured and kept.
        patience: epochs of the last stage without a better study AUC on the patients kept aside
            (``aside``, a share of them) before the run stops; its best epoch is taken. None keeps
            nobody aside, runs all epochs and takes the last.
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
    inside: float = 0.0
    steady: float = 0.0
    joint: float = 0.0
    precision: Precision = "f32"
    batch: int = 16
    seed: int = 20


LIMB = Preprocessing(size=320, crop="foreground", fit="pad", decode="reduced")

# Whole films from a trunk, crops of them first: small fractures are 20 pixels wide in them.
LIMB_FILMS = FitSettings(
    LIMB,
    head_epochs=1,
    stages=(Stage(128, 8, crops=True), Stage(320, 4, frozen=2)),
    rate=5e-4,
    block_decay=0.9,
    imbalance="balanced",
    patience=None,
    inside=0.3,
)

# The whole way from nothing, without a trunk.
FROM_NOTHING = replace(
    LIMB_FILMS,
    head_epochs=0,
    stages=(Stage(128, 16, crops=True), Stage(320, 4, frozen=2)),
    rate=1e-3,
    block_decay=1.0,
)

# A trunk: crops alone, because most films are wide and a fracture small.
TRUNK = replace(FROM_NOTHING, stages=(Stage(128, 12, crops=True),), inside=0.2, joint=0.3, batch=32)


def two_phases(spec: Preprocessing, architecture: str) -> FitSettings:
    """Return the default settings for weights of this kind that see films so."""
    return FitSettings(spec, architecture, stages=(Stage(spec.size, 20),))


def settings_of(told: Mapping[str, Any]) -> FitSettings:
    """Return settings from their JSON; KeyError or TypeError where it is not theirs."""
    spec = told["preprocessing"]
    channels = {name: tuple(spec[name]) for name in ("mean", "std")}
    return FitSettings(
        **{
            **told,
            "preprocessing": Preprocessing(**{**spec, **channels}),
            "stages": tuple(Stage(**stage) for stage in told["stages"]),
        }
    )
