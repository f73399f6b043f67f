"""The names for notebooks: load a model, score paths and arrays, see the evidence."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from site_home import SAMPLES, film, make_home

import mura_batch
from mura_batch.errors import Misconfigured, MuraError, UnreadableImage
from mura_batch.scoring import sigmoid

ELBOW = SAMPLES / "elbow_lateral.png"


@pytest.fixture(scope="module")
def model() -> mura_batch.Model:
    return mura_batch.load_model("XR_ELBOW", runtime="torch", device="cpu")


def test_paths_and_arrays_score_alike(model: mura_batch.Model) -> None:
    by_path, by_array = model.score([ELBOW, mura_batch.read_luminance(ELBOW)])
    assert by_path.logit == pytest.approx(by_array.logit, abs=1e-4)
    assert by_path.probability == pytest.approx(sigmoid(by_path.logit))
    np.testing.assert_allclose(by_path.map, by_array.map, atol=1e-4)
    with pytest.raises(FrozenInstanceError):
        by_path.logit = 0.0


def test_the_map_pools_to_the_logit_without_its_bias(model: mura_batch.Model) -> None:
    assert model.card.architecture == "densenet121-lse"
    first, second = model.score([ELBOW, SAMPLES / "humerus_ap.jpg"])
    bias, again = (
        one.logit - np.log(np.exp(one.map * one.map.size).mean()) for one in (first, second)
    )
    assert bias == pytest.approx(again, abs=1e-4)


def test_an_overlay_is_a_picture_of_the_film(model: mura_batch.Model) -> None:
    picture = model.overlay(ELBOW, model.score([ELBOW])[0])
    assert min(picture.size) > 100


def test_a_home_serves_its_active_weights(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    model = mura_batch.load_model("XR_HAND", home=home.path, runtime="torch", device="cpu")
    assert model.card.area is mura_batch.Area.XR_HAND


@pytest.mark.parametrize("kind", ["uint16", "int32", "int8", "float32", "bool"])
def test_an_array_of_another_kind_is_refused(model: mura_batch.Model, kind: str) -> None:
    array = mura_batch.read_luminance(ELBOW)
    (score,) = model.score([array])
    with pytest.raises(ValueError, match=f"{kind}.*give uint8"):
        model.score([array, array.astype(kind)])
    with pytest.raises(ValueError, match=f"{kind}.*give uint8"):
        model.overlay(array.astype(kind), score)


@pytest.mark.parametrize("shape", [(8, 8, 3), (64,), (0, 8)])
def test_an_array_of_another_shape_is_refused(
    model: mura_batch.Model, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="give uint8"):
        model.score([np.zeros(shape, np.uint8)])


@pytest.mark.parametrize("kind", [str, Path])
def test_one_path_is_not_a_list(model: mura_batch.Model, kind: type) -> None:
    with pytest.raises(TypeError, match="give a list"):
        model.score(kind(ELBOW))


def test_what_load_model_raises_is_what_it_says() -> None:
    for name in ("ValueError", "Misconfigured"):
        assert f"{name}: " in str(mura_batch.load_model.__doc__)
    with pytest.raises(Misconfigured, match="runtime"):
        mura_batch.load_model("XR_HAND", runtime="abacus")


def test_bad_input_is_told_by_its_own_errors(model: mura_batch.Model, tmp_path: Path) -> None:
    broken = film(tmp_path / "x.png")
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(UnreadableImage):
        model.score([broken])
    with pytest.raises(MuraError):
        mura_batch.load_model("XR_HAND", broken)
    with pytest.raises(ValueError, match="XR_KNEE"):
        mura_batch.load_model("XR_KNEE")
