"""The command line: flags to settings, errors to exit codes, and nothing else.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 3 done but studies need attention,
4 misconfigured. Each command imports what it needs when it runs, so that ``--help`` and
``query`` answer at once.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from mura_batch import config
from mura_batch.errors import Misconfigured, MuraError

FAILED, ATTENTION, MISCONFIGURED = 1, 3, 4

_COMMANDS = {
    "demo": "trial",
    "init": "site",
    "watch": "site",
    "score": "trial",
    "query": "results",
    "export": "results",
    "rerun": "results",
    "label": "results",
    "models": "models",
    "retrain": "retraining",
    "status": "site",
    "doctor": "site",
    "db": "site",
    "bench": "trial",
}


class _Program(click.Group):
    """Commands by name, imported when asked for; errors end in one line and a code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"mura_batch.cli.{_COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `| head`: click leaves in silence
        except (MuraError, OSError) as exc:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            click.echo(f"mura-batch: {told(exc)}", err=True)
            ctx.exit(code(exc))


def told(error: MuraError | OSError) -> str:
    """Return an error as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def code(error: MuraError | OSError) -> int:
    """Return the exit code that says of which kind an error is."""
    return MISCONFIGURED if isinstance(error, Misconfigured) else FAILED


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Home folder of the site  [default: ${config.PREFIX}HOME, else the platform's]",
)
@click.option("-v", "--verbose", is_flag=True, help="Log every step; show tracebacks.")
@click.version_option(package_name="mura-batch", message="%(prog)s %(version)s")
@click.pass_context
def program(ctx: click.Context, home: Path | None, verbose: bool) -> None:
    """Upper-limb radiograph studies in, probabilities and Grad-CAM overlays out.

    Research use only, not a medical device.

    \b
    mura-batch demo                     see it work on real sample studies
    mura-batch init                     make a home with its weights
    mura-batch watch                    run the daemon
    mura-batch query                    see the results
    """
    if "NO_COLOR" in os.environ:
        ctx.color = False
    _log_to_stderr(logging.DEBUG if verbose else logging.INFO)
    ctx.obj = _home(home)


def _home(given: Path | None) -> Path:
    named = os.environ.get(f"{config.PREFIX}HOME")
    return given or (Path(named) if named else config.default_home())


def settings(ctx: click.Context) -> config.Settings:
    """Return the settings of the home that the command line names."""
    return config.load(ctx.find_object(Path) or config.default_home(), os.environ)


def notice() -> None:
    """Say on standard error what every score is good for."""
    click.echo(config.NOTICE, err=True)


class _Line(logging.Formatter):
    """``time level message key=value …``: the ids that a record carries, nothing else."""

    _OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        ids = " ".join(f"{k}={v}" for k, v in vars(record).items() if k not in self._OWN)
        line = f"{self.formatTime(record)} {record.levelname.lower()} {record.getMessage()}"
        return f"{line} {ids}".rstrip()


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    logger = logging.getLogger("mura_batch")
    logger.handlers[:] = [handler]
    logger.setLevel(level)


def main() -> None:
    """Run the program (the ``mura-batch`` command)."""
    # Torch's threads and numpy's spin while they wait for each other; beside decoders, and on a
    # machine with other work, they would take the time of the thread that they wait for. Numpy's
    # products here are small: they gain nothing from several threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Imports make objects by the hundred thousand and hardly any garbage: looking through them
    # after every 700 was a sixth of the time of `query`.
    gc.set_threshold(20_000, 20, 20)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and tidy up
    program(prog_name="mura-batch")
