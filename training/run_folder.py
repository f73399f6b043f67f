"""What a run leaves in its folder, whole or not at all."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import pickle
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mura_batch
import training
from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured, Transient, WeightsRefused
from mura_batch.weights import sha256_of
from training.dataset import Film
from training.settings import FitSettings, settings_of

_DESCRIBED = ("held_out", "start", "data", "films", "aside", "versions", "threads")
# What torch raises of a file that is none of its own: pickles end in many ways.
UNREADABLE = (
    AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    pickle.UnpicklingError,
)  # fmt: skip
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


@contextmanager
def in_turn(lock: Path) -> Iterator[None]:
    """Wait until no other process is where this one goes; ``lock`` is a file for this alone."""
    with lock.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def made_of(
    settings: FitSettings,
    films: Sequence[Film],
    aside: Sequence[Film],
    *,
    target: str,
    held_out: Collection[str],
    start: Mapping[str, Tensor],
) -> dict[str, object]:
    """Return what a run is made of; ``start`` is the state that it begins with."""
    return {
        "target": target,
        "held_out": sorted(held_out),
        "start": state_digest(start),
        "settings": asdict(settings),
        "data": data_digest([*films, *aside]),
        "films": len(films),
        "aside": len(aside),
        "versions": {name: version(name) for name in ("mura-batch", "torch", "torchvision")}
        | {"python": platform.python_version(), "code": code_digest()},
        "threads": torch.get_num_threads(),
    }


def code_digest() -> str:
    """Return the beginning of a digest of this program's own source."""
    digest = hashlib.sha256()
    for package in (mura_batch, training):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root.parent)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def compare(told: Mapping[str, object], file: Path, compared: Sequence[str]) -> bool:
    """Hold what a folder's run is made of against its file; False where there is none yet.

    Raises:
        Misconfigured: the file says otherwise of what is ``compared``, or is damaged.
    """
    if not file.exists():
        if left := sorted(file.parent.glob("*.pt")):
            raise Misconfigured(f"{left[0]} lies there without {file.name}: name another folder.")
        return False
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
    return True


def read_settings(file: Path) -> FitSettings:
    """Return the settings in ``run.json`` of a run, or ``best.json`` of a search.

    Raises:
        Misconfigured: they are missing or damaged.
    """
    try:
        return settings_of(json.loads(file.read_text(encoding="utf-8"))["settings"])
    except KeyError as exc:
        raise Misconfigured(f"{file} says nothing of {exc}: it is no run's settings.") from exc
    except (OSError, ValueError, TypeError, RecursionError, WeightsRefused) as exc:
        raise Misconfigured(f"{file} holds no settings of a run: {exc}") from exc


def described(run: Path) -> dict[str, Any]:
    """Return what :func:`made_of` said of a run, but for its settings (:func:`read_settings`).

    Raises:
        Misconfigured: its ``run.json`` is missing or damaged.
    """
    file = run / "run.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        found = {name: told[name] for name in _DESCRIBED}
        sound = all(isinstance(text, str) for text in (found["start"], *found["held_out"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise Misconfigured(f"{file} does not say how a run is made: {exc!r}") from exc
    if not sound:
        raise Misconfigured(f"{file} does not say how a run is made: start or held_out is no text.")
    return found


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
    except FileNotFoundError as exc:
        raise Misconfigured(f"{file} is gone: remove {file.parent} to begin again.") from exc
    except UNREADABLE as exc:
        raise damaged(file) from exc
    if not isinstance(state, dict):
        raise damaged(file)
    return state


def made_by(run: Path) -> dict[str, Tensor]:
    """Return the state of the network that a run made.

    Raises:
        Misconfigured: it is missing, damaged, or not the one that ``outcome.json`` tells of.
    """
    file = run / "network.pt"
    state = read_state(file)
    try:
        told = json.loads((run / "outcome.json").read_text(encoding="utf-8"))["network"]
        if state_digest(state) != told:
            raise damaged(file)
    except UNREADABLE as exc:
        raise damaged(file) from exc
    return state


def damaged(file: Path) -> Misconfigured:
    """Return the error of a run that cannot go on from what its folder holds."""
    return Misconfigured(f"{file} is damaged: remove {file.parent} to begin this run again.")


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
