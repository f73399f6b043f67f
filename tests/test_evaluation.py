"""Weights measured on labelled films, and where their evidence lies."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_training_data import write_manifest

from mura_batch.area import Area
from mura_batch.assessment import conclude
from mura_batch.config import Settings
from mura_batch.errors import Misconfigured, NoWeights
from mura_batch.inference import load_model
from mura_batch.network_input import Box, prepare
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights import WeightsStore, bundled_card
from training.dataset import ALL_AREAS, Film, Region
from training.evaluate import FilmScore, by_study, cases_of, evaluate_areas
from training.localisation import Localised, localise

cells = st.integers(0, 6)


def marked(row: int, column: int) -> np.ndarray:
    evidence = np.full((7, 7), -0.1, np.float32)
    evidence[row, column] = 2.0
    return evidence


@given(cells, cells, st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_evidence_hits_a_box_where_its_peak_touches_it(row, column, x, y) -> None:
    box = Region(x, y, 0.05, 0.05)
    found = localise(marked(row, column), [box], Box(0, 0, 300, 200), (200, 300))
    left, right = 7 * (x - 0.025), 7 * (x + 0.025)
    top, bottom = 7 * (y - 0.025), 7 * (y + 0.025)
    touches = left < column + 1 and right > column and top < row + 1 and bottom > row
    assert found.hit == touches
    assert 1 / 49 <= found.chance <= 4 / 49


def test_boxes_follow_the_crop_and_the_padding_that_the_network_saw() -> None:
    luminance = np.zeros((200, 600), np.uint8)
    luminance[80:120, 500:540] = 255  # what a perfect network would point at
    seen = prepare(luminance, Preprocessing(size=70, fit="pad"))
    evidence = seen.pixels.reshape(7, 10, 7, 10).mean(axis=(1, 3)).astype(np.float32)
    box = Region(520 / 600, 100 / 200, 40 / 600, 40 / 200)
    found = localise(evidence, [box], seen.box, luminance.shape)
    assert found.hit
    assert found.energy > 0.05  # of a cell that is five times the box
    elsewhere = localise(evidence, [Region(0.1, 0.5, 0.05, 0.1)], seen.box, luminance.shape)
    assert (elsewhere.hit, elsewhere.energy) == (False, 0)


def test_all_the_evidence_in_a_box_is_all_of_its_energy() -> None:
    found = localise(marked(3, 3), [Region(0.5, 0.5, 1, 1)], Box(0, 0, 70, 70), (70, 70))
    assert (found.hit, found.chance, found.energy) == (True, 1, 1)
    outside = Box(0, 0, 10, 10)
    missed = Localised(hit=False, chance=0.0, energy=0.0, overlap=0.0)
    assert localise(marked(0, 0), [Region(0.9, 0.9, 0.1, 0.1)], outside, (70, 70)) == missed
    nothing = np.full((7, 7), -1, np.float32)
    assert localise(nothing, [Region(0.5, 0.5, 1, 1)], outside, (10, 10)) == replace(
        missed, chance=1.0
    )


def test_a_study_is_the_mean_of_its_views_and_positive_where_one_is() -> None:
    def scored(study: str, area: str, label: int, logit: float) -> FilmScore:
        return FilmScore(Film(Path(), study, "p", area, label), logit, None)

    scores = [
        scored("s", "XR_HAND", 0, 1.0),
        scored("s", "XR_HAND", 1, 3.0),
        scored("s", "XR_WRIST", 0, -1.0),
    ]
    cases = cases_of(by_study(scores), None)
    assert cases.logits.tolist() == [2.0, -1.0]
    assert cases.labels.tolist() == [1, 0]
    card = bundled_card(Area.XR_HAND)
    for how in (None, card.calibration):
        product = conclude([1.0, 3.0], replace(card, calibration=how), Settings(home=Path()))
        told = product.probability if how is None else product.calibrated
        assert cases_of(by_study(scores), how).probabilities[0] == pytest.approx(told)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    wrist = {"area": "XR_WRIST", "hardware": "1"}
    return write_manifest(folder, {"hardware": "0"}, {}, wrist, wrist | {"split": "1"})


def test_an_evaluation_is_of_what_the_product_says(manifest: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "evaluate", str(manifest), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "research use only" in done.stderr) == (0, True)
    assert "all areas: 4 studies, 2 positive, AUC" in done.stdout
    with (tmp_path / "out/films.csv").open() as stream:
        logits = {row["study"]: float(row["logit"]) for row in csv.DictReader(stream)}
    (score,) = load_model("XR_HAND").score([manifest.parent / "0.png"])
    assert logits["s0"] == pytest.approx(score.logit, abs=1e-4)
    told = json.loads((tmp_path / "out/evaluation.json").read_text())
    groups = {(e["area"], e["level"], e["stratum"]): e for e in told["evaluations"]}
    assert groups["XR_WRIST", "study", "with hardware"]["count"] == 2
    assert groups["XR_HAND", "image", "without hardware"]["count"] == 1
    assert groups[ALL_AREAS, "image", "all"]["positive"] == 2
    assert groups["XR_HAND", "box", "all"]["count"] == 1
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") == 3
    assert "research use only" in page


def test_weights_are_chosen_by_digest_and_films_by_split(manifest: Path, tmp_path: Path) -> None:
    from training.sources import read

    films = [film for film in read(manifest).films if film.split == "1"]
    store = WeightsStore(tmp_path / "weights")
    store.install_bundled()
    digest = store.cards(Area.XR_WRIST)[0].sha256
    found = evaluate_areas(films, ["XR_WRIST"], tmp_path, digest[:8])
    assert [(e.level, e.stratum, e.count) for e in found.evaluations][:2] == [
        ("image", "all", 1),
        ("image", "with hardware", 1),
    ]
    assert found.evaluations[0].figures["roc_auc"].value is None
    (tmp_path / "weights/XR_WRIST" / f"{digest[:12]}.json").unlink()  # stored for other areas still
    elsewhere = evaluate_areas(films, ["XR_WRIST"], tmp_path, digest[:8])
    assert elsewhere.scores == found.scores
    (tmp_path / "weights/XR_WRIST/active.json").unlink()
    with pytest.raises(NoWeights, match="XR_WRIST has no weights"):
        evaluate_areas(read(manifest).films, ["XR_HAND", "XR_WRIST"], tmp_path, None)
    with pytest.raises(Misconfigured, match="no weights have a digest"):
        evaluate_areas(films, ["XR_WRIST"], tmp_path, "00000000")
    with pytest.raises(Misconfigured, match="no films of XR_ELBOW"):
        evaluate_areas(films, ["XR_ELBOW"], None, None)
    with pytest.raises(Misconfigured, match="--home"):
        evaluate_areas(films, ["XR_WRIST"], None, digest)
