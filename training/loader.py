"""Films of an epoch: augmented, whole or in crops, with the boxes that went along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from training.dataset import Edges
from training.prepared import Prepared
from training.settings import CELL

_ZOOM = (0.75, 1.5)  # crops show this much more or less than at the scale of whole films
_WIDEST = 0.95  # share of a film's side that a crop has at most
_ON_BOX = 0.7  # share of the crops of a film with boxes that are laid on one of them
_SEEN, _UNSEEN = 0.5, 0.2  # shares of a box from, and up to, which a crop shows it, or does not
_BOXED = 0.9  # share of the positive films that need boxes before crops are drawn
_BRIGHT = 0.75  # of the film's mean luminance: a crop as bright shows enough of the limb
_TRIES = 8  # places for a crop before one that shows little of the limb is taken


class Draw(NamedTuple):
    """One drawn film; a batch of them has one dimension more.

    Attributes:
        film: uint8 (size, size).
        boxes: float (size / 32, size / 32), the share of each cell that lies in a box.
        label: float; that of the crop where one was cut.
        counts: float, 0 where nobody can say whether a crop shows the finding.
    """

    film: Tensor
    boxes: Tensor
    label: Tensor
    counts: Tensor


class Drawn(torch.utils.data.Dataset[Draw]):
    """An epoch's augmented films, in its order; ``whole`` is the input size of whole films.

    What becomes of a film depends on the seed, the epoch and its place in the order alone, not on
    which process draws it: one that comes twice in an epoch is drawn anew each time.
    """

    def __init__(
        self,
        films: Prepared,
        labels: Sequence[int],
        *,
        whole: int,
        strength: float,
        seed: int,
    ) -> None:
        self._films = films
        self._whole = whole
        self._labels = labels
        self._strength = strength
        self._seed = seed
        self._pixels: NDArray[np.uint8] | None = None
        self._boxed = have_boxes(films.boxes, labels)

    def begin(self, epoch: int, order: Sequence[int], size: int, *, crops: bool = False) -> None:
        """Draw as in this epoch the films of ``order``, by their numbers, for an input of ``size``.

        With ``crops`` parts of the films, if boxes say for most positive ones where to look;
        where none do, the films whole.
        """
        self._epoch = epoch
        self._order = order
        self._size = size
        self._crops = crops and self._boxed
        self._change = augmentation(size, self._strength)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Draw:
        if self._pixels is None:
            self._pixels = self._films.mapped()
        seeds = np.random.SeedSequence((self._seed, self._epoch, place))
        rng = np.random.default_rng(seeds)
        number = self._order[place]
        film, boxes = self._pixels[number], self._films.boxes[number]
        label, counts = self._labels[number], 1
        mask = _painted(boxes, film.shape[0])
        if self._crops:
            window = _window(film, boxes, self._size / self._whole, rng)
            if label:
                label, counts = _shows(boxes, window, len(film)) if boxes else (1, 0)
            film, mask = film[window], mask[window]
        images: list[Tensor] = [Image(torch.from_numpy(film.copy())[None])]
        if mask.any():
            images.append(Mask(torch.from_numpy(mask)[None]))
        with torch.random.fork_rng(devices=()):
            # Not torch.manual_seed: it looks at every device for each film.
            torch.default_generator.manual_seed(int(seeds.generate_state(1)[0]))
            seen, *marked = self._change(images)
        cells = self._size // CELL
        shares = torch.zeros(1, cells, cells)
        if marked:
            marks = marked[0].as_subclass(Tensor).float()
            shares = torch.nn.functional.adaptive_avg_pool2d(marks, cells)
        return Draw(
            seen.as_subclass(Tensor)[0],
            shares[0],
            torch.tensor(float(label)),
            torch.tensor(float(counts)),
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}  # other processes map the file themselves


def have_boxes(boxes: Sequence[Sequence[object]], labels: Sequence[int]) -> bool:
    """Say whether so many positive films have boxes that crops can be told apart."""
    boxed = [bool(own) for own, label in zip(boxes, labels, strict=True) if label]
    return sum(boxed) >= _BOXED * len(boxed)


_Window = tuple[slice, slice]  # rows and columns of a film


def _window(
    film: NDArray[np.uint8], boxes: Sequence[Edges], share: float, rng: np.random.Generator
) -> _Window:
    """Return where a crop lies: mostly on a box where there is one, else where the limb is."""
    whole = len(film)
    side = round(min(share * rng.uniform(*_ZOOM), _WIDEST) * whole)
    if boxes and rng.random() < _ON_BOX:
        left, top, right, bottom = (whole * edge for edge in boxes[int(rng.integers(len(boxes)))])
        column = _around(left, right, side, whole, rng)
        row = _around(top, bottom, side, whole, rng)
        return slice(row, row + side), slice(column, column + side)
    enough = film.mean() * _BRIGHT
    for _ in range(_TRIES):
        row, column = rng.integers(0, whole - side + 1, 2)
        window = slice(row, row + side), slice(column, column + side)
        if film[window].mean() >= enough:
            break
    return window


def _around(low: float, high: float, side: int, whole: int, rng: np.random.Generator) -> int:
    """Return where a crop begins that holds ``low`` to ``high``, or lies inside it."""
    first, last = sorted((high - side, low))
    return round(min(max(rng.uniform(first, last), 0), whole - side))


def _shows(boxes: Sequence[Edges], window: _Window, whole: int) -> tuple[int, int]:
    """Return whether a crop shows a box, and 0 instead of 1 where it shows a part too small."""
    rows, columns = window
    most = 0.0
    for left, top, right, bottom in boxes:
        across = min(right, columns.stop / whole) - max(left, columns.start / whole)
        down = min(bottom, rows.stop / whole) - max(top, rows.start / whole)
        share = max(0.0, across) * max(0.0, down) / ((right - left) * (bottom - top))
        most = max(most, share)
    return int(most >= _SEEN), int(not _UNSEEN < most < _SEEN)


def _painted(boxes: Sequence[Edges], side: int) -> NDArray[np.uint8]:
    """Return a mask (side, side) with 1 inside the boxes."""
    mask = np.zeros((side, side), np.uint8)
    for left, top, right, bottom in boxes:
        rows = slice(int(top * side), int(np.ceil(bottom * side)))
        mask[rows, int(left * side) : int(np.ceil(right * side))] = 1
    return mask


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
