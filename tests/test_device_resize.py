"""Films resized on a network's device: what comes out is Pillow's, to the bit."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from site_home import make_home

from mura_batch import scoring
from mura_batch.config import Settings
from mura_batch.daemon import Daemon
from mura_batch.demo import drop_samples
from mura_batch.network_input import Box, Luminance, resized
from mura_batch.records import Filters
from mura_batch.results import Results
from mura_batch.runtime.device_resize import DeviceResize, pillow_weights, quicker, resize_on

DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    ),
]


def film(height: int, width: int, seed: int) -> Luminance:
    return np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)


@st.composite
def regions(draw: st.DrawFn) -> tuple[Luminance, Box]:
    """Films, grey or stark, and a region that shows some of them and may reach outside."""
    height, width = draw(st.integers(1, 700)), draw(st.integers(1, 700))
    luminance = film(height, width, draw(st.integers(0, 9)))
    if draw(st.booleans()):
        luminance = np.where(luminance > 127, 255, 0).astype(np.uint8)
    top, left = (draw(st.integers(-300, side - 1)) for side in (height, width))
    bottom, right = (max(at, 0) + draw(st.integers(1, 900)) for at in (top, left))
    if draw(st.booleans()):
        side = max(bottom - top, right - left)
        bottom, right = top + side, left + side
    return luminance, Box(left, top, right, bottom)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150, deadline=None)
@given(regions(), st.sampled_from([7, 64, 224, 320]))
def test_every_region_comes_out_as_pillow_makes_it(
    device: str, region: tuple[Luminance, Box], size: int
) -> None:
    found = DeviceResize(device)(*region, size)
    np.testing.assert_array_equal(found, resized(*region, size))


@pytest.mark.parametrize("device", DEVICES)
def test_threads_do_not_disturb_each_other(device: str) -> None:
    resize = DeviceResize(device)
    films = [film(300 + n, 300 + n, n) for n in range(24)]
    boxes = [Box(0, 0, len(one), len(one)) for one in films]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(resize, films, boxes, [224] * len(films)))
    for own, luminance, box in zip(found, films, boxes, strict=True):
        np.testing.assert_array_equal(own, resized(luminance, box, 224))


@given(st.integers(1, 5000), st.integers(1, 400))
def test_weights_lie_on_the_film_and_count_one_in_all(length: int, size: int) -> None:
    first, weights = pillow_weights(length, size)
    assert first.shape == (size,)
    assert weights.shape[0] == size
    places = first[:, np.newaxis] + np.arange(weights.shape[1])
    assert not weights[places >= length].any()
    np.testing.assert_allclose(weights.sum(axis=1), 1 << 22, rtol=0, atol=weights.shape[1])


def test_a_device_that_fails_leaves_films_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

    resize = DeviceResize("cpu")
    monkeypatch.setattr(resize, "_resized", lost)
    luminance, box = film(300, 200, 1), Box(-50, 0, 250, 300)
    np.testing.assert_array_equal(resize(luminance, box, 64), resized(luminance, box, 64))


def test_films_that_are_turned_or_may_not_be_written_to_are_resized() -> None:
    luminance = film(40, 40, 1)
    luminance.flags.writeable = False
    box = Box(0, 0, 40, 40)
    for turned in (luminance, luminance[:, ::-1], luminance.T[::-1], luminance[:, :1][:, ::-1]):
        np.testing.assert_array_equal(DeviceResize("cpu")(turned, box, 7), resized(turned, box, 7))


def test_what_is_right_and_sooner_is_taken() -> None:
    known: dict[int, Luminance] = {}

    def at_once(luminance: Luminance, box: Box, size: int) -> Luminance:
        if size not in known:
            known[size] = resized(luminance, box, size)
        return known[size]

    def late(luminance: Luminance, box: Box, size: int) -> Luminance:
        time.sleep(1)
        return resized(luminance, box, size)

    def wrong(luminance: Luminance, box: Box, size: int) -> Luminance:
        return at_once(luminance, box, size) ^ 1

    assert [quicker(own, 320) for own in (at_once, late, wrong)] == [at_once, resized, resized]
    assert resize_on("cpu", 320) is resized


def test_the_daemon_resizes_as_its_scorer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = []
    asked: list[int] = []

    def on_a_device(luminance: Luminance, box: Box, size: int) -> Luminance:
        asked.append(size)
        return DeviceResize("cpu")(luminance, box, size)

    for name in ("pillow", "device"):
        home = make_home(tmp_path / name)
        site = Settings(home=home.path, settle_seconds=0.05, runtime="torch", device="cpu")
        drop_samples(site.inbox_dir)
        Daemon(site).run(once=True)
        with Results.open(site.database_url) as results:
            logits.append([row.logit for row in results.images(Filters())])
        monkeypatch.setattr(scoring, "resized", on_a_device)
    assert len(asked) == len(logits[1]) == 9
    assert sorted(logits[0]) == sorted(logits[1])
