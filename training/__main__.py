"""``python -m training``: fit a network and publish it with its cards."""

from __future__ import annotations

from pathlib import Path

import click

from training.dataset import read_fracatlas

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def training() -> None:
    """Train networks from labelled radiographs. Research use only, not a medical device."""


@training.command()
@click.argument("data", type=_FOLDER)
@click.argument("run", type=_FOLDER)
@click.option("--bf16", is_flag=True, help="Compute in bfloat16: for CPUs with AVX-512 BF16.")
def fit(data: Path, run: Path, *, bf16: bool) -> None:
    """Train one network on the FracAtlas folder DATA; a run that was cut off goes on.

    \b
    python -m training fit fracatlas runs/generalist
    """
    from training.fit import FitSettings  # noqa: PLC0415 - torch only where it is needed
    from training.fit import fit as fit_network  # noqa: PLC0415

    fit_network(read_fracatlas(data), run, FitSettings(bf16=bf16))


@training.command()
@click.argument("data", type=_FOLDER)
@click.argument("run", type=_FOLDER)
@click.argument("folder", type=_FOLDER)
def publish(data: Path, run: Path, folder: Path) -> None:
    """Measure RUN's network on the held-back exams of DATA and write weights and cards to FOLDER.

    \b
    python -m training publish fracatlas runs/generalist mura_batch/bundled
    """
    from training.publish import publish_bundled  # noqa: PLC0415 - torch only where needed

    done = publish_bundled(read_fracatlas(data), run, folder)
    value, low, high = done.auc.value, done.auc.low, done.auc.high
    click.echo(f"{done.file}: study AUC {value:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    training(prog_name="python -m training")
