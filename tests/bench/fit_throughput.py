"""Training's films per second against the bare forward and backward pass on the same device.

    python tests/bench/fit_throughput.py DATA [--films 160] [--rounds 3] [--device cpu]

DATA is what ``python -m training data report`` takes. The bare pass repeats steps on one batch that
is on the device already: no reading, no augmentation. In turns, medians. Leaves with 1 below 90 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from torch.nn import functional

from mura_batch.network import EvidenceNet
from mura_batch.preprocessing import Preprocessing
from training.fit import Sides, _prepare, _Trainer, default_workers
from training.loader import Drawn
from training.prepared import Prepared
from training.settings import FitSettings, Stage
from training.sources import read

LIMIT = 0.9


def main() -> None:
    """Measure both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--films", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    films = read(options.data).checked().films[: options.films]
    settings = FitSettings(
        Preprocessing(crop="foreground", fit="pad", decode="reduced"),
        head_epochs=0,
        stages=(Stage(224, options.rounds),),
        patience=None,
        average=0.0,
    )
    with tempfile.TemporaryDirectory(prefix="mura-batch-training-") as scratch:
        sides = Sides(films, ())
        inputs = _prepare(sides, settings.preprocessing, Path(scratch))
        network = EvidenceNet().to(options.device)
        workers = default_workers(options.device)
        trainer = _Trainer(network, settings, sides, inputs, run=Path(scratch), workers=workers)
        bare, whole = [], []
        for number in range(options.rounds):
            bare.append(of_bare_steps(inputs.train, settings, options.device, len(films)))
            started = time.perf_counter()
            trainer._pass(number, trainer._plan[0])
            seen = len(films) // settings.batch * settings.batch
            whole.append(seen / (time.perf_counter() - started))
            click.echo(f"round {number + 1}: {whole[-1]:.2f} of {bare[-1]:.2f} films/s")
    share = statistics.median(whole) / statistics.median(bare)
    click.echo(f"training at {share:.0%} of the bare forward and backward pass")
    sys.exit(share < LIMIT)


def of_bare_steps(prepared: Prepared, settings: FitSettings, device: str, films: int) -> float:
    """Return films per second of steps on one batch that lies ready."""
    drawn = Drawn(prepared, [0] * films, whole=224, strength=1.0, seed=1)
    drawn.begin(0, range(films), 224)
    batch = torch.stack([drawn[number].film for number in range(settings.batch)]).to(device)
    images = (batch.float()[:, None] / 255).expand(-1, 3, -1, -1)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(settings.batch, device=device)
    network = EvidenceNet().to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.rate, fused=device != "mps")
    steps = films // settings.batch
    started = time.perf_counter()
    for _ in range(steps):
        loss = functional.binary_cross_entropy_with_logits(network(images).logit, labels)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return steps * settings.batch / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
