"""What is in a data set, before hours are spent on it: counts, contradictions, duplicates, films.

Findings are told, never mended in silence: what cannot be read is left out and listed, not padded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from mura_batch.errors import MuraError, Rejected
from mura_batch.radiograph import read_luminance
from training.dataset import ALL_AREAS, Dataset, Film
from training.processes import pool_of

_HASH_SIDE = 16  # a film's perceptual hash has this many bits squared
_ALIKE = 15  # bits of 256 that may differ between films that are taken for one
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Look:
    """What one film is like.

    Attributes:
        sha256: of the file's content.
        hash: difference hash of the picture, ``_HASH_SIDE`` squared bits as hexadecimal text.
        levels: the 1st, 50th and 99th percentile of its luminance, 0–255.
        black: share of pixels that are black.
        error: code and sentence where the film cannot be read; all else is empty then.
    """

    sha256: str = ""
    hash: str = ""
    width: int = 0
    height: int = 0
    levels: tuple[int, int, int] = (0, 0, 0)
    black: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Films that are one picture.

    Attributes:
        exact: file by file the same content; else alike to the eye.
        films: file and line of each.
        across: what they stand on both sides of: ``splits``, ``patients``, ``labels``.
    """

    exact: bool
    films: tuple[str, ...]
    across: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """How much there is of one area in one split."""

    split: str
    area: str
    patients: int
    studies: int
    negative: int
    positive: int
    images: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """What :func:`survey` found.

    Attributes:
        totals: of each split; a study or patient of several areas is counted once.
        several_areas: patients with films of more than one area, by split.
        quantiles: of the films' figures, at 0, 5, 50, 95 and 100 %.
    """

    target: str
    counts: tuple[Count, ...]
    totals: tuple[Count, ...]
    several_areas: dict[str, int]
    problems: tuple[str, ...]
    unreadable: tuple[str, ...]
    duplicates: tuple[Group, ...]
    quantiles: dict[str, tuple[float, ...]]
    hardware: dict[str, int]

    def to_json(self) -> str:
        """Return all of it."""
        return json.dumps(asdict(self), indent=1)


def survey(data: Dataset, workers: int | None = None) -> DataReport:
    """Look at every film of a data set; the order of what is reported is that of the data.

    Films that cannot be read are listed, and left out of all else.
    """
    looks = list(_looked_at(data.films, workers))
    seen = [(film, look) for film, look in zip(data.films, looks, strict=True) if not look.error]
    films = [film for film, _ in seen]
    return DataReport(
        target=data.target,
        counts=tuple(_counts(films)),
        totals=tuple(_totals(films)),
        several_areas=_several_areas(films),
        problems=tuple(f"{one.where}: {one.what}" for one in data.all_problems()),
        unreadable=tuple(
            f"{film.where}: {film.name}: {look.error}"
            for film, look in zip(data.films, looks, strict=True)
            if look.error
        ),
        duplicates=tuple(_duplicates(seen)),
        quantiles=_quantiles([look for _, look in seen]),
        hardware=_hardware(films),
    )


# ---- one film


def look_at(place: tuple[Path, int]) -> Look:
    """Return what a film, a file and its frame, is like; nothing about it raises."""
    path, frame = place
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        film = read_luminance(path, frame)
    except Rejected as exc:
        return Look(error=f"{exc.code}: {exc}")
    except (MuraError, OSError) as exc:
        return Look(error=str(exc))
    shares = np.bincount(film.ravel(), minlength=256) / film.size
    reached = np.searchsorted(np.cumsum(shares), (0.01, 0.5, 0.99))
    return Look(
        sha256,
        difference_hash(film),
        film.shape[1],
        film.shape[0],
        (int(reached[0]), int(reached[1]), int(reached[2])),
        round(float(shares[0]), 4),
    )


def difference_hash(film: NDArray[np.uint8]) -> str:
    """Return which of neighbouring cells is brighter, in hexadecimal digits.

    Source: N. Krawetz, "Kind of Like That", 2013 (dHash), with 16 by 16 cells. Of 120 films of
    FracAtlas, scaled to 78 % all are found again within ``_ALIKE`` bits, then saved as JPEG of
    quality 75 93 %, of 50 70 %; without 1 % of each side 70 %; mirrored or turned ones never. Of
    6.8 million pairs of its films 103 are as near.
    """
    small = Image.fromarray(film).resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(small)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes().hex()


def _looked_at(films: Sequence[Film], workers: int | None) -> Iterator[Look]:
    places = [(film.path, film.frame) for film in films]
    told = tqdm(total=len(places), desc="looking at films", disable=None)
    with pool_of(workers) as pool, told:
        for look in pool.map(look_at, places, chunksize=_CHUNK):
            told.update()
            yield look


# ---- all films


def _counts(films: Iterable[Film]) -> Iterator[Count]:
    groups: defaultdict[tuple[str, str], list[Film]] = defaultdict(list)
    for film in films:
        groups[film.split, film.area].append(film)
    for (split, area), members in sorted(groups.items()):
        yield _count(split, area, members)


def _totals(films: Iterable[Film]) -> Iterator[Count]:
    groups: defaultdict[str, list[Film]] = defaultdict(list)
    for film in films:
        groups[film.split].append(film)
    for split, members in sorted(groups.items()):
        yield _count(split, ALL_AREAS, members)


def _count(split: str, area: str, films: Sequence[Film]) -> Count:
    studies: dict[str, int] = {}
    for film in films:
        studies[film.study] = max(film.label, studies.get(film.study, 0))
    patients = len({film.patient for film in films})
    positive = sum(studies.values())
    return Count(split, area, patients, len(studies), len(studies) - positive, positive, len(films))


def _several_areas(films: Iterable[Film]) -> dict[str, int]:
    areas: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for film in films:
        areas[film.split, film.patient].add(film.area)
    found = Counter(split for (split, _), names in areas.items() if len(names) > 1)
    return dict(sorted(found.items()))


def _hardware(films: Iterable[Film]) -> dict[str, int]:
    words = {True: "with", False: "without", None: "unknown"}
    return dict(Counter(words[film.hardware] for film in films))


def _quantiles(looks: Sequence[Look]) -> dict[str, tuple[float, ...]]:
    if not looks:
        return {}
    figures: dict[str, list[float]] = {
        "width": [look.width for look in looks],
        "height": [look.height for look in looks],
        "1 % level": [look.levels[0] for look in looks],
        "median level": [look.levels[1] for look in looks],
        "99 % level": [look.levels[2] for look in looks],
        "black share": [look.black for look in looks],
    }
    at = (0, 5, 50, 95, 100)
    return {n: tuple(np.percentile(values, at).round(3).tolist()) for n, values in figures.items()}


def _duplicates(seen: Sequence[tuple[Film, Look]]) -> Iterator[Group]:
    """Yield groups of one content, then groups that are alike and not all of one content."""
    by_content: defaultdict[tuple[str, int], list[Film]] = defaultdict(list)
    by_hash: defaultdict[str, list[tuple[Film, Look]]] = defaultdict(list)
    for film, look in seen:
        by_content[look.sha256, film.frame].append(film)
        by_hash[look.hash].append((film, look))
    for films in by_content.values():
        if len(films) > 1:
            yield _group(films, exact=True)
    hashes = list(by_hash)
    members: defaultdict[int, list[tuple[Film, Look]]] = defaultdict(list)
    for name, number in zip(hashes, alike(hashes), strict=True):
        members[number] += by_hash[name]
    for group in members.values():
        if len({(look.sha256, film.frame) for film, look in group}) > 1:
            yield _group([film for film, _ in group], exact=False)


def _group(films: Sequence[Film], *, exact: bool) -> Group:
    sides: dict[str, set[str] | set[int]] = {
        "splits": {film.split for film in films},
        "patients": {film.patient for film in films},
        "labels": {film.label for film in films},
    }
    across = tuple(name for name, values in sides.items() if len(values) > 1)
    return Group(exact, tuple(f"{film.where}: {film.name}" for film in films), across)


def alike(hashes: Sequence[str]) -> list[int]:
    """Return a group's number for each hash; those in one group are joined by steps of at most
    ``_ALIKE`` bits.
    """
    if not hashes:
        return []
    words = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(len(hashes), -1)
    numbers = np.arange(len(hashes))
    # One quarter of a hash tells most pairs apart: the one that says most, not the black rim.
    quarter = words[:, np.argmax([len(np.unique(column)) for column in words.T])]
    for start in range(0, len(hashes), _CHUNK):
        near = np.bitwise_count(quarter[start : start + _CHUNK, None] ^ quarter[None, start:])
        one, other = (found + start for found in np.nonzero(near <= _ALIKE))
        bits = np.bitwise_count(words[one] ^ words[other]).sum(axis=1, dtype=np.int64)
        numbers = _joined(numbers, one[bits <= _ALIKE], other[bits <= _ALIKE])
    return numbers.tolist()


def _joined(
    numbers: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the groups' numbers with the groups of these pairs made one."""
    different = numbers[one] != numbers[other]
    if not different.any():
        return numbers
    pairs = (numbers[one[different]], numbers[other[different]])
    size = int(numbers.max()) + 1
    links = coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(size, size))
    joined: NDArray[np.int64] = connected_components(links, directed=False)[1]
    return joined[numbers]
