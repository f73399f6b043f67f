"""The command group ``models``: the versioned weights of each area."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mura_batch import cli
from mura_batch.area import Area
from mura_batch.cli.results import AREA, show_table
from mura_batch.errors import MuraError

if TYPE_CHECKING:
    from mura_batch.weights import WeightsStore
    from mura_batch.weights_card import Card, Target
    from mura_batch.weights_fetch import Patience


@click.group()
def models() -> None:
    """List, fetch, import, check and switch the weights of each area.

    \b
    mura-batch models list
    mura-batch models fetch
    """


def _store(ctx: click.Context) -> WeightsStore:
    from mura_batch.weights import WeightsStore

    return WeightsStore(cli.settings(ctx).weights_dir)


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array of cards.")
@click.pass_context
def models_list(ctx: click.Context, as_json: bool) -> None:
    """List the stored weights; the active ones are marked.

    \b
    mura-batch models list
    """
    store = _store(ctx)
    cards = store.cards()
    if as_json:
        click.echo(json.dumps([json.loads(card.to_json()) for card in cards], indent=1))
        return
    active = {area: card.sha256 for area in Area if (card := _active(store, area)) is not None}
    rows = [
        (
            card.area,
            card.short,
            "active" if active.get(card.area) == card.sha256 else "",
            card.origin,
            card.target,
            f"{card.threshold:.3f}",
        )
        for card in cards
    ]
    show_table(("area", "weights", "", "origin", "target", "threshold"), rows)


def _active(store: WeightsStore, area: Area) -> Card | None:
    try:
        return store.active(area)
    except MuraError:
        return None


@models.command("show")
@click.argument("area", type=AREA)
@click.argument("weights", required=False)
@click.pass_context
def models_show(ctx: click.Context, area: str, weights: str | None) -> None:
    """Print the card of an area's active weights, or of WEIGHTS (digest or its beginning).

    \b
    mura-batch models show XR_HAND
    """
    store = _store(ctx)
    card = store.find(Area(area), weights) if weights else store.require(Area(area))
    click.echo(card.to_json(), nl=False)
    form = store.int8_form(card)
    click.echo(form.words() if form else "int8: not measured", err=True)
    if reason := store.reason(card):
        click.echo(f"put in use although it may be worse: {reason}", err=True)


@models.command("fetch")
@click.argument("areas", nargs=-1, type=AREA, metavar="[AREA]...")
@click.option("--url", help="Base address  [default: weights_url of the settings]")
@click.pass_context
def models_fetch(ctx: click.Context, areas: tuple[str, ...], url: str | None) -> None:
    """Download published weights (all areas, or those named) and use them.

    A download that was cut off goes on where it stopped. 1 when one failed, 4 when one never
    can, such as from a wrong address.

    \b
    mura-batch models fetch
    mura-batch models fetch XR_HAND
    """
    settings = cli.settings(ctx)
    store = _store(ctx)
    worst = 0
    for area in [Area(name) for name in areas] or list(Area):
        try:
            card = fetch_with_progress(area, url or settings.weights_url, store)
        except MuraError as exc:
            click.echo(f"{area}: {exc}", err=True)
            worst = max(worst, cli.code(exc))
        else:
            click.echo(f"{area}: {card.short}")
    ctx.exit(worst)


def fetch_with_progress(
    area: Area, base_url: str, store: WeightsStore, patience: Patience | None = None
) -> Card:
    """Fetch one area's published weights under a progress bar (a plain run where piped)."""
    from tqdm import tqdm

    from mura_batch.weights_fetch import fetch

    with tqdm(desc=area, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return fetch(area, base_url, store, progress=progress, patience=patience)


@models.command("import")
@click.argument("area", type=AREA)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--target",
    type=click.Choice(["abnormal", "fracture"]),
    help="What a high probability means  [default: what a training run says, else abnormal]",
)
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True)
@click.option("--licence", default="not stated", help="Licence of the weights.")
@click.option("--activate", is_flag=True, help="Use them from now on.")
@click.pass_context
def models_import(
    ctx: click.Context,
    area: str,
    file: Path,
    target: Target | None,
    threshold: float,
    licence: str,
    activate: bool,
) -> None:
    """Store a torch checkpoint (a state dict, or a file that holds `model_state`).

    Of a training run's network.pt, run.json beside it says how it sees films.
    Safetensors are stored too, with their card: FILE.json or card.json beside them. It says all
    that the options say, so leave these out.

    \b
    mura-batch models import XR_WRIST wrist_best.pt --activate
    mura-batch models import XR_WRIST runs/wrist/network.pt
    """
    from mura_batch.weights_import import Facts, import_checkpoint

    facts = Facts(
        area=Area(area),
        target=target,
        threshold=threshold,
        licence=licence,
    )
    store = _store(ctx)
    card = import_checkpoint(file, facts, store)
    if activate or store.active(card.area) is None:
        store.activate(card.area, card.sha256)
    click.echo(f"{card.area}: {card.short}")


@models.command("quantize")
@click.argument("area", type=AREA)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--weights", help="Digest, or its beginning  [default: the active ones]")
@click.option(
    "--labels",
    type=click.Path(exists=True, path_type=Path),
    help="CSV of labels of a folder of DICOM files.",
)
@click.pass_context
def models_quantize(
    ctx: click.Context, area: str, path: Path, weights: str | None, labels: Path | None
) -> None:
    """Measure how an area's weights run in int8, on the films of PATH, and keep that.

    PATH is a folder of films of AREA (what is no image is left out), or labelled films as
    `retrain --data` takes them. 64 films give the ranges of int8's steps; on other patients' at
    most 1 % of the decisions may flip, probabilities may differ by 0.01 in the mean and, with
    labels, the AUC may fall by 0.005. Else the weights stay f32. 1 where they do. A daemon uses it
    from its next start on.

    \b
    mura-batch models quantize XR_WRIST wrists
    mura-batch models quantize XR_WRIST MURA-v1.1
    """
    from training.quantize import quantize, sample_of

    store = _store(ctx)
    card = store.find(Area(area), weights) if weights else store.require(Area(area))
    form = quantize(store, card, sample_of(path, labels, Area(area)))
    store.add_int8_form(form, card)
    click.echo(f"{area}: {card.short}: {form.words()}")
    if form.refusal:
        ctx.exit(cli.FAILED)


@models.command("verify")
@click.pass_context
def models_verify(ctx: click.Context) -> None:
    """Check every stored file against its digest and card; 1 where something is wrong.

    \b
    mura-batch models verify
    """
    problems = _store(ctx).verify()
    for problem in problems:
        click.echo(problem)
    if problems:
        ctx.exit(cli.FAILED)
    click.echo("ok")


@models.command("activate")
@click.argument("area", type=AREA)
@click.argument("weights")
@click.pass_context
def models_activate(ctx: click.Context, area: str, weights: str) -> None:
    """Use WEIGHTS (a digest or its beginning) for AREA from now on.

    \b
    mura-batch models activate XR_WRIST 3fa9
    """
    card = _store(ctx).activate(Area(area), weights)
    click.echo(f"{card.area}: {card.short}; `mura-batch rerun --stale` scores old studies again")


@models.command("rollback")
@click.argument("area", type=AREA)
@click.pass_context
def models_rollback(ctx: click.Context, area: str) -> None:
    """Go back to the weights that AREA used before.

    \b
    mura-batch models rollback XR_WRIST
    """
    card = _store(ctx).rollback(Area(area))
    click.echo(f"{card.area}: {card.short}")
