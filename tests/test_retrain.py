"""A site trains its own weights: measured beside those in use, put in use only if as good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from site_home import SAMPLES, Home, make_home, sha256
from tiny_atlas import write_atlas

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights import BUNDLED, Card, WeightsStore, bundled_card
from training.dataset import Dataset, Film
from training.metrics import Estimate
from training.retrain import MARGIN, divided, not_worse
from training.settings import two_phases


def quick_weights(home: Home) -> Card:
    """Put weights in use that see films of 64 pixels: to train from them takes seconds."""
    file = home.path / "quick.safetensors"
    save_file(load_file(BUNDLED / "generalist.safetensors"), file, metadata={"films": "small"})
    card = bundled_card(Area.XR_HAND)
    small = replace(card.preprocessing, size=64)
    store = WeightsStore(home.path / "weights")
    card = store.add(file, replace(card, sha256=sha256(file), preprocessing=small))
    store.activate(Area.XR_HAND, card.sha256)
    return card


def stale(home: Home) -> int:
    return int(json.loads(home.command("status", "--json").stdout)["stale_results"])


def test_new_weights_are_measured_and_used_when_they_may_be(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    before = quick_weights(home)
    atlas = write_atlas(tmp_path / "atlas", films=110, views=1)
    shutil.copytree(SAMPLES / "XR_HAND", home.inbox / "XR_HAND")
    assert home.command("watch", "--once").returncode == 0
    arguments = ("retrain", "XR_HAND", "--data", str(atlas), "--epochs", "1")

    child = home.start(*arguments)  # killed in the middle, and begun again
    training = home.path / "training/XR_HAND"
    while child.poll() is None and not list(training.glob("*/fit/state.pt")):
        time.sleep(0.05)
    child.kill()
    child.wait()
    store = WeightsStore(home.path / "weights")
    assert store.require(Area.XR_HAND) == before

    told = home.command(*arguments, "--activate")
    assert "against " + before.short in told.stdout, told.stderr
    (new,) = (card for card in store.cards(Area.XR_HAND) if card.origin == "trained")
    assert new.short in told.stdout
    form = store.int8_form(new)
    assert form is not None
    assert form.words() in told.stdout
    assert new.target == "fracture"
    assert new.preprocessing == before.preprocessing
    assert new.calibration is None or "kept aside" in new.calibration.fitted_on
    assert told.returncode == 0, told.stderr  # after a step or two films stand in the same order
    assert store.require(Area.XR_HAND).sha256 == new.sha256
    assert stale(home) >= 1
    assert home.command("rerun", "--stale").returncode == 0
    assert home.command("models", "rollback", "XR_HAND").returncode == 0
    assert store.require(Area.XR_HAND) == before
    assert stale(home) == 0
    (run,) = (path for path in training.iterdir() if path.is_dir())
    assert (training / "aside.json").is_file()
    kept = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"fit/network.pt", "fit/run.json", "fit/log.csv"} <= kept
    assert not [name for name in kept if name.endswith((".npy", "state.pt", "best.pt"))]


def test_who_was_kept_aside_once_stays_there(tmp_path: Path) -> None:
    file = tmp_path / "XR_HAND/aside.json"
    before: dict[str, bool] = {}
    for count in (60, 61, 90, 300):
        films = [  # patients are numbered anew each time, as they come
            Film(Path(), f"s{n}", f"p{count - n}", "XR_HAND", int(n % 3 == 0)) for n in range(count)
        ]
        again = [replace(film, study=f"{film.study} of {count}") for film in films[:20]]
        data, (aside,) = divided(Dataset((*films, *again)), file)
        now = {film.study: film.split == aside for film in data.films}
        assert {study: now[study] for study in before if study in now}.items() <= before.items()
        assert (
            len(
                {f.patient for f in data.films if now[f.study]}
                & {f.patient for f in data.films if not now[f.study]}
            )
            == 0
        )
        before |= now
    assert 0.1 < sum(now.values()) / len(now) < 0.3
    file.write_text("[]")
    with pytest.raises(Misconfigured, match="restore it"):
        divided(data, file)


def test_splits_move_nobody_whom_a_network_has_learned_from(tmp_path: Path) -> None:
    file = tmp_path / "XR_HAND/aside.json"
    films = [Film(Path(), f"s{n}", f"p{n}", "XR_HAND", n % 2) for n in range(60)]
    split = [replace(f, split="valid" if n < 12 else "train") for n, f in enumerate(films)]
    data, aside = divided(Dataset(tuple(split)), file)
    assert ({f.patient for f in data.films if f.split in aside}) == {f"p{n}" for n in range(12)}
    again, aside = divided(Dataset(tuple(films)), file)
    assert ({f.patient for f in again.films if f.split in aside}) == {f"p{n}" for n in range(12)}
    turned = [replace(f, split="train" if n < 12 else "valid") for n, f in enumerate(films)]
    with pytest.raises(Misconfigured, match=r"patient p0 \(60 in all\) would change sides"):
        divided(Dataset(tuple(turned)), file)


def test_weights_that_may_be_worse_are_used_for_a_reason_only(tmp_path: Path) -> None:
    assert not_worse(Estimate(0.0, -MARGIN, 0.1))
    assert not not_worse(Estimate(0.0, -MARGIN - 0.01, 0.1))
    assert not not_worse(Estimate(None, None, None))
    home = make_home(tmp_path / "home")
    store = WeightsStore(home.path / "weights")
    bundled = store.require(Area.XR_HAND)
    (home.path / "weights/XR_HAND/active.json").unlink()
    store.activate(Area.XR_HAND, bundled.sha256, "our own films only")
    assert store.reason(bundled) == "our own films only"
    assert "our own films only" in home.command("models", "show", "XR_HAND").stderr


def test_what_cannot_be_trained_on_is_told_in_one_line(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    atlas = write_atlas(tmp_path / "atlas")
    cut = tmp_path / "table.csv"
    rows = [f"{n}.png,s{n},p{n},XR_HAND,{n % 2},{('valid', 'train')[n > 5]}\n" for n in range(30)]
    cut.write_text("image,study,patient,area,label,split\n" + "".join(rows))
    for n in range(30):
        shutil.copy(SAMPLES / "elbow_lateral.png", tmp_path / f"{n}.png")
    os.truncate(tmp_path / "1.png", 300)
    for arguments, expected in (
        (("XR_WRIST", "--data", str(atlas)), "no films of XR_WRIST"),
        (("XR_HAND", "--data", str(atlas)), "too few for 5 folds"),
        (("XR_HAND", "--data", "labels"), "no films"),
        (("XR_HAND", "--data", str(tmp_path / "nothing")), "no such folder"),
        (("XR_HAND", "--data", str(cut)), "table.csv:3: 1.png: the image is cut off"),
        (("XR_HAND", "--data", str(atlas), "--device", "cudax"), "device 'cudax'"),
    ):
        done: subprocess.CompletedProcess[str] = home.command("retrain", *arguments)
        assert done.returncode == 4
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(home.path.glob("training/XR_HAND/*/fit"))
    done = home.command("retrain", "XR_HAND", "--data", str(atlas), "--memory", "nan")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    with pytest.raises(Misconfigured, match="films at 300 pixels; training needs a multiple of 32"):
        two_phases(Preprocessing(size=300), "densenet121")
