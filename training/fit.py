"""Two-phase fine-tuning: first the head on a frozen trunk, then everything.

A run folder holds all that repeats a run and all that resumes it: ``run.json`` (settings, data
digest, versions), ``state.pt`` (after each epoch; with the networks whose mean is taken),
``best.pt`` (where patients are kept aside), ``log.csv``, TensorBoard's events, and at the end
``outcome.json`` (seconds, losses) and ``network.pt``: the moving average of the best or the last
epoch, or the mean of several (:class:`~training.settings.FitSettings`). Prepared films are kept in
``films`` beside the run. A run that was cut off goes on after its last whole epoch: on a CPU with
as many threads to the same network bit by bit, on a GPU, whose kernels add in any order, to logits
within 0.05 of it (a short run on few films; longer ones drift further).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mura_batch.errors import Misconfigured
from mura_batch.network import Network, network_of, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.torch_runtime import find_device
from training.dataset import Dataset, Film
from training.evaluate import FilmScore, both_labels, by_study, cases_of
from training.folds import fold_numbers
from training.loader import Draw, Drawn
from training.metrics import roc_auc
from training.objectives import film_order, film_weights, outside, regions_and_views, unsteady
from training.optimisation import parameter_groups, warm_cosines
from training.prepared import Prepared, prepared
from training.processes import loader_watched
from training.run_folder import (
    UNREADABLE,
    alone_in,
    compare,
    damaged,
    made_by,
    made_of,
    read_state,
    save,
    state_digest,
    write_json,
    write_log,
)
from training.settings import CELL, FitSettings, Phase, Stage
from training.start import shared

_COMPARED = ("settings", "start", "data")  # what makes two runs one
_FEW_CORES = 4
_FEATURES = 1024  # channels of DenseNet-121's last map
_LOOK = 100  # steps between two looks at the loss


class LossIsNoNumber(Misconfigured):
    """Training went off: nothing of this run is of use."""


def fit(
    data: Dataset,
    run: Path,
    settings: FitSettings,
    *,
    held_out: Collection[str] = (),
    start: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    workers: int | None = None,
    cache: Path | None = None,
    stop_after: int | None = None,
) -> None:
    """Train on the films outside the splits ``held_out`` and leave ``run/network.pt``.

    ``start`` is the state to begin with, None for random weights; ``cache`` the folder of prepared
    films, by default ``films`` beside the run; ``workers`` processes draw films, by default none on
    a CPU of few cores, which the network needs itself. Where ``run`` holds a run that was cut off,
    that goes on; ``stop_after`` epochs cuts it off on purpose.

    Raises:
        Misconfigured: the data has problems or one label only, a film cannot be read, the device
            is not here, the folder holds another run, or the loss is no number.
        Transient: the disk is full, or another process works in the folder.
    """
    device = find_device(device)
    sides = divide(data.checked().has_splits(held_out).films, held_out, settings)
    torch.use_deterministic_algorithms(device == "cpu")
    # By default a deterministic run fills all new memory with NaN, lest somebody reads what lies
    # there: nobody does here, and it costs 4 % of a step.
    filling = torch.utils.deterministic
    filling.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch's types lack it
    torch.manual_seed(settings.seed)
    network = network_of(settings.architecture)
    _begin_with(network, start or {})
    start = network.state_dict()
    told = made_of(settings, *sides, target=data.target, held_out=held_out, start=start)
    compare(told, run / "run.json", _COMPARED)  # before hours of reading
    if (run / "network.pt").exists():
        made_by(run)  # done before, if it is whole
        return
    if workers is None:
        workers = default_workers(device)
    inputs = _prepare(sides, settings.preprocessing, cache or run.parent / "films")
    with alone_in(run):
        if not compare(told, run / "run.json", _COMPARED):
            write_json(told, run / "run.json")
        trainer = _Trainer(network.to(device), settings, sides, inputs, run=run, workers=workers)
        trainer.train(stop_after)


def default_workers(device: str) -> int:
    """Return how many processes draw films: on few cores they take more than they give."""
    return 0 if device == "cpu" and (os.cpu_count() or 1) <= _FEW_CORES else 2


def _begin_with(network: Network, start: Mapping[str, Tensor]) -> None:
    """Give a network those tensors that it has too, in the same shape: a trunk, or all of it."""
    network.load_state_dict(shared(network.state_dict(), start), strict=False)


class Sides(NamedTuple):
    """The films that are trained on, and those that the epoch is chosen by."""

    train: tuple[Film, ...]
    aside: tuple[Film, ...]


class _Inputs(NamedTuple):
    """Both sides' films; None where nobody is kept aside."""

    train: Prepared
    aside: Prepared | None


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
    _have_both_labels(kept.tolist())
    aside = np.zeros(len(kept), bool)
    if settings.patience is not None:
        parts = max(2, round(1 / settings.aside))
        try:
            aside = fold_numbers(kept.tolist(), parts, settings.seed) == 0
        except Misconfigured as exc:
            raise Misconfigured(
                f"No part of the films can choose the epoch: {exc} Or keep nobody aside (patience"
                " 0)."
            ) from exc
        if not both_labels(by_study([FilmScore(film, 0.0, None) for film in kept[aside]])):
            raise Misconfigured(
                "The studies to choose the epoch by do not have both labels: give more films."
            )
    _have_both_labels(kept[~aside].tolist())
    if (~aside).sum() < settings.batch:
        raise Misconfigured(
            f"{(~aside).sum()} films to train on are less than a batch of {settings.batch}: give"
            " more films."
        )
    return Sides(tuple(kept[~aside]), tuple(kept[aside]))


def _have_both_labels(films: Sequence[Film]) -> None:
    if len({film.label for film in films}) == 1:
        raise Misconfigured(
            f"All films to train on have the label {films[0].label}, that of {films[0].where} on:"
            " give more films."
        )


class _Epoch(NamedTuple):
    phase: Phase
    stage: Stage


class _Trainer:
    """A network on its way through its epochs."""

    def __init__(
        self,
        network: Network,
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
        # torch has no types for it.
        average = get_ema_multi_avg_fn(settings.average)  # type: ignore[no-untyped-call]
        self._average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        self._labels = np.array([film.label for film in sides.train])
        self._drawn = Drawn(
            inputs.train,
            self._labels.tolist(),
            whole=settings.preprocessing.size,
            strength=settings.augmentation,
            seed=settings.seed,
        )
        self._weights = film_weights(sides.train, settings.imbalance)
        self._aside, self._seen = sides.aside, inputs.aside
        self._plan = [_Epoch("head", settings.stages[0])] * settings.head_epochs
        for stage in settings.stages:
            self._plan += [_Epoch("all", stage)] * stage.epochs
        self._shown = regions_and_views(sides.train)
        self._joint = nn.Linear(_FEATURES, self._shown.shape[1])
        self._joint.to(self._device)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=settings.precision == "fp16")
        self._ends: list[dict[str, Tensor]] = []
        self._history: list[dict[str, float]] = []
        self._seconds = 0.0
        self._begin(self._plan[0].phase)

    def train(self, stop_after: int | None) -> None:
        """Go on to the end, or to the epoch ``stop_after``."""
        self._resume()
        with SummaryWriter(self._run, purge_step=len(self._history) + 1) as board:
            while not self._ended() and len(self._history) != stop_after:
                told = self._epoch(len(self._history))
                tqdm.write(self._said(told), file=sys.stderr)  # in logs it is all there is
                for name, value in told.items():
                    board.add_scalar(name, value, len(self._history))
        if self._ended():
            state = self._outcome()
            _finite(sum(float(tensor.sum()) for tensor in state.values()), "the end")
            losses = [round(told["loss"], 5) for told in self._history]
            seconds = round(self._seconds)
            outcome = {"seconds": seconds, "losses": losses, "network": state_digest(state)}
            write_json(outcome, self._run / "outcome.json")
            save(state, self._run / "network.pt")

    def _said(self, told: Mapping[str, float]) -> str:
        auc = f", study AUC {told['study_auc']:.3f}" if "study_auc" in told else ""
        epoch = f"epoch {len(self._history)} of {len(self._plan)}"
        return f"{self._run.name}: {epoch}: loss {told['loss']:.4f}{auc}"

    def _outcome(self) -> dict[str, Tensor]:
        """Return the state of the network that the run was for."""
        if self._aside:
            return read_state(self._run / "best.pt")
        ends = self._ends or [self._state()]
        return {
            name: torch.stack([end[name] for end in ends]).mean(0)
            if last.is_floating_point()
            else last
            for name, last in ends[-1].items()
        }

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
        measured = [
            number
            for number, (epoch, _) in enumerate(zip(self._plan, self._history, strict=False))
            if epoch == self._plan[-1]
        ]
        return max(measured, key=lambda n: self._history[n]["study_auc"], default=None)

    def _epoch(self, number: int) -> dict[str, float]:
        """Train one epoch, measure it, and keep what resumes it; return its figures."""
        began = time.monotonic()
        epoch = self._plan[number]
        if epoch.phase != self._phase:
            self._begin(epoch.phase)
        rate = float(self._schedule.get_last_lr()[0])
        told = {"loss": self._pass(number, epoch), "rate": rate}
        if self._seen is not None:
            told["study_auc"] = self._study_auc(self._seen)
        self._history.append(told)
        if self._best() == number:
            save(self._state(), self._run / "best.pt")
        if len(self._history) in self._settings.ends:
            self._ends.append({name: tensor.clone() for name, tensor in self._state().items()})
        self._seconds += time.monotonic() - began
        write_log(self._run / "log.csv", self._history)
        save(self._everything(), self._run / "state.pt")
        return told

    def _begin(self, phase: Phase) -> None:
        """Make the phase's optimiser and schedule."""
        self._phase = phase
        groups = parameter_groups(self._network, self._settings, phase)
        groups.append({"params": list(self._joint.parameters()), "lr": groups[0]["lr"]})
        self._optimiser = torch.optim.AdamW(groups, fused=self._device.type != "mps")
        stages = [stage.epochs for stage in self._settings.stages]
        epochs = [self._settings.head_epochs] if phase == "head" else stages
        steps = [count * (len(self._labels) // self._settings.batch) for count in epochs]
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, warm_cosines(steps))

    def _pass(self, number: int, epoch: _Epoch) -> float:
        """Train on every film once, drawn anew; return the mean loss."""
        self._freeze(epoch)
        rng = np.random.default_rng([self._settings.seed, number])
        order = film_order(self._labels, self._settings.imbalance, rng)
        margin = CELL if self._settings.steady else 0  # what films are moved by
        self._drawn.begin(number, order, epoch.stage.size + margin, crops=epoch.stage.crops)
        loader = DataLoader(
            self._drawn,
            self._settings.batch,
            drop_last=True,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
        )
        name = f"epoch {number + 1} of {len(self._plan)}"
        own = epoch.stage.inside
        inside = self._settings.inside if own is None else own
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with loader_watched():
            for step, draw in enumerate(tqdm(loader, desc=name, disable=None), start=1):
                some = order[(step - 1) * self._settings.batch : step * self._settings.batch]
                total += self._step(draw, some, inside)
                if step % _LOOK == 0 or step == len(loader):  # to look waits for the device
                    _finite(float(total), name)
        return float(total) / len(loader)

    def _freeze(self, epoch: _Epoch) -> None:
        """Let only those parts learn that this epoch is for; the others' normalisation stays."""
        self._network.train()
        frozen = epoch.phase == "head" or epoch.stage.frozen > 0
        last = f"transition{epoch.stage.frozen}"  # of the frozen parts
        for name, part in self._network.features.named_children():
            part.requires_grad_(not frozen).train(not frozen)
            frozen = frozen and (epoch.phase == "head" or name != last)

    def _step(self, draw: Draw, numbers: Sequence[int], inside: float) -> Tensor:
        with self._autocast():
            loss = self._loss(draw, numbers, inside)
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(self._scaler.scale(loss))
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._schedule.step()
        self._average.update_parameters(self._network)
        return loss.detach()

    def _loss(self, draw: Draw, numbers: Sequence[int], inside: float) -> Tensor:
        """Return the loss of a batch: of classification, and of what is asked for besides."""
        settings, films, boxes = self._settings, draw.film, draw.boxes
        if settings.steady:  # both in one pass
            films = torch.cat([films[:, :-CELL, :-CELL], films[:, CELL:, CELL:].flip(-1)])
            boxes = boxes[:, :-1, :-1]
        weights = torch.from_numpy(self._weights[numbers]).float() * draw.counts
        weights = weights.to(self._device)
        labels = draw.label.to(self._device)
        activations = functional.relu(self._network.features(self._input(films)))
        found = self._network.read(activations)
        logits = found.logit.float().view(-1, len(labels))
        loss = functional.binary_cross_entropy_with_logits(
            logits, labels.expand_as(logits), weights.expand_as(logits)
        )
        maps = found.map.float()
        if inside:
            lost = outside(maps[: len(labels)], boxes.to(self._device))
            loss = loss + inside * (weights * labels * lost).mean()
        if settings.steady:
            moved = unsteady(maps[: len(labels)], maps[len(labels) :])
            loss = loss + settings.steady * (weights * moved).mean()
        if settings.joint:
            told = torch.from_numpy(self._shown[numbers]).to(self._device)
            shown = self._joint(activations[: len(labels)].mean(dim=(2, 3)))
            wrong = functional.binary_cross_entropy_with_logits(shown.float(), told)
            loss = loss + settings.joint * wrong
        return loss

    def _input(self, films: Tensor) -> Tensor:
        spec = self._settings.preprocessing
        images = normalise(films.to(self._device, non_blocking=True), spec.mean, spec.std)
        return images.contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        kind = torch.float16 if self._settings.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device.type, kind, enabled=self._settings.precision != "f32")

    @torch.inference_mode()
    def _study_auc(self, seen: Prepared) -> float:
        """Measure the average network on the patients kept aside."""
        network = self._average.module.eval()
        pixels = seen.mapped()
        logits: list[float] = []
        for start in range(0, len(pixels), self._settings.batch):
            films = torch.from_numpy(np.array(pixels[start : start + self._settings.batch]))
            with self._autocast():
                logits += network(self._input(films)).logit.float().tolist()
        _finite(sum(logits), "what is measured aside")
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
            "joint": self._joint.state_dict(),
            "ends": self._ends,
            "history": self._history,
            "seconds": self._seconds,
        }

    def _resume(self) -> None:
        file = self._run / "state.pt"
        if not file.exists():
            return
        state = read_state(file, self._device)
        try:
            self._network.load_state_dict(state["network"])
            self._average.load_state_dict(state["average"])
            self._begin(state["phase"])
            self._optimiser.load_state_dict(state["optimiser"])
            self._schedule.load_state_dict(state["schedule"])
            self._scaler.load_state_dict(state["scaler"])
            self._joint.load_state_dict(state["joint"])
            self._ends = [{n: t.cpu() for n, t in end.items()} for end in state["ends"]]
            self._history = [{n: float(v) for n, v in told.items()} for told in state["history"]]
            self._seconds = float(state["seconds"])
            if len(self._history) > len(self._plan):
                raise damaged(file)
        except UNREADABLE as exc:
            raise damaged(file) from exc


def _finite(loss: float, name: str) -> None:
    if not math.isfinite(loss):
        raise LossIsNoNumber(
            f"The loss is {loss} in {name}: try a smaller rate, or precision f32. No weights were"
            " replaced."
        )


def study_auc(films: Sequence[Film], logits: Sequence[float]) -> float:
    """Return the area under the ROC curve of studies by their films' mean logit."""
    scores = [FilmScore(film, logit, None) for film, logit in zip(films, logits, strict=True)]
    cases = cases_of(by_study(scores), None)
    return float(roc_auc(cases.logits, cases.labels, np.ones((1, len(cases.labels))))[0])
