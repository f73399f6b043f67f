"""``python -m training``: look at data, fit a network, publish it with its cards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mura_batch.area import Area
from mura_batch.config import NOTICE
from mura_batch.errors import Misconfigured, MuraError
from training.fit_commands import (
    AREA,
    FOLDER,
    FOUND,
    LABELS,
    cross_validate_command,
    fit_command,
    pretrain,
    search_command,
)
from training.sources import fracatlas, read

if TYPE_CHECKING:
    from training.data_report import DataReport, Group

_MOST_SHOWN = 10


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def training() -> None:
    """Train networks from labelled radiographs. Research use only, not a medical device."""


@training.group()
def data() -> None:
    """Look at labelled radiographs before training.

    \b
    python -m training data report MURA-v1.1
    """


@data.command("report")
@click.argument("path", type=FOUND)
@LABELS
@click.option("--json", "as_json", is_flag=True, help="All findings, as one JSON object.")
def data_report(path: Path, labels: Path | None, *, as_json: bool) -> None:
    """Report what PATH holds: counts, contradictions, duplicates, unreadable films.

    PATH is the folder of MURA or FracAtlas, a manifest, a folder of DICOM with --labels, or a home
    with stored labels.

    A manifest is a .csv or .parquet with the columns image, study, patient, area, label (0 or 1)
    and, if wanted, split, boxes, hardware (0 or 1), weight. Boxes are `x y width height; …`, of
    each its centre and its size in shares of the film's width and height.

    \b
    python -m training data report MURA-v1.1
    python -m training data report export --labels labels.csv
    """
    from training.data_report import survey

    click.echo(NOTICE, err=True)
    found = survey(read(path, labels))
    if as_json:
        click.echo(found.to_json())
    else:
        _show(found)


def _show(found: DataReport) -> None:
    """Print a report's tables, and the beginnings of its lists."""
    _table(
        ("split", "area", "patients", "studies", f"not {found.target}", found.target, "images"),
        [
            (
                c.split or "-",
                c.area,
                c.patients,
                c.studies,
                c.negative,
                c.positive,
                c.images,
            )
            for c in found.counts
        ],
    )
    for whole in found.totals:
        several = found.several_areas.get(whole.split, 0)
        click.echo(
            f"{whole.split or 'no split'}: {whole.studies} studies, {whole.negative} not"
            f" {found.target}, {whole.positive} {found.target}; {whole.images} images;"
            f" {whole.patients} patients, {several} of them in more than one area"
        )
    click.echo("\nquantiles (0, 5, 50, 95, 100 %)")
    _table(("", "least", "", "median", "", "most"), [(n, *q) for n, q in found.quantiles.items()])
    films = sum(found.hardware.values())
    told = ", ".join(
        f"{count} {word} ({count / films:.0%})" for word, count in sorted(found.hardware.items())
    )
    click.echo(f"\nhardware or cast: {told}")
    _some("unusable rows", found.problems)
    _some("unreadable films, left out", found.unreadable)
    for exact, name in ((True, "groups of one content"), (False, "groups that look alike")):
        groups = [group for group in found.duplicates if group.exact is exact]
        across = sorted((group for group in groups if group.across), key=_graver)
        click.echo(
            f"\n{name}: {len(groups)}, {len(across)} of them across splits, patients or labels"
        )
        for group in across[:_MOST_SHOWN]:
            click.echo(f"  {', '.join(group.films)} ({', '.join(group.across)})")


def _graver(group: Group) -> tuple[bool, bool]:
    """Sort groups across splits and labels before those that are only of several patients."""
    return "splits" not in group.across, "labels" not in group.across


def _some(name: str, lines: tuple[str, ...]) -> None:
    click.echo(f"\n{name}: {len(lines)}")
    for line in lines[:_MOST_SHOWN]:
        click.echo(f"  {line}")
    if len(lines) > _MOST_SHOWN:
        click.echo("  … (all of them with --json)")


def _table(names: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    cells = [names, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        click.echo("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


@training.command("evaluate")
@click.argument("path", type=FOUND)
@click.argument("folder", type=FOLDER)
@LABELS
@click.option("--home", type=FOUND, help="Home whose weights are used; else the bundled ones.")
@click.option("--weights", metavar="DIGEST", help="These weights of the home, not its active ones.")
@click.option("--area", type=AREA, multiple=True, help="This area only (may be given again).")
@click.option("--split", help="Films of this split only, such as valid.")
def evaluate_command(
    *,
    path: Path,
    folder: Path,
    labels: Path | None,
    home: Path | None,
    weights: str | None,
    area: tuple[str, ...],
    split: str | None,
) -> None:
    """Measure weights on the labelled films of PATH and write the figures to FOLDER.

    Image and study level with intervals over patients, with and without hardware, and where the
    evidence lies if there are boxes: as JSON, CSV and HTML. PATH is as for `data report`.

    \b
    python -m training evaluate MURA-v1.1 evaluation --split valid
    """
    from training.evaluate import evaluate_areas
    from training.evaluation_report import write_report
    from training.start import of_the_bundled

    click.echo(NOTICE, err=True)
    data = read(path, labels).checked().has_splits([] if split is None else [split])
    films = [film for film in data.films if split is None or film.split == split]
    folder.mkdir(parents=True, exist_ok=True)
    found = evaluate_areas(films, area or tuple(Area), home, weights)
    if home is None:
        click.echo(of_the_bundled(), err=True)
    if missing := sorted(set(area) - set(found.cards)):
        click.echo(f"there are no films of {', '.join(missing)}", err=True)
    if others := {card.target for card in found.cards.values()} - {data.target}:
        click.echo(f"these labels say {data.target}, the weights {' and '.join(others)}", err=True)
    write_report(folder, found, {"data": str(path), "split": split, "target": data.target})
    for one in found.evaluations:
        if one.level == "study" and one.stratum == "all":
            auc = one.figures["roc_auc"].words()
            click.echo(f"{one.area}: {one.count} studies, {one.positive} positive, AUC {auc}")
    click.echo(f"written to {folder / 'report.html'}", err=True)


training.add_command(pretrain)
training.add_command(fit_command)
training.add_command(cross_validate_command)
training.add_command(search_command)


@training.command()
@click.argument("data", type=FOLDER)
@click.argument("record", type=FOUND)
@click.argument("run", type=FOLDER)
@click.argument("folder", type=FOLDER)
@click.option(
    "--specialist",
    type=FOUND,
    multiple=True,
    help="Record of a network for some areas: their cards say how it does.",
)
def publish(
    data: Path, record: Path, run: Path, folder: Path, specialist: tuple[Path, ...]
) -> None:
    """Write RUN's network and its cards to FOLDER, calibrated on RECORD's out-of-fold logits.

    \b
    python -m training publish fracatlas runs/generalist/record.json runs/all mura_batch/bundled
    """
    from training.crossval import Record, study_figures
    from training.publish import publish_bundled

    told = Record.read(record)
    special = [Record.read(file) for file in specialist]
    done = publish_bundled(fracatlas.read(data).checked().films, told, run, folder, special)
    for line in study_figures(told):
        click.echo(line)
    click.echo(f"written to {done}", err=True)


@training.command()
@click.argument("records", type=FOUND, default="training/records")
@click.argument("folder", type=FOLDER, default="training")
@click.option("--data", type=FOUND, help="The films, to draw overlays of some; with --run.")
@click.option("--run", type=FOUND, help="Folder of the cross-validation of generalist.json.")
def report(records: Path, folder: Path, data: Path | None, run: Path | None) -> None:
    """Write REPORT.md, .html and with weasyprint .pdf into FOLDER, from the run records in RECORDS.

    RECORDS holds generalist.json and, where there are some, data.json, specialists/*.json,
    variants/*.json, and parts/*.json with parts/base.json: what `cross-validate` and
    `data report --json` write; and trunks/*/: run.json and outcome.json of each `pretrain`.

    \b
    python -m training report training/records training
    """
    from training.crossval import Record
    from training.pictures import draw
    from training.report import GENERALIST, write_note

    click.echo(NOTICE, err=True)
    if (data is None) != (run is None):
        raise click.UsageError("--data and --run go together.")
    if data is not None and run is not None:
        draw(Record.read(records / GENERALIST), read(data).checked().films, run, folder / "figures")
    for file in write_note(records, folder):
        click.echo(f"written to {file}", err=True)


def main() -> None:
    """Run a command; errors are one line, and as for ``mura-batch`` exit code 4 or 1."""
    try:
        training(prog_name="python -m training", standalone_mode=True)
    except MuraError as exc:
        click.echo(f"python -m training: {exc}", err=True)
        sys.exit(4 if isinstance(exc, Misconfigured) else 1)
    except OSError as exc:
        click.echo(f"python -m training: {exc.filename or ''}: {exc.strerror or exc}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
