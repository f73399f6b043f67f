"""A tree laid out as MURA v1.1 is, of tiny made-up films."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def make_tree(
    root: Path,
    studies: Mapping[str, Mapping[str, tuple[int, int]]],
    images: Mapping[str, Mapping[str, int]],
    in_two_areas: int = 0,
) -> None:
    """Write the splits of ``studies``, counts without and with an abnormality by split and area.

    Each study is of a patient of its own, but that ``in_two_areas`` training patients have one in
    each of the first two areas.
    """
    random = np.random.default_rng(3)
    patients = (f"patient{number:05}" for number in itertools.count(1))
    for split, areas in studies.items():
        shared: list[str] = []
        listed: list[str] = []
        labelled: list[str] = []
        for place, (area, (negative, positive)) in enumerate(areas.items()):
            words = ["negative"] * negative + ["positive"] * positive
            names = [*shared, *itertools.islice(patients, len(words) - len(shared))]
            shared = names[:in_two_areas] if (split, place) == ("train", 0) else []
            folders = [f"{area}/{name}/study1_{w}" for name, w in zip(names, words, strict=True)]
            for folder in folders:
                (root / split / folder).mkdir(parents=True)
            labelled += [f"{folder}/,{int(folder.endswith('positive'))}" for folder in folders]
            for number in range(images[split][area]):
                path = f"{folders[number % len(folders)]}/image{number // len(folders) + 1}.png"
                (root / split / path).write_bytes(tiny_film(random))
                listed.append(path)
        write_table(root / f"{split}_image_paths.csv", split, listed)
        write_table(root / f"{split}_labeled_studies.csv", split, labelled)


def write_table(file: Path, split: str, lines: Iterable[str]) -> None:
    """Write lines as MURA does: without a header, paths from the archive's own folder on."""
    file.write_text("".join(f"MURA-v1.1/{split}/{line}\n" for line in lines))


def tiny_film(random: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (20, 24), np.uint8)).save(stream, "PNG")
    return stream.getvalue()
