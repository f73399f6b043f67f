"""Commands about results: query, export, rerun, label."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mura_batch import cli
from mura_batch.area import Area
from mura_batch.errors import Misconfigured, listed

if TYPE_CHECKING:
    from mura_batch.records import Filters, ImageRow, LabelRow, StudyRow
    from mura_batch.results import Results

Command = TypeVar("Command", bound=Callable[..., Any])

_LABELS: dict[str, Literal["positive", "negative"]] = {
    "positive": "positive",
    "1": "positive",
    "negative": "negative",
    "0": "negative",
}
_MOST_LABELS = 100 << 20  # bytes of a CSV
_STATES = ("done", "failed", "quarantined", "needs_area", "no_weights", "queued", "running")
_STUDY_COLUMNS = (
    "study",
    "area",
    "state",
    "probability",
    "calibrated",
    "decision",
    "target",
    "views",
    "source",
)
_HISTORY_COLUMNS = (*_STUDY_COLUMNS[:-1], "revision", "weights", "scored_at", "source")
_IMAGE_COLUMNS = ("study", "area", "state", "image", "probability", "overlay", "error")


def moment(text: str) -> datetime:
    """Return a point in time: an ISO 8601 date or time; without an offset it is UTC."""
    try:
        given = datetime.fromisoformat(text)
        return (given if given.tzinfo else given.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        raise click.BadParameter(f"{text!r} is no time, such as 2026-11-23T08:00Z") from exc


class _AreaName(click.ParamType[str]):
    """``XR_HAND`` …, in any case; shown as AREA, since seven names fill a line."""

    name = "area"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value.upper() not in set(Area):
            self.fail(f"{value!r} is none of {', '.join(Area)}", param, ctx)
        return value.upper()


AREA = _AreaName()


class _Share(click.FloatRange):
    """A number from 0 to 1; unlike click's own range it is no ``nan``."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is no number from 0 to 1", param, ctx)
        return number


SHARE = _Share(0, 1)

_FILTERS: dict[str, dict[str, Any]] = {
    "study": {"help": "Study id, or its beginning."},
    "area": {"type": AREA, "help": "Such as XR_HAND."},
    "state": {"type": click.Choice(_STATES)},
    "decision": {"type": click.Choice(["positive", "negative"])},
    "since": {"type": moment, "help": "Received at or after this time."},
    "until": {"type": moment, "help": "Received before this time."},
    "min_probability": {"type": SHARE, "help": "Of the raw probability."},
    "max_probability": {"type": SHARE},
    "weights": {"help": "Digest of the weights, or its beginning."},
    "reason": {"help": "Reason code, such as truncated or needs_area."},
}


def filter_options(command: Command) -> Command:
    """Add the options that choose results."""
    for name, settings in reversed(_FILTERS.items()):
        command = click.option("--" + name.replace("_", "-"), **settings)(command)
    return command


def filters(given: dict[str, Any]) -> Filters:
    """Return the filters that the options of :func:`filter_options` ask for."""
    from mura_batch.records import Filters, State

    area, state = given["area"], given["state"]
    return Filters(
        **given | {"area": Area(area) if area else None, "state": State(state) if state else None}
    )


@click.command()
@filter_options
@click.option("--images", is_flag=True, help="One row a view.")
@click.option("--history", is_flag=True, help="Superseded revisions too.")
@click.option("--limit", type=click.IntRange(1, 10**12), help="Rows at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV with a header.")
@click.pass_context
def query(
    ctx: click.Context,
    /,
    images: bool,
    history: bool,
    limit: int | None,
    as_json: bool,
    as_csv: bool,
    **given: Any,
) -> None:
    """Show results: a row per study and area.

    \b
    mura-batch query --area XR_WRIST --decision positive
    mura-batch query --state needs_area
    mura-batch query --images --json > views.json
    """
    from dataclasses import replace

    from mura_batch.results import Results

    if as_json and as_csv:
        raise click.UsageError("one of --json and --csv")
    chosen = replace(filters(given), history=history, limit=limit)
    cli.notice()
    with Results.open(cli.settings(ctx).database_url) as results:
        rows = results.images(chosen) if images else results.query(chosen)
        if as_json:
            _print_json(rows)
        elif as_csv:
            _print_csv(results, chosen, images=images)
        else:
            names = _HISTORY_COLUMNS if history else _STUDY_COLUMNS
            if not study_table(rows, _IMAGE_COLUMNS if images else names):
                click.echo("nothing matches", err=True)


def _print_json(rows: Iterator[StudyRow] | Iterator[ImageRow]) -> None:
    separator = "["
    for row in rows:
        click.echo(f"{separator}\n{json.dumps(row.to_dict())}", nl=False)
        separator = ","
    click.echo("[]" if separator == "[" else "\n]")


def _print_csv(results: Results, chosen: Filters, *, images: bool) -> None:
    from mura_batch.export import write_csv
    from mura_batch.records import IMAGE_FIELDS, STUDY_FIELDS

    fields = IMAGE_FIELDS if images else STUDY_FIELDS
    write_csv(results.blocks(chosen, images=images), fields, sys.stdout)


def study_table(
    rows: Iterable[StudyRow] | Iterable[ImageRow], names: Sequence[str] = _STUDY_COLUMNS
) -> int:
    """Print result rows as a table, on standard error the reasons; return how many rows."""
    told = [row.to_dict() for row in rows]
    show_table(names, [[_cell(row, name) for name in names] for row in told])
    for reason in dict.fromkeys(
        f"{row['study']}: {row['reason']}" for row in told if row["reason"]
    ):
        click.echo(reason, err=True)
    return len(told)


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name == "views" and row["views_failed"]:
        return f"{value - row['views_failed']} of {value}"
    if name == "weights":
        return str(value)[:12]
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def show_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; headers are bold on a terminal."""
    widths = [max(len(line[i]) for line in (names, *rows)) for i in range(len(names))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()

    click.secho(line(names), bold=True)
    for row in rows:
        click.echo(line(row))


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@filter_options
@click.option("--level", type=click.Choice(["study", "image"]), default="study", show_default=True)
@click.option("--history", is_flag=True, help="Superseded revisions too.")
@click.pass_context
def export(ctx: click.Context, /, file: Path, level: str, history: bool, **given: Any) -> None:
    """Write results to FILE: .csv, .parquet or .jsonl, by its ending.

    \b
    mura-batch export results.csv
    mura-batch export wrists.parquet --area XR_WRIST --level image
    """
    from dataclasses import replace

    from mura_batch.export import export as write_export
    from mura_batch.results import Results

    chosen = replace(filters(given), history=history)
    cli.notice()
    with Results.open(cli.settings(ctx).database_url) as results:
        count = write_export(results, file, chosen, "image" if level == "image" else "study")
    click.echo(f"{count} rows written to {file}", err=True)


@click.command()
@click.argument("studies", nargs=-1, metavar="[STUDY]...")
@filter_options
@click.option("--failed", is_flag=True, help="Those that failed.")
@click.option("--stale", is_flag=True, help="Those scored with weights no longer active.")
@click.option("--set-area", type=AREA, help="The area, as a person sees it.")
@click.pass_context
def rerun(
    ctx: click.Context,
    /,
    studies: tuple[str, ...],
    failed: bool,
    stale: bool,
    set_area: str | None,
    **given: Any,
) -> None:
    """Queue studies again: by id, by filter, the failed, the stale, or with an area set.

    The daemon, or the next `watch --once`, scores them from where their files lie.

    \b
    mura-batch rerun 3f2a --set-area XR_WRIST
    mura-batch rerun --stale
    """
    from mura_batch.records import Rerun
    from mura_batch.store import Store
    from mura_batch.weights import WeightsStore

    filtered = any(value is not None for value in given.values())
    if not (studies or filtered or failed or stale):
        raise click.UsageError("name studies, a filter, --failed or --stale")
    settings = cli.settings(ctx)
    active = None
    if stale:
        weights = WeightsStore(settings.weights_dir)
        cards = {area: weights.active(area) for area in Area}
        active = {area: card.sha256 for area, card in cards.items() if card is not None}
    which = Rerun(
        studies=studies,
        filters=filters(given) if filtered else None,
        failed=failed,
        stale=active,
    )
    with Store.open(settings.database_url) as store:
        queued = store.rerun(which, Area(set_area) if set_area else None)
    for study in queued:
        click.echo(study)
    click.echo(f"{len(queued)} studies queued again", err=True)


@click.group()
def label() -> None:
    """Keep the truth about studies, as people state it.

    \b
    mura-batch label set 3f2a positive
    mura-batch label import truth.csv
    """


@label.command("set")
@click.argument("study")
@click.argument("value", type=click.Choice(["positive", "negative"]), metavar="positive|negative")
@click.option("--area", type=AREA, help="For one area of the study only.")
@click.pass_context
def label_set(ctx: click.Context, study: str, value: str, area: str | None) -> None:
    """Set the label of one study.

    \b
    mura-batch label set 3f2a positive
    """
    row = {"study": study, "label": value, "area": area or ""}
    _store_labels(ctx, {f"the label of {study}": row})


@label.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_context
def label_import(ctx: click.Context, file: Path) -> None:
    """Import labels from a CSV with the columns study, label and, if wanted, area.

    A label is positive or negative, or 1 or 0. A study is named by its id, its folder in the
    inbox, or its StudyInstanceUID.

    \b
    mura-batch label import truth.csv
    """
    _store_labels(ctx, _label_table(file))


def _label_table(file: Path) -> dict[str, dict[str, str]]:
    """Return a CSV's rows by their places."""
    if not file.is_file() or file.stat().st_size > _MOST_LABELS:
        raise Misconfigured(f"{file} is no file of at most {_MOST_LABELS >> 20} MiB: split it")
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream, restval="")
            columns = {name: name.strip() for name in table.fieldnames or ()}
            if missing := {"study", "label"} - {*columns.values()}:
                names = " and ".join(sorted(missing, reverse=True))
                raise Misconfigured(f"{file}:1 has no column {names}: commas part the columns")
            rows = {
                f"{file}:{table.line_num}": {columns[k]: (row[k] or "").strip() for k in columns}
                for row in table
            }
    except (UnicodeDecodeError, csv.Error) as exc:
        raise Misconfigured(f"{file} is no CSV in UTF-8 ({exc}): save it as such") from exc
    if not rows:
        raise Misconfigured(f"{file} has no rows: no label was stored")
    return rows


def _store_labels(ctx: click.Context, rows: dict[str, dict[str, str]]) -> None:
    from mura_batch.store import Store

    truth, problems = [], []
    for place, row in rows.items():
        try:
            truth.append(_label_row(row))
        except ValueError as exc:
            problems.append(f"{place} {exc}")
    if problems:
        raise Misconfigured(f"No label was stored: {listed(problems)}.")
    with Store.open(cli.settings(ctx).database_url) as store:
        count = store.set_labels(truth)
    click.echo(f"{count} labels stored", err=True)


def _label_row(row: dict[str, str]) -> LabelRow:
    """Return a line of a CSV as a label; ValueError says what it needs."""
    from mura_batch.records import LabelRow

    value, area = _LABELS.get(row.get("label") or ""), row.get("area") or None
    if value is None or not row.get("study"):
        raise ValueError("needs a study and a label, positive (1) or negative (0)")
    if area not in {None, *Area}:
        raise ValueError(f"needs an area of {', '.join(Area)}, not {area!r}")
    return LabelRow(row["study"], value, Area(area) if area else None)


@label.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_context
def label_list(ctx: click.Context, as_json: bool) -> None:
    """List the stored labels.

    \b
    mura-batch label list --json
    """
    from mura_batch.results import Results

    names = ("study", "label", "area", "by", "at")
    with Results.open(cli.settings(ctx).database_url) as results:
        rows = [[str(getattr(row, name) or "") for name in names] for row in results.labels()]
    if as_json:
        click.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=1))
    else:
        show_table(names, rows)
