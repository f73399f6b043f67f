"""``mura-infer``: one image, one area, five lines; for people of the single-image tool."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from mura_batch import cli, config
from mura_batch.area import Area
from mura_batch.cli.results import AREA, SHARE
from mura_batch.errors import MuraError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--image", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--area", required=True, type=AREA)
@click.option("--ckpt", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threshold", type=SHARE, help="Of prob_fracture  [default: 0.5]")
@click.option("--device", default="auto", show_default=True)
@click.option("--weights-url", help="Base address of the published weights.")
def infer(
    image: Path,
    area: str,
    ckpt: Path | None,
    threshold: float | None,
    device: str,
    weights_url: str | None,
) -> None:
    """Score one image with one area's weights.

    Without --ckpt: the home's active weights; else the published ones are fetched, and where
    they are out of reach the bundled ones serve. Research use only, not a medical device.

    \b
    mura-infer --image wrist.png --area XR_WRIST
    """
    click.echo(config.NOTICE, err=True)
    home = Path(os.environ.get(f"{config.PREFIX}HOME") or config.default_home())
    settings = config.load(home, os.environ)
    if ckpt is None:
        ckpt = _weights_file(settings, Area(area), weights_url or settings.weights_url)
    from mura_batch.inference import load_model

    model = load_model(area, ckpt, runtime=settings.runtime, device=device)
    probability = model.score([image])[0].probability
    limit = 0.5 if threshold is None else threshold
    click.echo(f"area={area}")
    click.echo(f"image={image}")
    click.echo(f"ckpt={ckpt}")
    click.echo(f"prob_fracture={probability:.4f}")
    click.echo(f"pred={int(probability >= limit)} (threshold={limit:g})")


def _weights_file(settings: config.Settings, area: Area, base_url: str) -> Path:
    """Return the active weights' file; fetched on first use, bundled where that is not to be."""
    from mura_batch.cli.models import fetch_with_progress
    from mura_batch.weights import BUNDLED, WeightsStore
    from mura_batch.weights_fetch import FIRST_USE

    store = WeightsStore(settings.weights_dir)
    card = store.active(area)
    if card is None:
        try:
            card = fetch_with_progress(area, base_url, store, patience=FIRST_USE)
        except (MuraError, OSError) as exc:
            click.echo(f"published weights: {exc}; using the bundled ones", err=True)
            return BUNDLED / "generalist.safetensors"
    return store.file(card)


def main() -> None:
    """Run ``mura-infer``; errors are one line, exit codes as ``mura-batch``'s."""
    try:
        infer.main(prog_name="mura-infer")
    except (MuraError, OSError) as exc:
        click.echo(f"mura-infer: {cli.told(exc)}", err=True)
        sys.exit(cli.code(exc))
