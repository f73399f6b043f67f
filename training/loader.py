"""Films as training input: read once, kept on disk, augmented whenever they are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from mura_batch.atomic import write_atomic
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from training.dataset import Film

_HEADROOM = 1.2  # films are kept this much larger than the input, so that zooming in is sharp


def prepared(
    films: Sequence[Film], spec: Preprocessing, folder: Path, *, headroom: bool = False
) -> Path:
    """Return a file of the films as the network sees them, uint8 (N, S, S) in NumPy's format.

    With ``headroom`` S is larger than the network's input. The file is made in ``folder`` where it
    is not there yet; its name says of which films and how.

    Raises:
        Misconfigured: a film cannot be read.
    """
    if headroom:
        spec = replace(spec, size=round(spec.size * _HEADROOM))
    told = repr([_identity(film) for film in films]) + repr(spec)
    file = folder / f"films-{hashlib.sha256(told.encode()).hexdigest()[:12]}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.empty((len(films), spec.size, spec.size), np.uint8)
        for number, film in enumerate(tqdm(films, desc="reading films", disable=None)):
            with film.named():
                pixels[number] = read_film(film.path, film.frame, spec)[1].pixels
        write_atomic(file, lambda stream: np.save(stream, pixels))
    return file


def _identity(film: Film) -> tuple[object, ...]:
    status = film.path.stat()
    return str(film.path), film.frame, status.st_size, status.st_mtime_ns


class Drawn(torch.utils.data.Dataset[Tensor]):
    """Augmented films, uint8 (size, size), of a file of prepared ones.

    What a film becomes depends on the seed, the epoch and its number alone: not on the order, nor
    on which process draws it.
    """

    def __init__(self, file: Path, strength: float, seed: int) -> None:
        self._file = file
        self._count = len(np.load(file, mmap_mode="r"))
        self._strength = strength
        self._seed = seed
        self._epoch = 0
        self._change = augmentation(1, strength)
        self._pixels: NDArray[np.uint8] | None = None

    def begin(self, epoch: int, size: int) -> None:
        """Draw as in this epoch, for an input of ``size``."""
        self._epoch = epoch
        self._change = augmentation(size, self._strength)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        if self._pixels is None:
            self._pixels = np.load(self._file, mmap_mode="r")
        film = torch.from_numpy(np.array(self._pixels[index]))[None]
        with torch.random.fork_rng(devices=()):
            told = np.random.SeedSequence((self._seed, self._epoch, index))
            torch.manual_seed(int(told.generate_state(1)[0]))
            changed: Tensor = self._change(film)
        return changed[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}  # other processes map the file themselves


def augmentation(size: int, strength: float) -> v2.Transform:
    """Return what mirrors, turns, moves, zooms and tones a film (1, S, S), and brings it to size.

    At ``strength`` 1 by up to 23 degrees, an eighth of its side, a fifth smaller or a seventh
    larger, a quarter darker or brighter; at 0 the film is only mirrored.
    """
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(
                degrees=23 * strength,
                translate=(0.12 * strength, 0.12 * strength),
                scale=(1 - 0.2 * strength, 1 + 0.15 * strength),
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.ColorJitter(brightness=0.25 * strength, contrast=0.25 * strength),
            v2.Resize((size, size), antialias=True),
        ]
    )
