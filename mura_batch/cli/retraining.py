"""The command ``retrain``: a site's own weights for an area, from its own labels."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import click

from mura_batch import cli
from mura_batch.area import Area
from mura_batch.cli.results import AREA
from mura_batch.errors import Misconfigured, Transient

_NICENESS = 10
_GIB = 2**30
_MOST_MEMORY = 2**60  # bytes


@click.command()
@click.argument("area", type=AREA)
@click.option("--data", required=True, metavar="PATH", help="Labelled films, or `labels`.")
@click.option(
    "--labels",
    type=click.Path(exists=True, path_type=Path),
    help="CSV of labels of a folder of DICOM files.",
)
@click.option(
    "--trials",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Trials of a search for settings first.",
)
@click.option("--epochs", type=click.IntRange(1), help="Epochs of phase two at most.")
@click.option("--activate", is_flag=True, help="Use the new weights if they are not worse.")
@click.option(
    "--force",
    metavar="REASON",
    default="",
    help="Use them, even if they are worse; the reason is kept.",
)
@click.option(
    "--memory",
    type=click.FloatRange(1),
    metavar="GIB",
    help="Memory to use at most  [default: half of the machine's]",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda:N or mps.")
@click.pass_context
def retrain(
    ctx: click.Context,
    area: str,
    data: str,
    labels: Path | None,
    trials: int,
    epochs: int | None,
    activate: bool,
    force: str,
    memory: float | None,
    device: str,
) -> None:
    """Train weights for AREA from labelled films, measure and store them.

    PATH is a folder of MURA or FracAtlas, a manifest (.csv, .parquet), a folder of DICOM files
    with --labels, or `labels` for what people stored with `mura-batch label`. Training begins
    with the weights in use and runs at low priority. A fifth of the patients (or the splits
    `valid` and `test`) is kept aside for good: new and old weights are compared on them. Run it
    again after it was cut off, and it goes on.

    \b
    mura-batch retrain XR_WRIST --data labels --activate
    """
    settings = cli.settings(ctx)
    cli.notice()
    _be_modest(memory, device)
    try:
        from training.retrain import Plan
        from training.retrain import retrain as run
        from training.sources import read
    except ModuleNotFoundError as exc:
        raise Misconfigured(f"training needs {exc.name}: pip install 'mura-batch[train]'") from exc
    source = settings.home if data == "labels" else Path(data)
    plan = Plan(trials, epochs, activate or bool(force), force, device)
    try:
        done = run(settings, Area(area), read(source, labels), plan)
    except (MemoryError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and "memory" not in str(exc):
            raise
        raise Transient(
            f"training ran out of memory: allow more with --memory ({_first_line(exc)})"
        ) from exc
    click.echo(f"the run is kept in {done.run}", err=True)
    click.echo(f"{area}: {done.card.short}, study AUC {done.new.words()} on {done.on}")
    if done.before is not None and done.gain is not None:
        few = "" if done.gain.value is not None else " from so few patients of a label"
        click.echo(f"against {done.before.short}, in use: {done.gain.words('+.3f')}{few}")
    click.echo(done.int8)
    if done.activated:
        click.echo("in use now; `mura-batch rerun --stale` scores old studies again")
    elif plan.activate:
        click.echo("not in use: it may be worse. `--force REASON` puts it in use even so", err=True)
        ctx.exit(cli.FAILED)
    else:
        use = "to use it" if done.good else "it may be worse than what is in use; to use it even so"
        click.echo(f"{use}: mura-batch models activate {area} {done.card.short}")


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or ["MemoryError"])[0]


def _be_modest(memory: float | None, device: str) -> None:
    """Leave the daemon its share: low priority, bounded memory, threads that do not spin.

    Raises:
        Misconfigured: there is no such device, or a GPU has not enough memory free.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.nice(_NICENESS)
    most = memory * _GIB if memory else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    if not most < _MOST_MEMORY:  # NaN is not, either
        raise click.UsageError("--memory: a number of GiB")
    from mura_batch.runtime.torch_runtime import find_device

    device = find_device(device)
    if not device.startswith("cuda"):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    wanted = min(most, total / 2)
    if free < wanted:
        raise Misconfigured(
            f"{device} has {free / _GIB:.1f} GiB free and training takes up to"
            f" {wanted / _GIB:.1f}: wait, give --memory, or train with --device cpu"
        )
    torch.cuda.set_per_process_memory_fraction(wanted / total, device)
