"""A folder laid out as FracAtlas is, and settings that train on it in seconds."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image
from site_home import film

from mura_batch.preprocessing import Preprocessing
from training.settings import FitSettings, Stage

TINY = FitSettings(
    Preprocessing(size=64, crop="foreground", fit="pad"),
    head_epochs=1,
    stages=(Stage(32, 1), Stage(64, 2)),
    patience=5,
    aside=0.5,
    batch=4,
)


def turned_film(target: Path, number: int) -> None:
    """Write a real film, turned so that a network sees another one for each number."""
    film(target, number, size=96)
    with Image.open(target) as picture:
        turned = picture.rotate(13 * number)
    turned.save(target)


def write_atlas(root: Path, films: int = 20, views: int = 2) -> Path:
    """Write hand films, ``views`` an exam, in two folds, one film of a trunk and one of a leg."""
    root.mkdir(exist_ok=True)
    with (root / "labels.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image_id", "exam", "area", "fractured", "fold"])
        for number in range(films):
            name = f"IMG{number:07}.png"
            turned_film(root / "images" / name, number)
            exam = number // views
            table.writerow([name, f"{exam:04}", "XR_HAND", int(exam % 3 == 0), exam % 2])
        turned_film(root / "images/IMG9.png", 98)
        table.writerow(["IMG9.png", "9999", "NONE", 0, 0])
    with (root / "other.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image_id", "region", "fractured"])
        table.writerow(["leg.png", "leg", 0])
    turned_film(root / "other" / "leg.png", 99)
    return root
