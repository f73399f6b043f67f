"""``pretrain``, ``fit``, ``cross-validate``, ``search``: the commands that train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mura_batch.area import Area
from mura_batch.config import NOTICE
from mura_batch.weights_card import ARCHITECTURES
from training.sources import read

if TYPE_CHECKING:
    from torch import Tensor

    from training.dataset import Dataset
    from training.settings import FitSettings

FOLDER = click.Path(file_okay=False, path_type=Path)
FOUND = click.Path(exists=True, path_type=Path)
LABELS = click.option(
    "--labels", type=FOUND, help="CSV of labels (study, label) of a folder of DICOM."
)
AREA = click.Choice(tuple(Area), case_sensitive=False)
_START = (
    "nothing, imagenet, bundled, auto (imagenet where it can be had, else bundled), or a file:"
    " network.pt of a run, or weights (.safetensors); with --home a digest."
)
_RATE = click.FloatRange(0, min_open=True)
_SHARE = click.FloatRange(0)
_FOLDS = 5  # where the data states none

_DATA = (
    click.argument("path", type=FOUND),
    click.argument("run", type=FOLDER),
    LABELS,
)
_HELD_OUT = click.option(
    "--held-out", multiple=True, metavar="SPLIT", help="Never looked at, such as valid or 0."
)
_DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda:N or mps.")
_MACHINE = (
    click.option("--workers", type=click.IntRange(0), show_default="0 on few CPU cores, else 2",
                 help="Processes that augment films beside the training."),
    _DEVICE,
)  # fmt: skip
_SETTINGS = (
    click.option("--settings", type=FOUND, help="best.json of a search, or run.json of a run."),
    click.option("--epochs", type=click.IntRange(1), help="Epochs of the last stage at most."),
    click.option("--head-epochs", type=click.IntRange(0), help="Epochs of phase one."),
    click.option("--rate", type=_RATE, help="Learning rate of phase two."),
    click.option("--batch", type=click.IntRange(2)),
    click.option("--imbalance", type=click.Choice(["mura", "balanced", "none"])),
    click.option("--augmentation", type=_SHARE,
                 help="Strength, 1 as published, 0 mirrors only."),
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
    click.option("--home", type=FOUND, help="Home whose weights --start names by their digest."),
)


def _all(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class _Asked(NamedTuple):
    """What the options that commands share ask for."""

    data: Dataset
    settings: FitSettings
    start: str


def _asked(options: dict[str, Any], base: FitSettings | None = None) -> _Asked:
    """Read data and settings; ``base`` stands in for the settings that suit the start."""
    from training.run_folder import read_settings
    from training.start import in_home, like, obtained, settings_for

    click.echo(NOTICE, err=True)
    data = read(options.pop("path"), options.pop("labels")).checked()
    if area := options.pop("area", ()):
        data = data.only(area)
    start, why = obtained(options.pop("start", "nothing"))
    if why:
        click.echo(why, err=True)
    if home := options.pop("home", None):
        path, card = in_home(home, start)
        start, base = str(path), like(card)
    if file := options.pop("settings", None):
        base = read_settings(file)
    settings = base or settings_for(start)
    given = {name: value for name, value in options.items() if value is not None}
    stages = settings.stages
    if "inside" in given:  # for all stages, those too that have a weight of their own
        stages = tuple(replace(stage, inside=None) for stage in stages)
    epochs = given.pop("epochs", stages[-1].epochs)
    if given.get("patience") == 0:
        given["patience"] = None
    try:
        stages = (*stages[:-1], replace(stages[-1], epochs=epochs))
        settings = replace(settings, stages=stages, **given)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    return _Asked(data, settings, start)


def _tell(asked: _Asked, state: Mapping[str, Tensor] | None) -> None:
    """Say what is about to be done, and what of it might surprise."""
    from mura_batch.network import network_of
    from training.loader import have_boxes
    from training.start import shared

    films, settings = asked.data.films, asked.settings
    click.echo(settings.words(), err=True)
    crops = any(stage.crops for stage in settings.stages)
    if crops and not have_boxes([f.boxes for f in films], [f.label for f in films]):
        click.echo("few positive films have boxes: films whole instead of crops", err=True)
    own = network_of(settings.architecture).state_dict()
    if state is not None and (new := sorted({*own} - {*shared(own, state)})):
        parts = ", ".join(sorted({name.split(".")[0] for name in new}))
        click.echo(f"{asked.start} has no {parts} of this network: these begin anew", err=True)


def _warn_of_seen(start: str, splits: Iterable[str]) -> None:
    """Say so where what training begins with may have learned what is to be held out."""
    from training.run_folder import described
    from training.start import WORDS, of_the_bundled

    file = Path(start)
    if start == "bundled" and splits:
        click.echo(of_the_bundled(), err=True)
    elif start not in WORDS and file.is_file() and file.with_name("run.json").is_file():
        seen = sorted(set(splits) - set(described(file.parent)["held_out"]))
        if seen:
            click.echo(
                f"{start} was not trained without {', '.join(seen)}: if it has seen those films,"
                " figures on them are too good",
                err=True,
            )


@click.command()
@_all(*_DATA, _HELD_OUT, *_SETTINGS, *_MACHINE)
def pretrain(
    *, run: Path, held_out: tuple[str, ...], workers: int | None, device: str, **options: Any
) -> None:
    """Train a trunk from nothing on all films of PATH, limbs of other regions too.

    It learns label, region and view together, from crops if positive films have boxes; `fit --start
    RUN/network.pt` goes on from there. A run that was cut off goes on.

    \b
    python -m training pretrain fracatlas runs/trunk --held-out 0 --held-out 1
    """
    from training.settings import TRUNK

    _fit(_asked(options, TRUNK), run, held_out, workers, device)


@click.command("fit")
@_all(*_DATA, *_FITTED, _HELD_OUT, *_SETTINGS, *_MACHINE)
def fit_command(
    *, run: Path, held_out: tuple[str, ...], workers: int | None, device: str, **options: Any
) -> None:
    """Train a network on the labelled films of PATH into the folder RUN.

    A run that was cut off goes on. PATH is as for `data report`. What is not asked for depends on
    --start and is told first: ImageNet's weights and a network's are fine-tuned in two phases, from
    nothing and from a trunk many epochs of crops come before few of films whole.

    \b
    python -m training fit MURA-v1.1 runs/wrist --area XR_WRIST --held-out valid --start imagenet
    """
    asked = _asked(options)
    _warn_of_seen(asked.start, held_out)
    _fit(asked, run, held_out, workers, device)


def _fit(
    asked: _Asked, run: Path, held_out: tuple[str, ...], workers: int | None, device: str
) -> None:
    from training.fit import fit
    from training.start import state_of

    state = state_of(asked.start)
    _tell(asked, state)
    fit(
        asked.data,
        run,
        asked.settings,
        held_out=held_out,
        start=state,
        device=device,
        workers=workers,
    )
    click.echo(f"written to {run / 'network.pt'}", err=True)


@click.command("cross-validate")
@_all(*_DATA, *_FITTED)
@click.option("--fold", multiple=True, metavar="SPLIT", help="This fold only (again for more).")
@_all(*_SETTINGS, *_MACHINE)
def cross_validate_command(
    *, run: Path, fold: tuple[str, ...], workers: int | None, device: str, **options: Any
) -> None:
    """Train without each fold of PATH in turn, score it, and write RUN/record.json.

    Folds are the splits that PATH states, else five of its patients. A run that was cut off goes
    on. What training starts with must not have seen the folds: `pretrain --held-out`, for each. A
    {fold} in --start stands for the fold's name, so that each goes on from a network of its own.

    \b
    python -m training cross-validate fracatlas runs/generalist --start runs/trunk/network.pt
    """
    from training.crossval import FOLD, cross_validate, study_figures
    from training.folds import folded
    from training.start import state_of

    if FOLD in options["start"] and not options["settings"]:
        raise click.UsageError("A start for each fold needs --settings.")
    areas = options["area"] or tuple(Area)
    data, settings, start = _asked(options)
    folds = sorted({film.split for film in data.films} - {""})
    if len(folds) <= 1:
        data = folded(data, _FOLDS, settings.seed)
        folds = [str(number) for number in range(_FOLDS)]
    named = fold or folds
    if FOLD in start:
        for name in named:
            _warn_of_seen(start.replace(FOLD, name), [name])
    else:
        _warn_of_seen(start, named)
    _tell(_Asked(data, settings, start), state_of(start.replace(FOLD, named[0])))
    record = cross_validate(
        data,
        run,
        settings,
        folds=named,
        areas=areas,
        start=start,
        device=device,
        workers=workers,
    )
    for line in study_figures(record):
        click.echo(line)
    click.echo(f"written to {run / 'record.json'}", err=True)


@click.command("search")
@_all(*_DATA, *_FITTED, _HELD_OUT)
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
@_all(*_SETTINGS, _DEVICE)  # fmt: skip
def search_command(
    *,
    run: Path,
    held_out: tuple[str, ...],
    trials: int,
    folds: int,
    jobs: int,
    device: str,
    **options: Any,
) -> None:
    """Look for better settings by cross-validation of the films that are not held out.

    Rates, weight decay, augmentation, imbalance, epochs of the head alone, frozen blocks, input
    size and padding; the first trial is what the options say. `fit --settings RUN/best.json` takes
    the best. A search that was cut off goes on.

    \b
    python -m training search MURA-v1.1 runs/wrist-search --area XR_WRIST --held-out valid
    """
    from training.search import search
    from training.start import state_of

    _warn_of_seen(options["start"], held_out)
    asked = _asked(options)
    state = state_of(asked.start)
    _tell(asked, state)
    best = search(
        asked.data,
        run,
        asked.settings,
        trials=trials,
        folds=folds,
        held_out=held_out,
        start=state,
        device=device,
        jobs=jobs,
    )
    click.echo(f"study AUC {best.study_auc:.3f}, the best of {best.trials} trials")
    click.echo(f"written to {run / 'best.json'}", err=True)
