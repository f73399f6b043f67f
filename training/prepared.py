"""Films as a network sees them, read once and kept in a file that epochs map into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm import tqdm

from mura_batch.atomic import write_atomic
from mura_batch.errors import Transient
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from training.dataset import Edges, Film
from training.processes import pool_of
from training.run_folder import in_turn

_HEADROOM = 1.2  # films are kept this much larger than the input, so that zooming in is sharp
_READERS = 2  # processes
_CHUNK = 16  # films that a process reads at a time
_FEW = 200  # films that one process has read before others have started

_Read = tuple[NDArray[np.uint8], tuple[Edges, ...]]


class Prepared(NamedTuple):
    """Films of one preprocessing, in the order in which they were given.

    Attributes:
        file: uint8 (N, S, S) in NumPy's format.
        boxes: each film's boxes, in shares of the square that the network sees, cut to it.
    """

    file: Path
    boxes: tuple[tuple[Edges, ...], ...]

    def mapped(self) -> NDArray[np.uint8]:
        """Return the films, mapped into memory."""
        pixels: NDArray[np.uint8] = np.load(self.file, mmap_mode="r")
        return pixels


def prepared(
    films: Sequence[Film],
    spec: Preprocessing,
    folder: Path,
    *,
    headroom: bool = False,
) -> Prepared:
    """Return the films, read where ``folder`` does not have them yet.

    With ``headroom`` S is larger than the network's input. The file's name says of which films
    and how. Several processes read them where they are many.

    Raises:
        Misconfigured: a film cannot be read.
    """
    if headroom:
        spec = replace(spec, size=round(spec.size * _HEADROOM))
    told = repr([_identity(film) for film in films]) + repr(spec)
    name = f"films-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    file, boxes = folder / f"{name}.npy", folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with in_turn(folder / f"{name}.lock"):  # who comes second finds them read
        found = _kept(file, boxes, len(films))
        if found is None:
            part = file.with_suffix(".part")
            found = _read_all(films, spec, part, _READERS if len(films) > _FEW else 0)
            text = json.dumps(found).encode()
            write_atomic(boxes, lambda stream: stream.write(text))
            part.replace(file)
    return Prepared(file, found)


def _kept(file: Path, boxes: Path, count: int) -> tuple[tuple[Edges, ...], ...] | None:
    """Return the boxes if both files are whole, else None: they are made anew."""
    try:
        told = json.loads(boxes.read_text(encoding="utf-8"))
        kept = tuple(tuple(_four(*box) for box in of_film) for of_film in told)
        whole = len(kept) == len(np.load(file, mmap_mode="r")) == count
    except (OSError, TypeError, ValueError, EOFError):
        return None
    return kept if whole else None


def _four(left: float, top: float, right: float, bottom: float) -> Edges:
    return left, top, right, bottom


def _read_all(
    films: Sequence[Film], spec: Preprocessing, file: Path, workers: int
) -> tuple[tuple[Edges, ...], ...]:
    """Write the films' pixels and return their boxes."""
    shape = (len(films), spec.size, spec.size)
    pixels = open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    _take_room(file)
    found: list[tuple[Edges, ...]] = []
    with _mapping(workers) as mapped:
        read = mapped(partial(_read, spec), films)
        for number, (seen, boxes) in enumerate(
            tqdm(read, desc="reading films", total=len(films), disable=None)
        ):
            pixels[number] = seen
            found.append(boxes)
    pixels.flush()
    return tuple(found)


def _take_room(file: Path) -> None:
    """Take the disk's blocks now: a mapped file without them ends the process when it is written.

    Raises:
        Transient: the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("r+b") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
        except OSError as exc:
            file.unlink()
            raise Transient(f"{file}: {exc.strerror}: make room and call it again.") from exc


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[..., Iterator[_Read]]]:
    if not workers:
        yield map
        return
    with pool_of(workers) as pool:
        yield partial(pool.map, chunksize=_CHUNK)


def _read(spec: Preprocessing, film: Film) -> _Read:
    with film.named():
        luminance, seen = read_film(film.path, film.frame, spec)
    height, width = luminance.shape
    edges = (_cut(box.within(seen.box, (height, width))) for box in film.boxes)
    return seen.pixels, tuple(box for box in edges if box[0] < box[2] and box[1] < box[3])


def _cut(edges: Edges) -> Edges:
    """Return the edges within what the network sees."""
    left, top, right, bottom = (min(1.0, max(0.0, edge)) for edge in edges)
    return left, top, right, bottom


def _identity(film: Film) -> tuple[object, ...]:
    status = film.path.stat()
    return str(film.path), film.frame, film.boxes, status.st_size, status.st_mtime_ns
