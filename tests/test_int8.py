"""Int8: right where it is used, refused where it is not, and compiled once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from site_home import film, make_home

from mura_batch.area import Area
from mura_batch.cli import program
from mura_batch.errors import WeightsRefused
from mura_batch.network import EvidenceNet, network_with
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime import Inference, Runtime, load, words
from mura_batch.runtime.compiled import compiled
from mura_batch.runtime.openvino_runtime import openvino
from mura_batch.runtime.quantization import activation_ranges
from mura_batch.weights import Int8Form, WeightsStore, bundled_card, bundled_int8_form, load_bundled

SPEC = Preprocessing(size=96)
RANGES = bundled_int8_form(Area.XR_HAND).ranges


WEIGHTS = load_bundled(Area.XR_HAND)[0]
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
INT8_HERE = "int8+bf16" if HAS_BF16 else "int8"


def network() -> EvidenceNet:
    found = network_with(WEIGHTS)
    assert isinstance(found, EvidenceNet)
    return found


def films(count: int, size: int = SPEC.size) -> np.ndarray:
    random = np.random.default_rng(count)
    coarse = random.integers(0, 255, (count, size // 8, size // 8), np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, axis=1).repeat(8, axis=2))


def score(runtime: Runtime, pixels: np.ndarray) -> Inference:
    return Inference.joined(runtime.infer(pixels))


# ---- the graph


def test_ranges_are_of_what_comes_into_all_convolutions_but_the_first() -> None:
    some, more = films(2), films(3)
    ranges = activation_ranges(network(), SPEC, [some])
    assert len(ranges) == len(RANGES) == 119
    assert "conv0" not in ranges
    assert set(ranges) == set(RANGES)
    wider = activation_ranges(network(), SPEC, [some, more])
    assert all(wider[name] >= most > 0 for name, most in ranges.items())


def test_int8_says_nearly_what_f32_says_and_is_other_arithmetic() -> None:
    pixels = films(4)
    ranges = activation_ranges(network(), SPEC, [pixels])
    exact, quick = (compiled(WEIGHTS, SPEC, how) for how in ({}, ranges))
    assert (words(exact), words(quick)) == ("openvino f32 cpu", f"openvino {INT8_HERE} cpu")
    true, found = score(exact, pixels), score(quick, pixels)
    assert 1e-5 < np.abs(true.logits - found.logits).max() < 0.2
    assert np.abs(true.maps - found.maps).max() < 0.1


@pytest.mark.skipif(not HAS_BF16, reason="needs a processor that has bf16")
def test_what_is_not_int8_is_computed_in_bf16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = films(4)
    ranges = activation_ranges(network(), SPEC, [pixels])
    both = compiled(WEIGHTS, SPEC, ranges)
    monkeypatch.setattr("mura_batch.runtime.compiled._capabilities", list)
    alone = compiled(WEIGHTS, SPEC, ranges)
    assert (both.precision, alone.precision) == ("int8+bf16", "int8")
    assert 1e-5 < np.abs(score(both, pixels).logits - score(alone, pixels).logits).max() < 0.2


def test_channels_that_are_dead_are_no_trouble() -> None:
    tensors = {name: tensor.copy() for name, tensor in WEIGHTS.tensors.items()}
    tensors["features.denseblock1.denselayer1.conv1.weight"][:3] = 0
    tensors["features.denseblock2.denselayer1.conv2.weight"][:] = 0
    found = score(compiled(replace(WEIGHTS, tensors=tensors), SPEC, RANGES), films(1))
    assert np.isfinite(found.logits).all()


# ---- the choice on this machine


def test_auto_takes_int8_where_it_is_right_here_and_faster(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = load(
        WEIGHTS, Preprocessing(size=320, fit="pad"), device="cpu", precision="auto", ranges=RANGES
    )
    refused = [record.why for record in caplog.records if "int8 is not used" in record.message]
    assert found.precision == ("f32" if refused else INT8_HERE)


def test_int8_that_is_wrong_on_this_machine_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    clipped = dict.fromkeys(RANGES, 0.01)
    with caplog.at_level(logging.WARNING):
        found = load(WEIGHTS, SPEC, device="cpu", precision="auto", ranges=clipped)
    assert found.precision == "f32"
    assert any("off in the mean" in getattr(record, "why", "") for record in caplog.records)


@pytest.mark.parametrize("how", [{"runtime": "torch", "precision": "auto"}, {"precision": "f32"}])
def test_torch_on_a_cpu_and_who_asks_for_f32_stay_f32(how: dict[str, Any]) -> None:
    assert load(WEIGHTS, SPEC, device="cpu", ranges=RANGES, **how).precision == "f32"


# ---- compiled once


@contextmanager
def nothing_compiled() -> Iterator[None]:
    def never(*_: object) -> None:
        raise AssertionError("the network was compiled again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mura_batch.runtime.compiled.compiled", never)
        yield


def test_a_compiled_network_is_found_again_without_compiling_it(tmp_path: Path) -> None:
    here = partial(load, WEIGHTS, runtime="openvino")
    first = here(SPEC, kept=tmp_path / "own")
    with nothing_compiled():
        again = here(SPEC, kept=tmp_path / "own")
        for spec, kept in ((replace(SPEC, size=64), "own"), (SPEC, "other")):
            with pytest.raises(AssertionError, match="compiled again"):
                here(spec, kept=tmp_path / kept)
    pixels = films(3)
    np.testing.assert_array_equal(score(first, pixels).logits, score(again, pixels).logits)
    assert (words(again), again.nbytes) == (words(first), first.nbytes)


def test_an_int8_network_that_is_found_again_computes_as_before(tmp_path: Path) -> None:
    spec = Preprocessing(size=320, fit="pad")
    here = partial(load, WEIGHTS, spec, device="cpu", precision="auto", ranges=RANGES)
    first = here(kept=tmp_path / "own")
    with nothing_compiled():
        again = here(kept=tmp_path / "own")
    assert words(again) == words(first)
    pixels = films(2, 320)
    np.testing.assert_array_equal(score(first, pixels).logits, score(again, pixels).logits)


def test_a_compiled_network_of_other_weights_is_not_taken_for_these(tmp_path: Path) -> None:
    for name in ("one", "other"):
        load(WEIGHTS, SPEC, runtime="openvino", kept=tmp_path / name)
    (one,), (other,) = ((tmp_path / name).iterdir() for name in ("one", "other"))
    one.rename(other.with_name(one.name))
    other.unlink()
    with nothing_compiled(), pytest.raises(AssertionError, match="compiled again"):
        load(WEIGHTS, SPEC, runtime="openvino", kept=tmp_path / "other")


def test_a_refusal_is_kept_and_told_at_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clipped = dict.fromkeys(RANGES, 0.01)
    for start in (nullcontext(), nothing_compiled()):
        caplog.clear()
        with start:
            found = load(
                WEIGHTS,
                SPEC,
                runtime="openvino",
                precision="auto",
                ranges=clipped,
                kept=tmp_path / "own",
            )
        assert found.precision == "f32"
        assert any("off in the mean" in getattr(record, "why", "") for record in caplog.records)


@pytest.mark.parametrize("harm", [b"", b"{}\n", b"\xff\xfe not JSON", None])
def test_a_damaged_compiled_network_is_made_anew(harm: bytes | None, tmp_path: Path) -> None:
    here = partial(load, WEIGHTS, SPEC, runtime="openvino", kept=tmp_path / "own")
    true = score(here(), films(1)).logits
    (file,) = (tmp_path / "own").iterdir()
    file.write_bytes(file.read_bytes()[:-9] + b"tampered!" if harm is None else harm)
    np.testing.assert_array_equal(score(here(), films(1)).logits, true)
    with nothing_compiled():
        here()


def test_the_daemon_on_openvino_imports_no_torch_at_any_start(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", runtime="openvino")
    watch = (
        "import sys; from mura_batch.cli import main\n"
        "sys.argv = ['mura-batch', 'watch', '--once']\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    for mark, start in enumerate(("first", "later")):
        film(home.inbox / f"XR_ELBOW/{start}/image1.png", mark)
        done = subprocess.run(
            [sys.executable, "-c", watch],
            env=home.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.endswith("False\n"), start
    rows = json.loads(home.command("query", "--json").stdout)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert len(list(home.path.glob("compiled/*/*"))) == 1


# ---- its record


shares = st.floats(0, 1)
forms = st.builds(
    Int8Form,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    ranges=st.dictionaries(st.text(max_size=9), st.floats(1e-9, 1e6), min_size=1),
    flipped=shares,
    different=shares,
    auc_lost=st.none() | st.floats(-1, 1),
    studies=st.integers(1, 10**6),
    on=st.text(max_size=30),
)


@given(forms)
def test_a_form_is_read_as_it_was_written(form: Int8Form) -> None:
    assert Int8Form.from_json(form.to_json()) == form
    good = form.flipped <= 0.01 and form.different < 0.01 and (form.auc_lost or 0) < 0.005
    assert (form.refusal == "") is good
    assert ("accepted" in form.words()) is good


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 9}, "update mura-batch"),
        ({"flipped": 2}, "flipped must be a number from 0 to 1"),
        ({"ranges": {"conv": 0}}, "conv must be a number"),
        ({"ranges": []}, "ranges: must be a JSON object"),
        ({"ranges": {}}, "ranges of no convolution"),
        ({"sha256": "12"}, "sha256"),
        ({"more": 1}, "unknown more"),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_name(change: dict[str, object], told: str) -> None:
    text = bundled_int8_form(Area.XR_HAND).to_json()
    with pytest.raises(WeightsRefused, match=told):
        Int8Form.from_json(json.dumps(json.loads(text) | change))


def test_the_bundled_weights_have_an_accepted_form_and_verify_looks_at_it(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    store.install_bundled()
    card = bundled_card(Area.XR_HAND)
    form = store.int8_form(card)
    assert form == bundled_int8_form(Area.XR_HAND)
    assert form is not None
    assert not form.refusal
    assert store.verify() == []
    store.add_int8_form(replace(form, sha256="0" * 64), card)
    assert "is the int8 form of 000000000000" in store.verify()[0]


# ---- measured


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("training.quantize._CALIBRATING", 4)
    monkeypatch.setattr("training.quantize._FEWEST", 3)
    WeightsStore(tmp_path / "home/weights").install_bundled()
    return tmp_path / "home"


def quantize(home: Path, path: Path) -> tuple[int, str]:
    done = CliRunner().invoke(
        program, ["--home", str(home), "models", "quantize", "XR_HAND", str(path)]
    )
    return done.exit_code, done.output


def test_a_folder_of_films_gives_ranges_and_a_verdict(home: Path, tmp_path: Path) -> None:
    for number in range(8):
        film(tmp_path / f"archive/study{number}/film.png", number)
        (tmp_path / f"archive/study{number}/claim.json").write_text("{}")  # no film
    store, card = WeightsStore(home / "weights"), bundled_card(Area.XR_HAND)
    before = store.int8_form(card)
    code, told = quantize(home, tmp_path / "archive")
    after = store.int8_form(card)
    assert after is not None
    assert after != before
    assert after.studies == 4
    assert after.auc_lost is None
    assert after.words() in told
    assert code == (1 if after.refusal else 0)
    shown = CliRunner().invoke(program, ["--home", str(home), "models", "show", "XR_HAND"])
    assert after.words() in shown.stderr


def test_too_few_films_say_how_many_are_needed(home: Path, tmp_path: Path) -> None:
    film(tmp_path / "archive/study/film.png", 1)
    code, told = quantize(home, tmp_path / "archive")
    assert code == 4
    assert "archive: 1 films of 1 patients" in told
    assert "3 studies of other patients" in told
