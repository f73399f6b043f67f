"""Two-phase fine-tuning: first the head on a frozen trunk, then everything.

A run folder holds all that repeats a run and all that resumes it: ``run.json`` (settings, data
digest, versions), ``state.pt`` (after each epoch), ``best.pt``, ``log.csv``, TensorBoard's events,
and at the end ``network.pt``; prepared films are kept in ``films`` beside it. A run that was cut
off goes on after its last whole epoch, on a CPU with as many threads to the same network bit by
bit.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import pickle
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured, Transient
from mura_batch.network import EvidenceNet, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.torch_runtime import find_device
from mura_batch.weights import sha256_of
from training.dataset import Dataset, Film
from training.loader import Drawn, prepared
from training.metrics import roc_auc

Phase = Literal["head", "all"]
_LOOK = 100  # steps between two looks at the loss


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What a run is made of; the same settings, data and start repeat it.

    Attributes:
        head_epochs: of phase one, in which only the classifier learns, at ``head_rate``.
        epochs: of phase two as (input size, epochs), one after the other: small inputs cost a
            fraction of the time, the last ones have the size that scoring uses.
        rate: of the classifier in phase two; each block below learns at ``block_decay`` of the
            rate of the one above.
        imbalance: ``mura`` weighs each class by the other's share, as the MURA paper does;
            ``balanced`` draws both equally often.
        augmentation: see :func:`training.loader.augmentation`.
        average: decay of the moving average of the weights, which is what is measured and kept.
        patience: epochs of the last size without a better study AUC on the patients kept aside
            (``aside``, a share of them) before the run stops; its best epoch is taken. None keeps
            nobody aside, runs all epochs and takes the last.
        precision: of forward and backward pass (autocast).
    """

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    head_epochs: int = 2
    head_rate: float = 1e-3
    epochs: tuple[tuple[int, int], ...] = ((224, 20),)
    rate: float = 3e-4
    block_decay: float = 0.7
    weight_decay: float = 0.05
    imbalance: Literal["mura", "balanced", "none"] = "mura"
    augmentation: float = 1.0
    average: float = 0.99
    patience: int | None = 5
    aside: float = 0.15
    precision: Literal["f32", "bf16", "fp16"] = "f32"
    batch: int = 16
    seed: int = 20


# How the bundled generalist was made: from nothing, no epoch chosen, one network for all areas.
FROM_NOTHING = FitSettings(
    Preprocessing(size=224, crop="foreground", fit="pad", decode="reduced"),
    head_epochs=0,
    epochs=((128, 12), (160, 8), (224, 4)),
    rate=1e-3,
    block_decay=1.0,
    imbalance="none",
    average=0.0,
    patience=None,
)


def fit(
    data: Dataset,
    run: Path,
    settings: FitSettings,
    *,
    held_out: Collection[str] = (),
    start: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    workers: int = 2,
    stop_after: int | None = None,
) -> None:
    """Train on the films outside the splits ``held_out`` and leave ``run/network.pt``.

    ``start`` is the state to begin with, None for random weights. Where ``run`` holds a run that
    was cut off, that goes on; ``stop_after`` epochs cuts it off on purpose.

    Raises:
        Misconfigured: the data has problems or one label only, a film cannot be read, the device
            is not here, the folder holds another run, or the loss is no number.
        Transient: the disk is full.
    """
    device = find_device(device)
    sides = divide(data.checked().has_splits(held_out).films, held_out, settings)
    inputs = _prepare(sides, settings.preprocessing, run.parent / "films")
    torch.use_deterministic_algorithms(device == "cpu")
    torch.manual_seed(settings.seed)
    network = EvidenceNet()
    if start is not None:
        network.load_state_dict(start, strict=False)
    _describe(run, settings, sides, held_out, _digest(network.state_dict()))
    if (run / "network.pt").exists():
        return
    trainer = _Trainer(network.to(device), settings, sides, inputs, run=run, workers=workers)
    trainer.train(stop_after)


class Sides(NamedTuple):
    """The films that are trained on, and those that the epoch is chosen by."""

    train: tuple[Film, ...]
    aside: tuple[Film, ...]


class _Inputs(NamedTuple):
    """Files of both sides' films; None where nobody is kept aside."""

    train: Path
    aside: Path | None


def _prepare(sides: Sides, spec: Preprocessing, cache: Path) -> _Inputs:
    return _Inputs(
        prepared(sides.train, spec, cache, headroom=True),
        prepared(sides.aside, spec, cache) if sides.aside else None,
    )


def divide(films: Sequence[Film], held_out: Collection[str], settings: FitSettings) -> Sides:
    """Return the two sides; no patient stands on both.

    Raises:
        Misconfigured: one of them would have one label only, or no batch of films.
    """
    kept = np.array([film for film in films if film.split not in held_out], object)
    labels = np.array([film.label for film in kept], int)
    aside = np.zeros(len(kept), bool)
    if settings.patience is not None:
        patients = [film.patient for film in kept]
        parts = max(2, round(1 / settings.aside))
        fewest = min(len({f.patient for f in kept if f.label == label}) for label in (0, 1))
        if fewest < parts:
            raise Misconfigured(
                f"{fewest} patients of one label are too few to keep one in {parts} aside: give"
                " more films."
            )
        folds = StratifiedGroupKFold(parts, shuffle=True, random_state=settings.seed)
        aside[next(folds.split(kept, labels, patients))[1]] = True
    for side, purpose in ((~aside, "train on"), (aside, "choose the epoch by")):
        if (side.any() and len(set(labels[side])) < 2) or not (~aside).any():  # noqa: PLR2004 - both
            raise Misconfigured(f"The films to {purpose} do not have both labels: give more films.")
    if (~aside).sum() < settings.batch:
        raise Misconfigured(
            f"{(~aside).sum()} films to train on are less than a batch of {settings.batch}: give"
            " more films."
        )
    return Sides(tuple(kept[~aside]), tuple(kept[aside]))


class _Epoch(NamedTuple):
    phase: Phase
    size: int


class _Trainer:
    """A network on its way through its epochs."""

    def __init__(
        self,
        network: EvidenceNet,
        settings: FitSettings,
        sides: Sides,
        inputs: _Inputs,
        *,
        run: Path,
        workers: int,
    ) -> None:
        self._network = network.to(memory_format=torch.channels_last)
        self._settings = settings
        self._run = run
        self._workers = workers
        self._device = next(network.parameters()).device
        average = get_ema_multi_avg_fn(settings.average)  # type: ignore[no-untyped-call]
        self._average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        self._drawn = Drawn(inputs.train, settings.augmentation, settings.seed)
        self._labels = np.array([film.label for film in sides.train])
        self._weights = film_weights(sides.train, settings.imbalance)
        self._aside, self._seen = sides.aside, inputs.aside
        self._plan = [_Epoch("head", settings.epochs[0][0])] * settings.head_epochs
        self._plan += [_Epoch("all", size) for size, count in settings.epochs for _ in range(count)]
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=settings.precision == "fp16")
        self._history: list[dict[str, float]] = []
        self._begin(self._plan[0].phase)

    def train(self, stop_after: int | None) -> None:
        """Go on to the end, or to the epoch ``stop_after``."""
        self._resume()
        with SummaryWriter(self._run, purge_step=len(self._history) + 1) as board:
            while not self._ended() and len(self._history) != stop_after:
                told = self._epoch(len(self._history))
                for name, value in told.items():
                    board.add_scalar(name, value, len(self._history))
        if self._ended():
            best = self._run / "best.pt"
            state = torch.load(best, weights_only=True) if self._aside else self._state()
            _save(state, self._run / "network.pt")

    def _ended(self) -> bool:
        """Whether all epochs are over, or too many have brought nothing better."""
        patience, done, best = self._settings.patience, len(self._history), self._best()
        if done == len(self._plan) or patience is None or best is None:
            return done == len(self._plan)
        return done - 1 - best >= patience

    def _best(self) -> int | None:
        """Return the first of the epochs with the highest study AUC, of those of the last size."""
        if not self._aside:
            return None
        size = self._settings.preprocessing.size
        measured = [
            number
            for number, (epoch, _) in enumerate(zip(self._plan, self._history, strict=False))
            if epoch == _Epoch("all", size)
        ]
        return max(measured, key=lambda n: self._history[n]["study_auc"], default=None)

    def _epoch(self, number: int) -> dict[str, float]:
        """Train one epoch, measure it, and keep what resumes it; return its figures."""
        phase, size = self._plan[number]
        if phase != self._phase:
            self._begin(phase)
        rate = float(self._schedule.get_last_lr()[0])
        told = {"loss": self._pass(number, size), "rate": rate}
        if self._aside:
            told["study_auc"] = self._study_auc()
        self._history.append(told)
        if self._best() == number:
            _save(self._state(), self._run / "best.pt")
        _write_log(self._run / "log.csv", self._history)
        _save(self._everything(), self._run / "state.pt")
        return told

    def _begin(self, phase: Phase) -> None:
        """Make the phase's optimiser and schedule."""
        self._phase = phase
        self._network.features.requires_grad_(phase == "all")
        self._optimiser = torch.optim.AdamW(parameter_groups(self._network, self._settings, phase))
        epochs = sum(epoch.phase == phase for epoch in self._plan)
        steps = epochs * (len(self._labels) // self._settings.batch)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, warm_cosine(steps))

    def _pass(self, number: int, size: int) -> float:
        """Train on every film once, drawn anew; return the mean loss."""
        self._network.train()
        if self._phase == "head":
            self._network.features.eval()  # its normalisation stays as it was learned
        order = self._order(np.random.default_rng([self._settings.seed, number]))
        self._drawn.begin(number, size)
        loader = DataLoader(
            self._drawn,
            self._settings.batch,
            sampler=order,
            drop_last=True,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
        )
        name = f"epoch {number + 1} of {len(self._plan)}"
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for step, films in enumerate(tqdm(loader, desc=name, disable=None), start=1):
            some = order[(step - 1) * self._settings.batch : step * self._settings.batch]
            total += self._step(films, some)
            if step % _LOOK == 0 or step == len(loader):  # to look waits for the device
                _finite(float(total), name)
        return float(total) / len(loader)

    def _step(self, films: Tensor, numbers: Sequence[int]) -> Tensor:
        labels = torch.from_numpy(self._labels[numbers]).to(self._device, torch.float32)
        weights = torch.from_numpy(self._weights[numbers]).to(self._device, torch.float32)
        with self._autocast():
            logits = self._network(self._input(films)).logit
        loss = functional.binary_cross_entropy_with_logits(logits.float(), labels, weights)
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(self._scaler.scale(loss))
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._schedule.step()
        self._average.update_parameters(self._network)
        return loss.detach()

    def _order(self, rng: np.random.Generator) -> list[int]:
        """Return the films of an epoch in the order in which they are drawn."""
        chosen = np.arange(len(self._labels))
        if self._settings.imbalance == "balanced":
            sides = (np.flatnonzero(self._labels == label) for label in (0, 1))
            chosen = np.concatenate([rng.choice(side, len(chosen) // 2) for side in sides])
        order: list[int] = rng.permutation(chosen).tolist()
        return order

    def _input(self, films: Tensor) -> Tensor:
        spec = self._settings.preprocessing
        images = normalise(films.to(self._device, non_blocking=True), spec.mean, spec.std)
        return images.contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        kind = torch.float16 if self._settings.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device.type, kind, enabled=self._settings.precision != "f32")

    @torch.inference_mode()
    def _study_auc(self) -> float:
        """Measure the average network on the patients kept aside."""
        network = self._average.module.eval()
        pixels = np.load(self._seen or "", mmap_mode="r")
        logits: list[float] = []
        for start in range(0, len(pixels), self._settings.batch):
            films = torch.from_numpy(np.array(pixels[start : start + self._settings.batch]))
            with self._autocast():
                logits += network(self._input(films)).logit.float().tolist()
        return study_auc(self._aside, logits)

    def _state(self) -> dict[str, Tensor]:
        """Return the average network's state."""
        state: dict[str, Tensor] = self._average.module.state_dict()
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def _everything(self) -> dict[str, Any]:
        return {
            "network": self._network.state_dict(),
            "average": self._average.state_dict(),
            "phase": self._phase,
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "history": self._history,
        }

    def _resume(self) -> None:
        file = self._run / "state.pt"
        if not file.exists():
            return
        try:
            state = torch.load(file, weights_only=True, map_location=self._device)
        except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as exc:
            raise Misconfigured(f"{file} is damaged: remove it to begin this run again.") from exc
        self._network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        self._begin(state["phase"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self._history = state["history"]


def _finite(loss: float, name: str) -> None:
    if not math.isfinite(loss):
        raise Misconfigured(
            f"The loss is {loss} in {name}: try a smaller rate, or precision f32. Nothing was"
            " replaced."
        )


# ---- the method's parts


def film_weights(films: Sequence[Film], imbalance: str) -> NDArray[np.float64]:
    """Return how much each film's loss counts.

    With ``mura``, of N negative and A positive films, positives count N / (A + N) and negatives
    A / (A + N), as in the MURA paper.
    """
    own = np.array([film.weight for film in films])
    if imbalance != "mura":
        return own
    positive = np.array([film.label for film in films]) == 1
    share = positive.mean()
    weights: NDArray[np.float64] = own * np.where(positive, 1 - share, share)
    return weights


_BLOCKS = (  # from the top; what is below learns more slowly
    ("classifier",),
    ("features.norm5", "features.denseblock4"),
    ("features.transition3", "features.denseblock3"),
    ("features.transition2", "features.denseblock2"),
    ("features.transition1", "features.denseblock1"),
    ("features.conv0", "features.norm0"),
)


def parameter_groups(
    network: nn.Module, settings: FitSettings, phase: Phase
) -> list[dict[str, Any]]:
    """Return an optimiser's groups: a rate a block; biases and norms do not decay."""
    groups = []
    blocks = _BLOCKS[:1] if phase == "head" else _BLOCKS
    top = settings.head_rate if phase == "head" else settings.rate
    for depth, names in enumerate(blocks):
        members = [p for name in names for p in network.get_submodule(name).parameters()]
        rate = top * settings.block_decay**depth
        for decays in (True, False):
            some = [p for p in members if (p.ndim > 1) is decays]
            decay = settings.weight_decay if decays else 0.0
            groups.append({"params": some, "lr": rate, "weight_decay": decay})
    return groups


def warm_cosine(steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor per step: a short rise, then half a cosine to 0."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return factor


def study_auc(films: Sequence[Film], logits: Sequence[float]) -> float:
    """Return the area under the ROC curve of studies by their films' mean logit."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, film in enumerate(films):
        groups.setdefault((film.study, film.area), []).append(number)
    means = np.array([np.mean([logits[n] for n in members]) for members in groups.values()])
    labels = np.array([max(films[n].label for n in members) for members in groups.values()])
    return float(roc_auc(means, labels, np.ones((1, len(labels))))[0])


# ---- the run folder


def _describe(
    run: Path, settings: FitSettings, sides: Sides, held_out: Collection[str], start: str
) -> None:
    """Write what the run is made of, or hold it against what is there.

    Raises:
        Misconfigured: the folder holds another run.
    """
    told = {
        "settings": asdict(settings),
        "start": start,
        "data": data_digest([*sides.train, *sides.aside]),
        "held_out": sorted(held_out),
        "films": len(sides.train),
        "aside": len(sides.aside),
        "versions": {name: version(name) for name in ("mura-batch", "torch", "torchvision")}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(told, indent=1)
    file = run / "run.json"
    if not file.exists():
        write_atomic(file, lambda stream: stream.write(text.encode()))
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        here = json.loads(text)
        differing = [name for name in ("settings", "start", "data") if before[name] != here[name]]
    except (ValueError, KeyError, TypeError) as exc:
        raise Misconfigured(f"{file} is damaged: name another folder.") from exc
    if differing:
        raise Misconfigured(
            f"{run} holds another run ({', '.join(differing)} differ): name another folder."
        )


def data_digest(films: Sequence[Film]) -> str:
    """Return a digest of the films' contents and labels, in their order."""
    digest = hashlib.sha256()
    for film in films:
        content = sha256_of(film.path)
        told = (content, film.frame, film.study, film.patient, film.area, film.label, film.weight)
        digest.update(repr(told).encode())
    return digest.hexdigest()


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _write_log(file: Path, history: Sequence[Mapping[str, float]]) -> None:
    stream = io.StringIO()
    table = csv.DictWriter(stream, ("epoch", *history[-1]))
    table.writeheader()
    table.writerows({"epoch": n, **told} for n, told in enumerate(history, start=1))
    write_atomic(file, lambda out: out.write(stream.getvalue().encode()))


def _save(state: object, target: Path) -> None:
    """Write a state whole or not at all.

    Raises:
        Transient: the disk is full.
    """
    try:
        write_atomic(target, lambda stream: torch.save(state, stream))
    except (OSError, RuntimeError) as exc:
        raise Transient(
            f"{target} cannot be written ({str(exc).splitlines()[0]}): make room; the same command"
            " goes on after the last whole epoch."
        ) from exc
