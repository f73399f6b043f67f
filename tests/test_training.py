"""From labelled films to weights with a card; small, but the real way."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from site_home import film

from mura_batch.area import Area
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights import read_card, read_network
from training.calibration import cross_fitted_rates, fit_calibration, thresholds
from training.fit import FitSettings, fit
from training.metrics import Cases
from training.publish import publish_bundled
from training.sources import fracatlas

TINY = FitSettings(
    preprocessing=Preprocessing(size=64, crop="foreground", fit="pad"),
    epochs=((32, 1), (64, 1)),
    batch=4,
)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as FracAtlas is, with twenty films of ten exams in two folds."""
    root = tmp_path_factory.mktemp("atlas")
    with (root / "labels.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image_id", "exam", "area", "fractured", "fold"])
        for number in range(20):
            name = f"IMG{number:07}.png"
            film(root / "images" / name, number, size=96)
            exam = number // 2
            table.writerow([name, f"{exam:04}", "XR_HAND", int(exam % 3 == 0), exam % 2])
        film(root / "images/IMG9.png", 98, size=96)
        table.writerow(["IMG9.png", "9999", "NONE", 0, 0])
    with (root / "other.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image_id", "region", "fractured"])
        table.writerow(["leg.png", "leg", 0])
    film(root / "other" / "leg.png", 99, size=96)
    return root


def test_films_that_show_no_upper_limb_are_left_out(atlas: Path) -> None:
    films = fracatlas.read(atlas).films
    assert len(films) == 21
    assert {f.split for f in films if f.area == "XR_HAND"} == {"0", "1"}
    assert [f.split for f in films if f.area == "leg"] == [""]


def test_a_cut_off_run_goes_on_to_the_same_network(atlas: Path, tmp_path: Path) -> None:
    films = fracatlas.read(atlas).films
    fit(films, tmp_path / "whole", TINY)
    whole = torch.load(tmp_path / "whole/network.pt", weights_only=True)

    fit(films, tmp_path / "cut", TINY, stop_after=1)
    assert not (tmp_path / "cut/network.pt").exists()
    fit(films, tmp_path / "cut", TINY)
    resumed = torch.load(tmp_path / "cut/network.pt", weights_only=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    done = publish_bundled(films, tmp_path / "whole", tmp_path / "bundle")
    for area in Area:
        card = read_card(tmp_path / "bundle/cards" / f"{area}.json")
        assert card.area is area
        assert card.preprocessing == TINY.preprocessing
        assert read_network(done.file, card) is not None
    hand = read_card(tmp_path / "bundle/cards/XR_HAND.json")
    assert hand.metrics["study_auc"].value == pytest.approx(done.auc.value, abs=1e-4)
    assert "10 exams" not in hand.metrics["study_auc"].on
    shutil.rmtree(tmp_path / "whole")


def scores(seed: int, count: int = 120) -> Cases:
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(np.int64)
    labels[:2] = (0, 1)
    logits = rng.normal(labels * 1.5, 1.0)
    patients = tuple(str(number) for number in range(count))
    return Cases(logits, 1 / (1 + np.exp(-logits)), labels, patients)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_operating_points_reach_what_they_are_named_for(seed: int) -> None:
    made = scores(seed)
    slope, intercept = fit_calibration(made.logits, made.labels)
    values = 1 / (1 + np.exp(-(slope * made.logits + intercept)))
    points = thresholds(values, made.labels)
    assert (values[made.labels == 1] >= points["high_sensitivity"]).mean() >= 0.9
    assert (values[made.labels == 0] < points["high_specificity"]).mean() >= 0.9
    assert abs(values.mean() - made.labels.mean()) < 0.02


def test_rates_are_measured_on_patients_that_did_not_set_them() -> None:
    sensitivity, specificity = cross_fitted_rates(scores(3, 600))["balanced"]
    assert sensitivity.low < sensitivity.value < sensitivity.high
    assert 0.6 < sensitivity.value < 0.95
    assert 0.6 < specificity.value < 0.95
