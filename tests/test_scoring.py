"""Batches cross studies, a lone view does not wait, and one bad view fails alone."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from site_home import make_home

from mura_batch.area import Area
from mura_batch.config import Settings
from mura_batch.daemon import Daemon
from mura_batch.errors import Misconfigured, Transient, WeightsRefused
from mura_batch.runtime import Inference, Runtime, load
from mura_batch.scoring import Scorer, warm_scorer
from mura_batch.weights import WeightsStore, load_bundled
from mura_batch.weights_card import Card


class Watched:
    """A real runtime that remembers batch sizes and refuses what it is told to."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.name, self.device, self.nbytes = runtime.name, runtime.device, runtime.nbytes
        self.precision = runtime.precision
        self.batches: list[int] = []
        self.poison = -1
        self.most = 1000
        self.breaks_after = -1  # views, once
        self.held: list[weakref.ref[np.ndarray]] = []
        self.free: list[bool] = []
        self.under_way = self.most_under_way = 0

    def infer(self, pixels: np.ndarray) -> Iterator[Inference]:
        self.batches.append(len(pixels))
        if len(pixels) > self.most:
            room = np.zeros(8)  # of the failed pass: its frame holds it
            self.held.append(weakref.ref(room))
            raise MemoryError
        self.free.append(all(room() is None for room in self.held))
        if (pixels[:, 0, 0] == self.poison).any():
            raise RuntimeError("bad batch")
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return self.parts(pixels)

    def parts(self, pixels: np.ndarray) -> Iterator[Inference]:
        for number, view in enumerate(pixels):
            if number == self.breaks_after:
                self.breaks_after = -1
                raise MemoryError
            yield from self.runtime.infer(view[np.newaxis])
        self.under_way -= 1


@pytest.fixture(scope="module")
def real() -> tuple[Runtime, Card]:
    weights, card = load_bundled(Area.XR_HAND)
    return load(weights, card.preprocessing, runtime="torch", device="cpu"), card


@pytest.fixture
def watched(real: tuple[Runtime, Card]) -> Watched:
    return Watched(real[0])


@pytest.fixture
def card(real: tuple[Runtime, Card]) -> Card:
    return real[1]


def views(card: Card, count: int) -> np.ndarray:
    size = card.preprocessing.size
    return np.random.default_rng(5).integers(1, 256, (count, size, size)).astype(np.uint8)


def test_forty_waiting_views_share_their_forward_passes(watched: Watched, card: Card) -> None:
    pixels = views(card, 40)
    with Scorer(lambda _: watched, batch=16, batch_seconds=60) as scorer:
        with scorer.feeding():
            scores = []
            for view in pixels:
                scorer.announce(card)
                scores.append(scorer.submit(card, view))
        results = [score.result(60) for score in scores]
    assert scorer.forward_calls <= 4
    (alone,) = watched.runtime.infer(pixels[7:8])
    assert results[7].logit == pytest.approx(float(alone.logits[0]), abs=1e-4)
    assert len({round(result.logit, 6) for result in results}) > 1


def test_a_lone_view_does_not_wait_for_company(watched: Watched, card: Card) -> None:
    with Scorer(lambda _: watched, batch=16, batch_seconds=3600) as scorer:
        scorer.announce(card)
        scorer.submit(card, views(card, 1)[0]).result(30)
    assert watched.batches == [1]


def test_a_view_waits_for_announced_company_no_longer_than_the_bound(
    watched: Watched, card: Card
) -> None:
    with Scorer(lambda _: watched, batch=16, batch_seconds=0.3) as scorer:
        scorer.announce(card)
        scorer.announce(card)  # this one never comes
        started = time.monotonic()
        scorer.submit(card, views(card, 1)[0]).result(30)
        assert time.monotonic() - started >= 0.3


def test_an_expected_network_is_made_ready_before_there_are_views(
    watched: Watched, card: Card
) -> None:
    made = threading.Semaphore(0)
    loads: list[bool] = []

    def ready(_: Card) -> Runtime:
        loads.append(bool(loads))
        made.release()
        if not loads[-1]:
            raise WeightsRefused("not yet")
        return watched

    with Scorer(ready, batch=16, batch_seconds=3600) as scorer:
        for _ in range(2):  # what failed once is tried again
            scorer.expect(card)
            assert made.acquire(timeout=30)
        scorer.announce(card)
        scorer.submit(card, views(card, 1)[0]).result(30)
    assert loads == [False, True]


def test_the_network_is_made_ready_while_the_first_study_settles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Settings(home=make_home(tmp_path / "home").path, runtime="torch", settle_seconds=3600.0)
    (site.inbox_dir / "hand.png").touch()
    watching = Daemon(site)
    with caplog.at_level("INFO"), ThreadPoolExecutor(1) as beside:
        running = beside.submit(watching.run)
        try:
            deadline = time.monotonic() + 60
            while "network ready" not in caplog.messages:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            watching.stop()
    assert not running.result().finished
    assert "study received" not in caplog.messages


def test_a_withdrawn_view_holds_nobody_up(watched: Watched, card: Card) -> None:
    with Scorer(lambda _: watched, batch=16, batch_seconds=3600) as scorer:
        scorer.announce(card)
        scorer.announce(card)
        score = scorer.submit(card, views(card, 1)[0])
        scorer.withdraw(card)
        score.result(30)


def test_one_bad_view_fails_alone(watched: Watched, card: Card) -> None:
    pixels = views(card, 8)
    pixels[5, 0, 0] = 0
    watched.poison = 0
    with Scorer(lambda _: watched, batch=8, batch_seconds=3600) as scorer:
        for _ in pixels:
            scorer.announce(card)
        scores = [scorer.submit(card, view) for view in pixels]
        for index, score in enumerate(scores):
            if index == 5:
                with pytest.raises(Transient):
                    score.result(60)
            else:
                assert np.isfinite(score.result(60).logit)


def test_a_batch_that_does_not_fit_into_memory_is_split(watched: Watched, card: Card) -> None:
    watched.most = 2
    with Scorer(lambda _: watched, batch=8, batch_seconds=3600) as scorer:
        for _ in range(8):
            scorer.announce(card)
        scores = [scorer.submit(card, view) for view in views(card, 8)]
        assert all(np.isfinite(score.result(60).logit) for score in scores)
    assert max(size for size in watched.batches if size <= 2) == 2
    assert all(watched.free), "what failed still holds the memory that its half needs"


@pytest.mark.parametrize(("done", "again"), [(0, [4, 4]), (3, [2, 3]), (6, [1, 1]), (7, [1])])
def test_what_a_pass_scored_before_it_failed_is_kept(
    watched: Watched, card: Card, done: int, again: list[int]
) -> None:
    pixels = views(card, 8)
    expected = Inference.joined(watched.runtime.infer(pixels)).logits
    watched.breaks_after = done
    with Scorer(lambda _: watched, batch=8, batch_seconds=3600) as scorer:
        for _ in pixels:
            scorer.announce(card)
        scores = [scorer.submit(card, view) for view in pixels]
        found = [score.result(60).logit for score in scores]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert watched.batches == [8, *again]


@pytest.mark.parametrize(("networks", "most"), [(1, 2), (2, 1)])
def test_a_second_pass_is_started_ahead_for_the_same_network_only(
    watched: Watched, card: Card, networks: int, most: int
) -> None:
    cards = [replace(card, sha256=f"{number:064}") for number in range(networks)]
    with Scorer(lambda _: watched, batch=2, batch_seconds=3600) as scorer:
        with scorer.feeding():
            scores = []
            for number, view in enumerate(views(card, 8)):
                scorer.announce(cards[number // 2 % networks])
                scores.append(scorer.submit(cards[number // 2 % networks], view))
        assert all(np.isfinite(score.result(60).logit) for score in scores)
    assert watched.most_under_way == most
    assert watched.batches == [2, 2, 2, 2]


def test_a_view_is_not_overtaken_for_good_by_a_network_that_is_always_busy(
    watched: Watched, card: Card
) -> None:
    rare = replace(card, sha256="0" * 64)
    order: list[str] = []
    pixels = views(card, 1)[0]
    with Scorer(lambda _: watched, batch=2, batch_seconds=0.1) as scorer, scorer.feeding():

        def ask_for(card: Card, left: int) -> None:
            def next_one(_: object) -> None:
                order.append(card.sha256)
                if left and rare.sha256 not in order:
                    ask_for(card, left - 1)

            scorer.announce(card)
            scorer.submit(card, pixels).add_done_callback(next_one)

        ask_for(rare, 0)
        for _ in range(6):
            ask_for(card, 30)
    assert order[-1] == card.sha256
    assert rare.sha256 in order[:-6]


def test_refused_weights_reach_every_view(card: Card) -> None:
    def refuse(_: Card) -> Runtime:
        raise WeightsRefused("changed on disk")

    with Scorer(refuse, batch=4, batch_seconds=3600) as scorer:
        scorer.announce(card)
        with pytest.raises(WeightsRefused):
            scorer.submit(card, views(card, 1)[0]).result(30)


def test_the_least_recently_used_network_goes_first(watched: Watched, card: Card) -> None:
    loaded: list[str] = []

    def make(which: Card) -> Watched:
        loaded.append(which.sha256[0])
        return watched

    cards = {name: replace(card, sha256=name * 64) for name in "abc"}
    with Scorer(make, cache_bytes=2 * watched.nbytes) as scorer:
        for name in "abacab":
            scorer.announce(cards[name])
            scorer.submit(cards[name], views(card, 1)[0]).result(30)
    assert loaded == ["a", "b", "c", "b"]


def test_leaving_scores_what_waits(watched: Watched, card: Card) -> None:
    with Scorer(lambda _: watched, batch=16, batch_seconds=3600) as scorer:
        scorer.announce(card)
        scorer.announce(card)
        score = scorer.submit(card, views(card, 1)[0])
    assert np.isfinite(score.result(0).logit)


@pytest.mark.parametrize(
    "breakdown", [MemoryError(), RuntimeError("CUDA error"), OSError(5, "EIO")]
)
def test_a_network_that_cannot_be_loaded_now_is_tried_again(
    watched: Watched, card: Card, breakdown: Exception
) -> None:
    loads = iter([breakdown])

    def load_once_broken(_: Card) -> Watched:
        for error in loads:
            raise error
        return watched

    with Scorer(load_once_broken, batch_seconds=0) as scorer:
        scorer.announce(card)
        with pytest.raises(Transient, match="loading the network"):
            scorer.submit(card, views(card, 1)[0]).result(timeout=30)
        scorer.announce(card)
        assert np.isfinite(scorer.submit(card, views(card, 1)[0]).result(timeout=30).logit)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"device": "foo"}, "device 'foo' is not on this machine"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not on this machine"),
        ({"device": "cuda:0", "runtime": "openvino"}, "works on the CPU only"),
    ],
)
def test_a_device_that_is_not_there_is_named_before_anything_is_scored(
    tmp_path: Path, asked: dict[str, str], named: str
) -> None:
    with pytest.raises(Misconfigured, match=named):
        warm_scorer(Settings(home=tmp_path, **asked), WeightsStore(tmp_path))
