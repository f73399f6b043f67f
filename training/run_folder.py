"""What a run leaves in its folder, whole or not at all."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import pickle
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured, Transient
from mura_batch.weights import sha256_of
from training.dataset import Film
from training.settings import FitSettings, settings_of

_PLACES = ("path", "where", "split")  # of a film: where it stands, not what is trained on


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder.

    Raises:
        Transient: one is in it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Transient(
                f"{run}: another process trains in it: wait for it, or end it."
            ) from exc
        yield


def describe(
    run: Path,
    settings: FitSettings,
    films: Sequence[Film],
    aside: Sequence[Film],
    besides: Mapping[str, object],
) -> None:
    """Write what a run is made of, or hold it against what is there.

    ``besides`` has what was held out, and the digest of the state to begin with (``start``).

    Raises:
        Misconfigured: the folder holds another run.
    """
    told = {
        **besides,
        "settings": asdict(settings),
        "data": data_digest([*films, *aside]),
        "films": len(films),
        "aside": len(aside),
        "versions": {name: version(name) for name in ("mura-batch", "torch", "torchvision")}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }
    write_or_compare(told, run / "run.json", ("settings", "start", "data"))


def write_or_compare(told: Mapping[str, object], file: Path, compared: Sequence[str]) -> None:
    """Write what a folder's run is made of, or hold it against what is there.

    Raises:
        Misconfigured: the file says otherwise of what is ``compared``, or is damaged.
    """
    if not file.exists():
        if left := sorted(file.parent.glob("*.pt")):
            raise Misconfigured(f"{left[0]} lies there without {file.name}: name another folder.")
        write_json(told, file)
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        here = json.loads(json.dumps(told))
        differing = [name for name in compared if before[name] != here[name]]
    except (ValueError, KeyError, TypeError) as exc:
        raise Misconfigured(f"{file} is damaged: name another folder.") from exc
    if differing:
        raise Misconfigured(
            f"{file.parent} holds another run ({', '.join(differing)} differ): name another folder."
        )


def read_settings(file: Path) -> FitSettings:
    """Return the settings in ``run.json`` of a run, or ``best.json`` of a search.

    Raises:
        Misconfigured: they are missing or damaged.
    """
    try:
        return settings_of(json.loads(file.read_text(encoding="utf-8"))["settings"])
    except KeyError as exc:
        raise Misconfigured(f"{file} says nothing of {exc}: it is no run's settings.") from exc
    except (OSError, ValueError, TypeError) as exc:
        raise Misconfigured(f"{file} holds no settings of a run: {exc}") from exc


def held_out(run: Path) -> list[str]:
    """Return the splits that a run was trained without.

    Raises:
        Misconfigured: its ``run.json`` is missing or damaged.
    """
    try:
        told = json.loads((run / "run.json").read_text(encoding="utf-8"))["held_out"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise Misconfigured(f"{run / 'run.json'} is damaged: it should say how.") from exc
    return [str(name) for name in told]


def data_digest(films: Sequence[Film]) -> str:
    """Return a digest of all that is trained on: the files' contents and what is told of them."""
    digest = hashlib.sha256()
    for film in films:
        told = {name: value for name, value in asdict(film).items() if name not in _PLACES}
        digest.update(repr((sha256_of(film.path), told)).encode())
    return digest.hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return a digest of a network's names and numbers."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def write_json(told: object, file: Path, *, indent: int | None = 1) -> None:
    """Write a record whole or not at all."""
    text = json.dumps(told, indent=indent, allow_nan=False) + "\n"
    write_atomic(file, lambda stream: stream.write(text.encode()))


def write_log(file: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write the figures of a run's epochs as CSV."""
    stream = io.StringIO()
    table = csv.DictWriter(stream, ("epoch", *history[-1]))
    table.writeheader()
    table.writerows({"epoch": n, **told} for n, told in enumerate(history, start=1))
    write_atomic(file, lambda out: out.write(stream.getvalue().encode()))


def read_state(file: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return what :func:`save` wrote.

    Raises:
        Misconfigured: the file is missing or damaged.
    """
    try:
        state = torch.load(file, weights_only=True, map_location=device)
    except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as exc:
        raise Misconfigured(f"{file} is damaged: remove {file.parent} to begin again.") from exc
    if not isinstance(state, dict):
        raise Misconfigured(f"{file} holds no state: remove {file.parent} to begin again.")
    return state


def save(state: object, target: Path) -> None:
    """Write a state whole or not at all.

    Raises:
        Transient: the disk is full.
    """
    try:
        write_atomic(target, lambda stream: torch.save(state, stream))
    except (OSError, RuntimeError) as exc:
        raise Transient(
            f"{target} cannot be written ({str(exc).splitlines()[0]}): make room; the same command"
            " goes on after the last whole epoch."
        ) from exc
