"""Labelled radiographs for training: which film, whose, of which area, with which label.

``training.sources`` reads them from what people have; what cannot be used is a ``Problem`` that
names its file and line. A report lists problems, training refuses to begin with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mura_batch.errors import Misconfigured, Rejected, Transient, listed
from mura_batch.network_input import Box

ALL_AREAS = "all areas"
Edges = tuple[float, float, float, float]  # left, top, right, bottom
_SLACK = 0.005  # of a film's side: what rounding may push a box out of it


@dataclass(frozen=True, slots=True)
class Region:
    """A box around a finding: its centre, width and height in shares of the film's, as YOLO writes.

    Raises:
        ValueError: it reaches out of the film.
    """

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        across, down = (self.x, self.width), (self.y, self.height)
        if not all(
            side > 0 and side / 2 - _SLACK <= middle <= 1 - side / 2 + _SLACK
            for middle, side in (across, down)
        ):
            raise ValueError(
                f"a box of {self.x} {self.y} {self.width} {self.height} is not inside its film:"
                " x and y are its centre, all four are shares of the film's width and height"
            )

    @classmethod
    def parse(cls, text: str) -> tuple[Region, ...]:
        """Return the boxes of ``x y width height; …``; ValueError for anything else."""
        try:
            boxes = [
                [float(word) for word in box.split()] for box in text.split(";") if box.strip()
            ]
        except ValueError:
            boxes = [[]]
        if any(len(box) != 4 for box in boxes):  # noqa: PLR2004 - as said
            raise ValueError(f"the boxes {text!r} are not made of x y width height; …")
        return tuple(cls(*box) for box in boxes)

    def within(self, seen: Box, size: tuple[int, int]) -> Edges:
        """Return its edges as shares of the part ``seen`` of a film of (height, width).

        They lie outside of 0 to 1 where the box reaches out of that part.
        """
        height, width = size
        across, down = seen.right - seen.left, seen.bottom - seen.top
        return (
            ((self.x - self.width / 2) * width - seen.left) / across,
            ((self.y - self.height / 2) * height - seen.top) / down,
            ((self.x + self.width / 2) * width - seen.left) / across,
            ((self.y + self.height / 2) * height - seen.top) / down,
        )


@dataclass(frozen=True, slots=True)
class Film:
    """One labelled radiograph.

    Attributes:
        frame: from 0 inside a multi-frame DICOM file.
        study: what is scored together; its label is that of any of its films.
        patient: whose it is: nobody may stand on both sides of a split.
        area: ``XR_ELBOW`` …, or the region's name for films outside the upper limb.
        label: 1 where the target is there, else 0.
        split: ``train``, ``valid`` or the number of a fold; empty where none was stated.
        also: areas that lie wholly in the film besides.
        views: ``frontal``, ``lateral``, ``oblique``, where that is known.
        boxes: around what the label is of, where that was drawn.
        hardware: metal or a cast in the film, None where nobody looked.
        weight: how much the film counts in training.
        where: file and line that say so, for messages.
    """

    path: Path
    study: str
    patient: str
    area: str
    label: int
    frame: int = 0
    split: str = ""
    also: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    boxes: tuple[Region, ...] = ()
    hardware: bool | None = None
    weight: float = 1.0
    where: str = ""

    @property
    def name(self) -> str:
        """The file's name, and the frame where it is not the first."""
        return f"{self.path.name} frame {self.frame}" if self.frame else self.path.name

    @property
    def identity(self) -> tuple[str, str, str]:
        """What finds the film again in other records: study, area and name."""
        return self.study, self.area, self.name

    @contextmanager
    def named(self) -> Iterator[None]:
        """Say which film it is that cannot be read.

        Raises:
            Misconfigured: with its file and line.
        """
        try:
            yield
        except (Rejected, Transient, OSError) as exc:
            raise Misconfigured(f"{self.where}: {self.name}: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Problem:
    """What cannot be used, and the file and line where that stands."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """Films, and what of the source could not be made one.

    Attributes:
        target: what a label of 1 means: ``abnormal`` or ``fracture``.
        labels_of: ``study`` where all films of a study must have one label, ``film`` where each
            has its own.
        source: where the films are from, for messages.
    """

    films: tuple[Film, ...]
    problems: tuple[Problem, ...] = ()
    target: str = "abnormal"
    labels_of: str = "study"
    source: str = "this data"

    def all_problems(self) -> Iterator[Problem]:
        """Yield the source's problems, and those between films."""
        yield from self.problems
        if self.labels_of == "study":
            labels = ((f"study {f.study} ({f.area})", str(f.label), f) for f in self.films)
            yield from _contradictions(labels, "labels")
        splits = ((f"patient {f.patient}", f.split or "none", f) for f in self.films)
        yield from _contradictions(splits, "splits")
        whose = ((f"study {f.study} ({f.area})", f.patient, f) for f in self.films)
        yield from _contradictions(whose, "patients")
        shown = ((f"{f.path} frame {f.frame}", f.patient, f) for f in self.films)
        yield from _contradictions(shown, "patients")
        seen: dict[tuple[Path, int, str], Film] = {}
        for film in self.films:
            first = seen.setdefault((film.path, film.frame, film.area), film)
            if first is not film:
                yield Problem(film.where, f"{film.name} stands at {first.where} already")

    def checked(self) -> Dataset:
        """Return this data set.

        Raises:
            Misconfigured: naming its first problems, or that it has no films.
        """
        if problems := [f"{one.where}: {one.what}" for one in self.all_problems()]:
            raise Misconfigured(listed(problems))
        if not self.films:
            raise Misconfigured(f"There are no films in {self.source}.")
        return self

    def has_splits(self, names: Iterable[str]) -> Dataset:
        """Return this data set.

        Raises:
            Misconfigured: it has no film in one of these splits.
        """
        there = {film.split for film in self.films}
        if missing := sorted(set(names) - there):
            splits = ", ".join(sorted(there - {""})) or "none"
            raise Misconfigured(f"No film is in the split {', '.join(missing)}; splits: {splits}.")
        return self

    def only(self, areas: Iterable[str]) -> Dataset:
        """Return the films that show one of the areas, mainly or besides.

        Raises:
            Misconfigured: none does, or they have one label only.
        """
        wanted = set(areas)
        films = tuple(f for f in self.films if f.area in wanted or wanted & set(f.also))
        name = ", ".join(sorted(wanted))
        if not films:
            raise Misconfigured(f"There are no films of {name} in {self.source}.")
        if len({film.label for film in films}) == 1:
            raise Misconfigured(
                f"All films of {name} in {self.source} have the label {films[0].label}."
            )
        return replace(self, films=films)


def _contradictions(stated: Iterable[tuple[str, str, Film]], what: str) -> Iterator[Problem]:
    """Yield what is stated in two ways of one thing, at the film that says so first."""
    seen: defaultdict[str, dict[str, Film]] = defaultdict(dict)
    for thing, value, film in stated:
        seen[thing].setdefault(value, film)
    for thing, values in seen.items():
        if len(values) > 1:
            second = list(values.values())[1]
            yield Problem(second.where, f"{thing} has the {what} {' and '.join(values)}")
