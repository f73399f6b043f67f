"""Commands about a site: init, watch, status, doctor, db."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mura_batch import cli, config
from mura_batch.area import Area
from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured, MuraError, Transient

if TYPE_CHECKING:
    from mura_batch.weights import WeightsStore


@click.command()
@click.option("--fetch/--no-fetch", default=True, help="Try to download the published weights.")
@click.pass_context
def init(ctx: click.Context, fetch: bool) -> None:
    """Make the home: folders, a commented config.toml, the database, weights.

    On an existing home it adds what is missing and changes nothing else.

    \b
    mura-batch init
    mura-batch --home /srv/mura init --no-fetch
    """
    from mura_batch import database
    from mura_batch.weights import WeightsStore

    settings = cli.settings(ctx)
    try:
        folders = (settings.work, settings.archive_dir, settings.quarantine)
        for folder in (*folders, settings.inbox_dir, settings.overlays_dir, settings.weights_dir):
            folder.mkdir(parents=True, exist_ok=True)
        if not settings.config_file.exists():
            text = config.commented_toml().encode()
            write_atomic(settings.config_file, lambda stream: stream.write(text))
    except OSError as exc:
        raise Misconfigured(f"{exc.filename}: {exc.strerror}; choose another --home") from exc
    database.upgrade(settings.database_url)
    weights = WeightsStore(settings.weights_dir)
    if fetch:
        _fetch_missing(weights, settings.weights_url)
    weights.install_bundled()
    click.echo(f"home: {settings.home}")
    for area in Area:
        click.echo(f"{area}: {weights_line(weights, area)}")
    click.echo(f"Drop studies into {settings.inbox_dir} and run `mura-batch watch`.", err=True)


def _fetch_missing(weights: WeightsStore, base_url: str) -> None:
    """Fetch published weights for areas that have none; stop at the first server out of reach."""
    from mura_batch.cli.models import fetch_with_progress
    from mura_batch.weights_fetch import FIRST_USE

    for area in Area:
        if weights.active(area) is not None:
            continue
        try:
            fetch_with_progress(area, base_url, weights, patience=FIRST_USE)
        except Transient as exc:
            click.echo(f"published weights: {exc}", err=True)
            click.echo(
                "going on with the bundled ones; `mura-batch models fetch` tries again", err=True
            )
            return
        except MuraError as exc:
            click.echo(f"{area}: {exc}", err=True)


def weights_line(weights: WeightsStore, area: Area) -> str:
    """Return which weights an area runs on, in a line."""
    try:
        card = weights.active(area)
    except MuraError as exc:
        return str(exc)
    if card is None:
        return f"none: run `mura-batch models fetch {area}` or `mura-batch init`"
    return f"{card.short} {card.origin}, trained to find: {card.target}"


@click.command()
@click.option("--once", is_flag=True, help="Score what is there, then leave.")
@click.pass_context
def watch(ctx: click.Context, once: bool) -> None:
    """Run the daemon in the foreground; SIGTERM and SIGINT finish what is begun and leave.

    With --once: 0 when every study is done, 3 when any was quarantined, failed or waits, or
    could not be taken from the inbox.

    \b
    mura-batch watch
    mura-batch watch --once
    """
    from mura_batch.daemon import Daemon
    from mura_batch.inbox import BLOCKED
    from mura_batch.systemd import ServiceManager

    _share_free_memory()
    settings = cli.settings(ctx)
    manager = ServiceManager.from_environment(os.environ)
    daemon = Daemon(settings, notify=manager.notify)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())
    cli.notice()
    summary = daemon.run(once=once)
    states = ", ".join(f"{count} {state}" for state, count in sorted(summary.finished.items()))
    click.echo(f"{states or 'nothing new'}; {summary.waiting} waiting", err=True)
    if summary.untaken:
        click.echo(
            f"{summary.untaken} could not be taken: check the permissions of the inbox and"
            " of the home folder, and the free disk",
            err=True,
        )
    if summary.blocked:
        click.echo(f"{BLOCKED} ({summary.blocked} folders)", err=True)
    if once and summary.needs_attention:
        ctx.exit(cli.ATTENTION)


_M_ARENA_MAX = -8  # of glibc's malloc.h


def _share_free_memory() -> None:
    """Let glibc's malloc keep two pools of freed memory instead of eight for each core.

    Films come and go on a dozen threads; with a pool for each of them the daemon's memory grew by
    10 % between the 200th and the 2,000th study, with two by 0.3 % (tests/bench/memory.py).
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show the queue, the last scan, throughput, weights, stale results and free disk.

    \b
    mura-batch status
    """
    from mura_batch.lock import is_watched
    from mura_batch.results import Results
    from mura_batch.weights import WeightsStore

    settings = cli.settings(ctx)
    weights = WeightsStore(settings.weights_dir)
    active = {}
    for area in Area:
        try:
            card = weights.active(area)
        except MuraError:
            continue
        if card is not None:
            active[area] = card.sha256
    with Results.open(settings.database_url) as results:
        counts = results.counts(datetime.now(UTC) - timedelta(hours=1))
        stale = results.stale(active)
    facts: dict[str, Any] = {
        "home": str(settings.home),
        "studies": counts.studies,
        "states": {str(state): count for state, count in counts.states.items()},
        "queued": counts.queued,
        "running": counts.running,
        "oldest_waiting": counts.oldest and counts.oldest.isoformat(),
        "views_last_hour": counts.views,
        "last_scored_at": counts.last_scored_at and counts.last_scored_at.isoformat(),
        "daemon": {"running": is_watched(settings.home)} | _last_word(settings.home),
        "stale_results": stale,
        "weights": {str(area): weights_line(weights, area) for area in Area},
        "free_disk_gb": round(shutil.disk_usage(settings.home).free / 1e9, 1),
        "notice": config.NOTICE,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{name.replace('_', ' ')}:")
            for key, item in value.items():
                click.echo(f"  {key}: {item}")
        else:
            click.echo(f"{name.replace('_', ' ')}: {'-' if value is None else value}")


def _last_word(home: Path) -> dict[str, Any]:
    """Return what the daemon last said of itself, nothing where none has run."""
    from mura_batch.config import STATUS_FILE

    try:
        known: dict[str, Any] = json.loads((home / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


@click.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check the site and say what to do about what is wrong; 3 where something is.

    \b
    mura-batch doctor
    """
    from mura_batch.doctor import examine

    wrong = 0
    for finding in examine(cli.settings(ctx)):
        mark = "ok  " if finding.ok else "look"
        click.secho(f"{mark}  {finding.what}", fg=None if finding.ok else "yellow")
        wrong += not finding.ok
    if wrong:
        click.echo(f"{wrong} to look at", err=True)
        ctx.exit(cli.ATTENTION)


@click.group()
def db() -> None:
    """Look after the results database.

    \b
    mura-batch db upgrade
    mura-batch db backup results-copy.db
    """


@db.command("upgrade")
@click.pass_context
def db_upgrade(ctx: click.Context) -> None:
    """Make the database, or bring it to this version's revision.

    \b
    mura-batch db upgrade
    """
    from mura_batch import database

    url = cli.settings(ctx).database_url
    database.upgrade(url)
    click.echo(f"revision {database.current(url)}")


@db.command("current")
@click.pass_context
def db_current(ctx: click.Context) -> None:
    """Print the database's revision.

    \b
    mura-batch db current
    """
    from mura_batch import database

    click.echo(database.current(cli.settings(ctx).database_url) or "none")


@db.command("check")
@click.pass_context
def db_check(ctx: click.Context) -> None:
    """Check revision, tables and integrity; 1 where something is wrong.

    \b
    mura-batch db check
    """
    from mura_batch import database

    problems = database.check(cli.settings(ctx).database_url)
    for problem in problems:
        click.echo(problem)
    if problems:
        ctx.exit(cli.FAILED)
    click.echo("ok")


@db.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.pass_context
def db_backup(ctx: click.Context, file: Path) -> None:
    """Copy the database to FILE, also while the daemon runs.

    \b
    mura-batch db backup results-copy.db
    """
    from mura_batch import database

    database.backup(cli.settings(ctx).database_url, file)
    click.echo(f"copied to {file}")
