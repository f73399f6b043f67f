"""What breaks a training: told in one line, early, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from site_home import make_home
from tiny_atlas import TINY, write_atlas

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, Transient
from mura_batch.runtime import load
from mura_batch.weights import bundled_card, load_bundled
from training.crossval import Record, cross_validate
from training.evaluate import score_films
from training.fit import LossIsNoNumber, fit
from training.prepared import prepared
from training.run_folder import described, read_settings, state_digest
from training.settings import Stage
from training.sources import fracatlas
from training.start import state_of

QUICK = replace(TINY, head_epochs=0, stages=(Stage(64, 1),), patience=None)


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    return write_atlas(tmp_path / "atlas")


def training(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch", "4"),
        ("rate", -1),
        ("rate", float("nan")),
        ("imbalance", "murra"),
        ("architecture", "resnet"),
        ("precision", "f16"),
        ("augmentation", 5),
        ("aside", 0),
        ("average", 5),
        ("patience", 0),
        ("swa", "false"),
        ("seed", 2**32),
        ("stages", []),
        ("head_epochs", 10**9),
    ],
)
def test_settings_that_cannot_be_are_named(name: str, value: object, tmp_path: Path) -> None:
    told = asdict(QUICK) | {name: value}
    (tmp_path / "run.json").write_text(json.dumps({"settings": told}))
    with pytest.raises(Misconfigured, match=name if name != "stages" else "stage"):
        read_settings(tmp_path / "run.json")


@pytest.mark.parametrize(
    "change",
    [
        {"size": 33},
        {"size": 32},
        {"epochs": 0},
        {"epochs": 10**9},
        {"frozen": 9},
        {"frozen": -1},
        {"inside": -1},
        {"crops": "no"},
    ],
)
def test_stages_that_cannot_be_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    stage = asdict(QUICK.stages[0]) | change
    told = asdict(QUICK) | {"stages": [stage]}
    (tmp_path / "run.json").write_text(json.dumps({"settings": told}))
    with pytest.raises(Misconfigured, match="stage"):
        read_settings(tmp_path / "run.json")


@pytest.mark.parametrize(
    "change",
    [
        {"crop": "fore"},
        {"fit": "stretch"},
        {"size": 32.5},
        {"size": 3200000},
        {"mean": [1, 2]},
        {"mean": [float("nan")] * 3},
        {"std": [0, 0, 0]},
    ],
)
def test_preprocessing_that_cannot_be_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    told = asdict(QUICK)
    told["preprocessing"] |= change
    (tmp_path / "run.json").write_text(json.dumps({"settings": told}))
    with pytest.raises(Misconfigured, match=next(iter(change))):
        read_settings(tmp_path / "run.json")


def test_an_option_that_cannot_be_is_wrong_usage(atlas: Path, tmp_path: Path) -> None:
    for option, value in (("--rate", "nan"), ("--augmentation", "9"), ("--seed", 2**40)):
        done = training("fit", atlas, tmp_path / "run", option, value)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_held_out_film_that_cannot_be_read_is_told_before_training(
    atlas: Path, tmp_path: Path
) -> None:
    data = fracatlas.read(atlas)
    cut = next(film for film in data.films if film.split == "0")
    cut.path.write_bytes(cut.path.read_bytes()[:200])
    with pytest.raises(Misconfigured, match=rf"labels\.csv:\d+: {cut.name}"):
        cross_validate(data, tmp_path / "run", QUICK, folds=["0", "1"], workers=0)
    assert not (tmp_path / "run/fold-0").exists()


def test_a_record_keeps_the_folds_that_it_has(atlas: Path, tmp_path: Path) -> None:
    data, run = fracatlas.read(atlas), tmp_path / "run"
    both = cross_validate(data, run, QUICK, folds=["0", "1"], workers=0)
    again = cross_validate(data, run, QUICK, folds=["1", "1"], workers=0)
    assert [fold.name for fold in again.folds] == ["0", "1"]
    assert again.to_json() == both.to_json()
    assert Record.read(run / "record.json").to_json() == both.to_json()
    for other in ({"areas": ["XR_HAND"]}, {"start": "bundled"}):
        with pytest.raises(
            Misconfigured, match=rf"of another method \({next(iter(other))} differ\)"
        ):
            cross_validate(data, run, QUICK, folds=["1"], workers=0, **other)
    assert Record.read(run / "record.json").to_json() == both.to_json()
    with pytest.raises(Misconfigured, match="The fold '' cannot name a folder"):
        cross_validate(data, run, QUICK, folds=[""], workers=0)
    fewer = replace(data, films=data.films[1:])
    with pytest.raises(Misconfigured, match=rf"is of other data: .* {data.films[0].name}"):
        cross_validate(fewer, run, QUICK, folds=["0"], workers=0)
    odd = tuple(replace(film, split=f"../{film.split}") for film in data.films)
    with pytest.raises(Misconfigured, match=r"fold '\.\./\d' cannot name a folder"):
        cross_validate(replace(data, films=odd), tmp_path / "odd", QUICK, folds=["../0"], workers=0)
    told = (run / "fold-1/outcome.json").read_text()
    (run / "fold-1/outcome.json").write_text(told.replace('"network": "', '"network": "0'))
    with pytest.raises(Misconfigured, match=r"network\.pt is damaged"):
        cross_validate(data, run, QUICK, folds=["1"], workers=0)
    (run / "fold-1/outcome.json").write_text("{")
    with pytest.raises(Misconfigured, match=r"fold-1/network\.pt is damaged"):
        cross_validate(data, run, QUICK, folds=["1"], workers=0)
    (run / "fold-1/network.pt").write_bytes(b"PK")
    with pytest.raises(Misconfigured, match=r"network\.pt is damaged"):
        cross_validate(data, run, QUICK, folds=["1"], workers=0)


def test_a_start_that_may_have_seen_the_folds_is_told_of(atlas: Path, tmp_path: Path) -> None:
    fit(fracatlas.read(atlas), tmp_path / "run", QUICK, held_out=["0"], workers=0)
    start = ("--start", tmp_path / "run/network.pt", "--settings", tmp_path / "run/run.json")
    for fold, told in (("0", False), ("1", True)):
        done = training(
            "cross-validate", atlas, tmp_path / fold, *start, "--fold", fold, "--workers", 0
        )
        assert done.returncode == 0, done.stderr
        assert ("was not trained without 1" in done.stderr) is told
    done = training("fit", atlas, tmp_path / "run", "--start", "", "--held-out", "0")
    assert (done.returncode, "Traceback" in done.stderr) == (4, False)
    options = ("--settings", tmp_path / "run/run.json", "--workers", 0, "--held-out", "0")
    done = training("fit", atlas, tmp_path / "more", "--start", "bundled", *options)
    assert done.returncode == 0, done.stderr
    assert "the bundled weights learned FracAtlas" in done.stderr
    home = make_home(tmp_path / "home")
    stored = ("--home", home.path, "--start", bundled_card(Area.XR_HAND).short)
    done = training("fit", atlas, tmp_path / "stored", *stored, *options)
    assert done.returncode == 0, done.stderr
    assert described(tmp_path / "stored")["start"] == described(tmp_path / "more")["start"]
    hybrid = ("--architecture", "densenet121-transformer", "--start", tmp_path / "run/network.pt")
    done = training("fit", atlas, tmp_path / "hybrid", *hybrid, *options)
    assert "has no classifier, encoder, project of this network" in done.stderr, done.stderr


def test_each_fold_goes_on_from_a_network_of_its_own(atlas: Path, tmp_path: Path) -> None:
    data, run = fracatlas.read(atlas), tmp_path / "second"
    cross_validate(data, tmp_path / "first", QUICK, folds=["0", "1"], workers=0)
    start = tmp_path / "first/fold-{fold}/network.pt"
    options = ("--settings", tmp_path / "first/fold-0/run.json", "--workers", 0)
    done = training("cross-validate", atlas, run, "--start", start, *options)
    assert done.returncode == 0, done.stderr
    assert "was not trained without" not in done.stderr
    assert Record.read(run / "record.json").start == str(start)
    for name in ("0", "1"):
        before = state_of(str(start).replace("{fold}", name))
        assert before is not None
        assert described(run / f"fold-{name}")["start"] == state_digest(before)
    refused = training("cross-validate", atlas, run, "--start", start)
    assert refused.returncode == 2
    assert "needs --settings" in refused.stderr


def test_weights_that_give_no_number_are_neither_kept_nor_measured(
    atlas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step shows what the last one did: the loss of the only step here is a number."""
    data, step = fracatlas.read(atlas), torch.optim.AdamW.step

    def too_far(optimiser: torch.optim.AdamW, *given: object, **named: object) -> None:
        step(optimiser, *given, **named)
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(torch.nan)

    once = replace(QUICK, batch=20, average=0.0)
    monkeypatch.setattr("torch.optim.AdamW.step", too_far)
    with pytest.raises(LossIsNoNumber, match="the end"):
        fit(data, tmp_path / "run", once, workers=0)
    assert not (tmp_path / "run/network.pt").exists()
    weights = load_bundled(Area.XR_HAND)[0]
    tensors = {**weights.tensors, "classifier.bias": np.full(1, np.nan, np.float32)}
    runtime = load(
        replace(weights, tensors=tensors), QUICK.preprocessing, runtime="torch", device="cpu"
    )
    with pytest.raises(Misconfigured, match=r"labels\.csv:\d+: .*these weights say nan"):
        score_films(runtime, data.films[:2], QUICK.preprocessing)


def test_an_odd_number_of_films_fills_a_balanced_batch(tmp_path: Path) -> None:
    films = fracatlas.read(write_atlas(tmp_path / "atlas", films=13)).films
    data = replace(fracatlas.read(tmp_path / "atlas"), films=films[:13])
    settings = replace(QUICK, imbalance="balanced", batch=13)
    fit(data, tmp_path / "run", settings, workers=0)
    assert (tmp_path / "run/network.pt").exists()


def test_a_disk_that_is_full_while_films_are_read_is_told(
    atlas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = fracatlas.read(atlas)
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(Transient, match="No space left"):
            fit(data, tmp_path / "run", QUICK, workers=0)
    assert not list((tmp_path / "films").glob("*.part"))
    fit(data, tmp_path / "run", QUICK, workers=0)


def test_prepared_films_that_are_damaged_are_made_anew(atlas: Path, tmp_path: Path) -> None:
    films = fracatlas.read(atlas).films
    whole = prepared(films, QUICK.preprocessing, tmp_path / "films")
    content, boxes = whole.file.read_bytes(), whole.file.with_suffix(".json")
    for damage in (whole.file, boxes):
        for kept in (damage.read_bytes()[:100], b"", b"5"):
            damage.write_bytes(kept)
            again = prepared(films, QUICK.preprocessing, tmp_path / "films")
            assert again == whole
            assert again.file.read_bytes() == content
