"""Commands that need no home: demo, score, bench."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mura_batch import cli
from mura_batch.area import Area
from mura_batch.cli.results import AREA, SHARE, study_table

if TYPE_CHECKING:
    from mura_batch.direct import Scored


@click.command()
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Run the program on bundled real sample studies, in a throw-away home.

    \b
    mura-batch demo
    """
    from mura_batch.demo import run_demo

    cli.notice()
    if not ctx.find_root().params["verbose"]:
        logging.getLogger("mura_batch").setLevel(logging.WARNING)
    home = Path(tempfile.mkdtemp(prefix="mura-batch-demo-"))
    click.echo("scoring real sample studies (FracAtlas, CC BY 4.0) …", err=True)
    done = run_demo(home)
    study_table(done.studies)
    click.echo("\noverlays:")
    for image in done.images:
        if image.overlay:
            click.echo(f"  {home / image.overlay}")
    click.echo(
        f"\ntry next:\n  mura-batch --home {home} query --images"
        f"\n  mura-batch --home {home} query --json"
        "\n  mura-batch init && mura-batch watch"
    )


class _Named(click.Path):
    """A path that was given; an empty one, of a variable without a value, is not the folder."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        if not os.fspath(value):
            self.fail("a path is empty", param, ctx)
        return super().convert(value, param, ctx)


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=_Named(path_type=Path))
@click.option("--area", type=AREA, help="Score everything as this area.")
@click.option("--weights", metavar="FILE|DIGEST", help="Use these weights (with --area).")
@click.option("--threshold", type=SHARE, help="Decide at this threshold.")
@click.option(
    "--overlay", type=click.Path(file_okay=False, path_type=Path), help="Folder for overlays."
)
@click.option("--save", is_flag=True, help="Keep the results in the home's database.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array, a row a view.")
@click.pass_context
def score(
    ctx: click.Context,
    paths: tuple[Path, ...],
    area: str | None,
    weights: str | None,
    threshold: float | None,
    overlay: Path | None,
    save: bool,
    as_json: bool,
) -> None:
    """Score files or folders where they are; nothing is moved, nothing is kept without --save.

    3 when any study was not scored.

    \b
    mura-batch score wrist.png --area XR_WRIST
    mura-batch score MURA-v1.1/valid/XR_HAND --json > hand.json
    """
    from dataclasses import replace

    from tqdm import tqdm

    from mura_batch.direct import Request, score_paths

    settings = cli.settings(ctx)
    if threshold is not None:
        settings = replace(settings, threshold=threshold)
    file = Path(weights) if weights and Path(weights).is_file() else None
    logging.getLogger("mura_batch").setLevel(logging.WARNING)
    cli.notice()
    scored = score_paths(
        settings,
        Request(
            paths,
            area=Area(area) if area else None,
            weights_file=file,
            weights_digest=None if file else weights,
            overlays=overlay,
            save=save,
        ),
        track=lambda studies: tqdm(studies, desc="scoring", unit="study", disable=None),
    )
    _print_scored(scored, as_json=as_json)
    if any(row.state != "done" for row in scored.studies):
        ctx.exit(cli.ATTENTION)


def _print_scored(scored: Scored, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in scored.images], indent=1))
        return
    study_table(scored.studies)
    for image in scored.images:
        if image.error and image.study.state == "done":
            click.echo(f"{image.image}: {image.error}", err=True)
        if image.overlay:
            click.echo(f"{image.image}: {image.overlay}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def bench(ctx: click.Context, as_json: bool) -> None:
    """Measure images/s of every runtime on this machine, model only and end to end.

    \b
    mura-batch bench
    mura-batch bench --json > bench.json
    """
    from mura_batch.bench import measure

    del ctx
    logging.getLogger("mura_batch").setLevel(logging.ERROR)
    cli.notice()
    report = measure(lambda line: click.echo(line, err=True))
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else report.to_text())
