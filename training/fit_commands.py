"""``pretrain``, ``fit``, ``cross-validate``, ``search``: the commands that train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mura_batch.area import Area
from mura_batch.config import NOTICE
from mura_batch.weights_card import ARCHITECTURES
from training.sources import read

if TYPE_CHECKING:
    from training.settings import FitSettings

FOLDER = click.Path(file_okay=False, path_type=Path)
FOUND = click.Path(exists=True, path_type=Path)
AREA = click.Choice(tuple(Area), case_sensitive=False)
_START = "nothing, imagenet, bundled, or a file: network.pt of a run, or weights (.safetensors)."
_RATE = click.FloatRange(0, min_open=True)
_SHARE = click.FloatRange(0)

_DATA = (
    click.argument("path", type=FOUND),
    click.argument("run", type=FOLDER),
    click.option("--labels", type=FOUND, help="CSV of labels (study, label) of DICOM files."),
)
_MACHINE = (
    click.option(
        "--workers",
        type=click.IntRange(0),
        default=2,
        show_default=True,
        help="Processes that read and augment films.",
    ),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda:N or mps."),
)
_SETTINGS = (
    click.option("--epochs", type=click.IntRange(1), help="Epochs of the last stage at most."),
    click.option("--head-epochs", type=click.IntRange(0), help="Epochs of phase one."),
    click.option("--rate", type=_RATE, help="Learning rate of phase two."),
    click.option("--batch", type=click.IntRange(2)),
    click.option("--imbalance", type=click.Choice(["mura", "balanced", "none"])),
    click.option("--augmentation", type=_SHARE, help="Strength, 1 as published, 0 mirrors only."),
    click.option("--inside", type=_SHARE, help="CAM regularization: evidence inside the boxes."),
    click.option("--steady", type=_SHARE, help="CAM regularization: the same evidence if moved."),
    click.option("--architecture", type=click.Choice(ARCHITECTURES)),
    click.option("--patience", type=click.IntRange(0),
                 help="Epochs without a better AUC on patients kept aside; 0 keeps nobody aside."),
    click.option("--precision", type=click.Choice(["f32", "bf16", "fp16"])),
    click.option("--seed", type=click.IntRange(0)),
)  # fmt: skip
_FITTED = (
    click.option("--area", type=AREA, multiple=True, help="Films of this area (again for more)."),
    click.option("--start", metavar="HOW", default="nothing", show_default=True, help=_START),
    click.option("--settings", type=FOUND, help="best.json of a search, or run.json of a run."),
)


def _all(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command()
@_all(*_DATA)
@click.option("--held-out", multiple=True, metavar="SPLIT", help="Leave out, such as valid or 0.")
@_all(*_SETTINGS, *_MACHINE)
def pretrain(
    *,
    path: Path,
    run: Path,
    labels: Path | None,
    held_out: tuple[str, ...],
    workers: int,
    device: str,
    **changes: Any,
) -> None:
    """Train a trunk from nothing on all films of PATH, limbs of other regions too.

    It learns label, region and view together, from crops where films have boxes; `fit --start
    RUN/network.pt` goes on from there. A run that was cut off goes on.

    \b
    python -m training pretrain fracatlas runs/trunk --held-out 0
    """
    from training.fit import fit
    from training.settings import TRUNK

    click.echo(NOTICE, err=True)
    settings = _changed(TRUNK, changes)
    fit(read(path, labels), run, settings, held_out=held_out, device=device, workers=workers)
    click.echo(f"written to {run / 'network.pt'}", err=True)


@click.command("fit")
@_all(*_DATA, *_FITTED)
@click.option("--held-out", multiple=True, metavar="SPLIT", help="Leave out, such as valid or 0.")
@_all(*_SETTINGS, *_MACHINE)
def fit_command(
    *,
    path: Path,
    run: Path,
    labels: Path | None,
    area: tuple[str, ...],
    held_out: tuple[str, ...],
    start: str,
    workers: int,
    device: str,
    **changes: Any,
) -> None:
    """Train a network on the labelled films of PATH into the folder RUN.

    A run that was cut off goes on. PATH is as for `data report`.

    \b
    python -m training fit MURA-v1.1 runs/wrist --area XR_WRIST --held-out valid --start imagenet
    """
    from training.fit import fit
    from training.start import settings_for, state_of

    click.echo(NOTICE, err=True)
    data = read(path, labels)
    fit(
        data.only(area) if area else data,
        run,
        _changed(settings_for(start), changes),
        held_out=held_out,
        start=state_of(start),
        device=device,
        workers=workers,
    )
    click.echo(f"written to {run / 'network.pt'}", err=True)


@click.command("cross-validate")
@_all(*_DATA, *_FITTED)
@click.option("--fold", multiple=True, metavar="SPLIT", help="This fold only (again for more).")
@_all(*_SETTINGS, *_MACHINE)
def cross_validate_command(
    *,
    path: Path,
    run: Path,
    labels: Path | None,
    area: tuple[str, ...],
    fold: tuple[str, ...],
    start: str,
    workers: int,
    device: str,
    **changes: Any,
) -> None:
    """Train without each fold of PATH in turn, score it, and write RUN/record.json.

    Folds are the splits that PATH states, else five of its patients. A run that was cut off goes
    on.

    \b
    python -m training cross-validate fracatlas runs/generalist --start runs/trunk/network.pt
    """
    from training.crossval import cross_validate, folded, study_figures
    from training.start import settings_for, state_of

    click.echo(NOTICE, err=True)
    data = read(path, labels).checked()
    if area:
        data = data.only(area)
    settings = _changed(settings_for(start), changes)
    stated = sorted({film.split for film in data.films} - {""})
    if len(stated) < 2:  # noqa: PLR2004 - one split is no cross-validation
        data, stated = folded(data, 5, settings.seed), [str(n) for n in range(5)]
    record = cross_validate(
        data,
        run,
        settings,
        folds=fold or stated,
        start=state_of(start),
        begins=start,
        device=device,
        workers=workers,
    )
    for line in study_figures(record):
        click.echo(line)
    click.echo(f"written to {run / 'record.json'}", err=True)


@click.command("search")
@_all(*_DATA, *_FITTED)
@click.option("--held-out", multiple=True, metavar="SPLIT", help="Never looked at.")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--folds",
    type=click.IntRange(2),
    default=3,
    show_default=True,
    help="Of the patients that are looked at.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that run trials.",
)
@_all(*_SETTINGS, _MACHINE[1])
def search_command(
    *,
    path: Path,
    run: Path,
    labels: Path | None,
    area: tuple[str, ...],
    held_out: tuple[str, ...],
    start: str,
    trials: int,
    folds: int,
    jobs: int,
    device: str,
    **changes: Any,
) -> None:
    """Look for better settings by cross-validation of the films that are not held out.

    Rates, weight decay, augmentation, imbalance, frozen epochs, input size and padding; each
    trial begins with what the options say. `fit --settings RUN/best.json` takes the best. A
    search that was cut off goes on.

    \b
    python -m training search MURA-v1.1 runs/wrist-search --area XR_WRIST --held-out valid
    """
    from training.search import search
    from training.start import settings_for, state_of

    click.echo(NOTICE, err=True)
    data = read(path, labels)
    best = search(
        data.only(area) if area else data,
        run,
        _changed(settings_for(start), changes),
        trials=trials,
        folds=folds,
        held_out=held_out,
        start=state_of(start),
        device=device,
        jobs=jobs,
    )
    click.echo(f"study AUC {best.study_auc:.3f}, the best of {best.trials} trials")
    click.echo(f"written to {run / 'best.json'}", err=True)


def _changed(settings: FitSettings, changes: dict[str, Any]) -> FitSettings:
    """Return settings, or a file's, with those that were given on the command line."""
    from training.run_folder import read_settings

    if (file := changes.pop("settings", None)) is not None:
        settings = read_settings(file)
    given = {name: value for name, value in changes.items() if value is not None}
    if (epochs := given.pop("epochs", None)) is not None:
        *before, last = settings.stages
        given["stages"] = (*before, replace(last, epochs=epochs))
    if given.get("patience") == 0:
        given["patience"] = None
    return replace(settings, **given)
