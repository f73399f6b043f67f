"""Train one network over all films: from nothing, one cosine, the last epoch is the result.

No epoch is chosen on the evaluation fold, so what it measures afterwards is held out. The run
folder holds everything that repeats or resumes the run: ``run.json`` (settings, library
versions), ``films-*.npy`` (prepared films), ``state.pt`` (after each epoch), ``log.csv``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from mura_batch.network import EvidenceNet, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from training.dataset import Film

_HEADROOM = 1.2  # films are kept this much larger than the input, so that zooming in is sharp


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What a run is made of; the same settings and films repeat it.

    Attributes:
        epochs: (input size, epochs) one after the other: small inputs cost a fraction of the
            time, the last ones have the size that scoring will use.
        bf16: forward passes in bfloat16 (autocast), twice as fast on CPUs with AVX-512 BF16.
    """

    preprocessing: Preprocessing = field(
        default_factory=lambda: Preprocessing(
            size=224, crop="foreground", fit="pad", decode="reduced"
        )
    )
    epochs: tuple[tuple[int, int], ...] = ((128, 12), (160, 8), (224, 4))
    bf16: bool = False
    batch: int = 16
    rate: float = 1e-3
    weight_decay: float = 0.05
    evaluation_fold: int = 0
    seed: int = 20


def fit(
    films: Sequence[Film], run: Path, settings: FitSettings, *, stop_after: int | None = None
) -> None:
    """Train on every film outside the evaluation fold and leave ``run/network.pt``.

    A run that was cut off goes on after its last whole epoch; ``stop_after`` cuts it off after
    that many epochs on purpose.
    """
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    training = [film for film in films if film.split != str(settings.evaluation_fold)]
    pixels = _prepared(training, run, settings.preprocessing)
    labels = torch.tensor([float(film.label) for film in training])
    (run / "run.json").write_text(json.dumps({**asdict(settings), "films": len(training)}))

    network = EvidenceNet().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=settings.rate, weight_decay=settings.weight_decay
    )
    sizes = [size for size, epochs in settings.epochs for _ in range(epochs)]
    steps = len(sizes) * (len(training) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_cosine(steps))
    first = _resume(run / "state.pt", network, optimiser, schedule)
    last = len(sizes) if stop_after is None else min(stop_after, len(sizes))
    for epoch in range(first, last):
        network.train()
        rng = np.random.default_rng([settings.seed, epoch])
        spec = replace(settings.preprocessing, size=sizes[epoch])
        losses = []
        batches = _batches(len(training), settings.batch, rng)
        total = len(training) // settings.batch
        for chosen in tqdm(batches, total=total, desc=f"epoch {epoch + 1}", disable=None):
            images = _augment(torch.from_numpy(pixels[chosen]), spec, rng)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                logits = network(images.contiguous(memory_format=torch.channels_last)).logit
            loss = functional.binary_cross_entropy_with_logits(logits.float(), labels[chosen])
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
        state = {
            "epoch": epoch + 1,
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
        }
        _save(state, run / "state.pt")
        with (run / "log.csv").open("a", encoding="utf-8") as log:
            log.write(f"{epoch + 1},{np.mean(losses):.5f}\n")
    if last == len(sizes):
        _save(network.state_dict(), run / "network.pt")


def _prepared(films: Sequence[Film], run: Path, spec: Preprocessing) -> NDArray[np.uint8]:
    """Return the films as uint8 (N, S, S), S with headroom, from the cache where it fits."""
    size = round(spec.size * _HEADROOM)
    cache = run / f"films-{spec.crop}-{spec.fit}-{spec.decode}.npy"
    if cache.exists():
        stored: NDArray[np.uint8] = np.load(cache)
        if stored.shape == (len(films), size, size):
            return stored
    roomy = Preprocessing(size=size, crop=spec.crop, fit=spec.fit, decode=spec.decode)
    pixels = np.stack(
        [
            read_film(film.path, 0, roomy)[1].pixels
            for film in tqdm(films, desc="reading films", disable=None)
        ]
    )
    np.save(cache, pixels)
    return pixels


def _batches(films: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    order = rng.permutation(films)
    for start in range(0, films - size + 1, size):
        yield order[start : start + size]


def _augment(images: Tensor, spec: Preprocessing, rng: np.random.Generator) -> Tensor:
    """Return normalised input (N, 3, size, size) of uint8 films.

    Each film is mirrored, turned, zoomed, shifted and toned on its own.
    """
    count = len(images)
    angle = rng.uniform(-0.4, 0.4, count)
    zoom = rng.uniform(0.8, 1.15, count)
    mirror = rng.choice([-1.0, 1.0], count)
    shift = rng.uniform(-0.12, 0.12, (2, count))
    rows = [
        [zoom * mirror * np.cos(angle), -zoom * np.sin(angle), shift[0]],
        [zoom * mirror * np.sin(angle), zoom * np.cos(angle), shift[1]],
    ]
    theta = torch.from_numpy(np.array(rows).transpose(2, 0, 1).astype(np.float32))
    grid = functional.affine_grid(theta, [count, 1, spec.size, spec.size], align_corners=False)
    warped = functional.grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0]
    gamma = torch.from_numpy(rng.uniform(0.7, 1.4, (count, 1, 1)).astype(np.float32))
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (count, 1, 1)).astype(np.float32))
    toned = (255.0 * gain * (warped / 255.0).clamp(min=0) ** gamma).clamp(0, 255)
    return normalise(toned, spec.mean, spec.std)


def _warm_cosine(steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor per step: a short rise, then half a cosine to 0."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return factor


def _resume(
    state_file: Path,
    network: EvidenceNet,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Load the last whole epoch's state, if there is one; return the epoch to go on with."""
    if not state_file.exists():
        return 0
    state = torch.load(state_file, weights_only=True)
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    return int(state["epoch"])


def _save(state: object, target: Path) -> None:
    partial = target.with_suffix(".tmp")
    torch.save(state, partial)
    os.replace(partial, target)
