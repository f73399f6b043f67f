"""``runtime = "auto"`` takes what is faster here, and asks once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mura_batch.area import Area
from mura_batch.config import Settings
from mura_batch.direct import Request, score_paths
from mura_batch.runtime import Inference, load, race, words
from mura_batch.runtime.openvino_runtime import OpenVinoRuntime
from mura_batch.weights import load_bundled

pytest.importorskip("openvino")
WEIGHTS, CARD = load_bundled(Area.XR_HAND)


@pytest.fixture(autouse=True)
def _nothing_raced() -> None:
    race._raced.clear()


def test_the_faster_runtime_is_taken_and_known_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = partial(load, WEIGHTS, CARD.preprocessing, device="cpu")
    here = auto(kept=tmp_path / "as-it-is")
    told = json.loads((tmp_path / "as-it-is/race.json").read_text())
    assert all(0 < told[name] < 60 for name in ("torch", "openvino"))
    assert here.name == ("torch" if told["torch"] < 0.9 * told["openvino"] else "openvino")

    quick = OpenVinoRuntime.infer

    def slow(self: OpenVinoRuntime, pixels: np.ndarray) -> Iterator[Inference]:
        time.sleep(2 * told["torch"])
        return quick(self, pixels)

    race._raced.clear()
    with monkeypatch.context() as patch:
        patch.setattr(OpenVinoRuntime, "infer", slow)
        assert words(auto(kept=tmp_path / "slow")) == "torch f32 cpu"

    def never(*_: object) -> float:
        raise AssertionError("timed again")

    monkeypatch.setattr(race, "_seconds", never)
    assert auto(kept=tmp_path / "slow").name == "torch"
    assert auto(kept=tmp_path / "as-it-is").name == here.name
    assert load(WEIGHTS, CARD.preprocessing, runtime="openvino", kept=tmp_path / "slow").name == (
        "openvino"
    )
    assert auto().name == "openvino"  # nowhere to keep what was found out
    harms = (
        *("", "{}", "[" * 200_000, json.dumps(told)[:-1] + ', "openvino": 1' + "0" * 400 + "}"),
        *(json.dumps(told | {name: -1}) for name in ("torch", "openvino")),
        json.dumps(told | {"on": told["on"][:-1]}),
    )
    for harm in harms:
        race._raced.clear()
        (tmp_path / "slow/race.json").write_text(harm)
        with pytest.raises(AssertionError, match="timed again"):
            auto(kept=tmp_path / "slow")


def test_a_home_that_goes_away_is_not_raced_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("raced")

    monkeypatch.setattr(race, "_of_torch", never)
    film = Path(race.__file__).parents[1] / "samples/elbow_lateral.png"
    request = Request((film,), area=Area.XR_ELBOW)
    (study,) = score_paths(Settings(home=tmp_path), request).studies
    assert study.state == "done"


def test_networks_of_one_kind_race_once_and_others_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def timed(_: str, size: int) -> float:
        sizes.append(size)
        return 100.0

    monkeypatch.setattr(race, "_of_torch", timed)
    for kept, size in (("one", 64), ("other", 64), ("one", 96)):
        spec = replace(CARD.preprocessing, size=size)
        assert load(WEIGHTS, spec, device="cpu", kept=tmp_path / kept).name == "openvino"
        assert (tmp_path / kept / "race.json").exists()
    assert sizes == [64, 96]


def test_where_torch_does_not_run_openvino_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(race.sys, "executable", "/nowhere/python")
    assert load(WEIGHTS, CARD.preprocessing, device="cpu", kept=tmp_path).name == "openvino"
    assert "torch could not be timed" in caplog.text
    assert not (tmp_path / "race.json").exists()  # it is asked again at the next start


def test_torch_that_takes_too_long_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "_LONGEST", 0.1)
    assert load(WEIGHTS, CARD.preprocessing, device="cpu", kept=tmp_path).name == "openvino"
    assert json.loads((tmp_path / "race.json").read_text())["torch"] == float("inf")
