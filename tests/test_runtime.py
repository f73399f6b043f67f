"""Every runtime gives torch's numbers, and says in words what it cannot do."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, Transient
from mura_batch.network import network_with, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime import Inference, OutOfMemory, Runtime, load, torch_runtime
from mura_batch.runtime.cuda_runtime import CudaRuntime, filled, portions
from mura_batch.runtime.inference import memory_watched
from mura_batch.runtime.openvino_graph import openvino_model
from mura_batch.runtime.torch_runtime import Passes
from mura_batch.tensors import BLOCKS, Weights, checked, shapes
from mura_batch.weights import load_bundled

NAMES = ("torch", "openvino")
# Not ImageNet's: a runtime that normalised by constants of its own would show.
SPEC = Preprocessing(size=96, mean=(0.2, 0.3, 0.4), std=(0.3, 0.2, 0.25))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's threads wait for each other for seconds where a machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MEAN, LSE, HYBRID = "densenet121", "densenet121-lse", "densenet121-transformer"


def trained(architecture: str = MEAN) -> Weights:
    return replace(load_bundled(Area.XR_HAND)[0], architecture=architecture)


def drawn(architecture: str = MEAN) -> Weights:
    """Weights of which no two layers have the same; nothing grows or fades on its way."""
    random = np.random.default_rng(4)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name:
            low, high = {"bias": (-0.5, 0.5), "running_mean": (-1, 1)}.get(
                name.rpartition(".")[2], (0.5, 1.5)
            )
            return random.uniform(low, high, shape)
        return random.normal(0, (2 / math.prod(shape[1:])) ** 0.5 if shape[1:] else 1, shape)

    wanted = {n: s for n, s in shapes(architecture).items() if s}
    return checked({n: draw(n, s).astype(np.float32) for n, s in wanted.items()}, architecture)


@pytest.fixture(scope="module")
def runtimes() -> dict[str, Runtime]:
    return {name: load(trained(), SPEC, runtime=name, device="cpu") for name in NAMES}


def films(count: int, size: int) -> np.ndarray:
    """Different films: blobs of different places and brightness on noise."""
    random = np.random.default_rng(count)
    rows, columns = np.mgrid[:size, :size] / size
    blobs = [
        np.exp(-30 * ((rows - y) ** 2 + (columns - x) ** 2)) * bright
        for y, x, bright in random.uniform((0, 0, 80), (1, 1, 255), (count, 3))
    ]
    noise = random.uniform(0, 40, (count, size, size))
    return np.clip(np.array(blobs) + noise, 0, 255).astype(np.uint8)


def score(runtime: Runtime, pixels: np.ndarray) -> Inference:
    return Inference.joined(runtime.infer(pixels))


def plain(pixels: np.ndarray, spec: Preprocessing, weights: Weights) -> Inference:
    """What the network says when torch is used as in its manual."""
    with torch.no_grad():
        images = normalise(torch.from_numpy(pixels), spec.mean, spec.std)
        logits, maps = network_with(weights)(images)
    return Inference(logits.numpy(), maps.numpy())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("size", "count", "weights"),
    [
        pytest.param(160, 3, trained(MEAN), id="mean"),
        pytest.param(224, 1, trained(MEAN), id="mean, large"),
        pytest.param(160, 2, trained(LSE), id="log-sum-exp"),
        pytest.param(96, 2, drawn(MEAN), id="mean, drawn weights"),
        pytest.param(96, 2, drawn(LSE), id="log-sum-exp, drawn weights"),
    ],
)
def test_logits_and_maps_are_those_of_the_plain_network(
    name: str, size: int, count: int, weights: Weights
) -> None:
    spec, pixels = Preprocessing(size=size), films(count, size)
    found = score(load(weights, spec, runtime=name, device="cpu"), pixels)
    expected = plain(pixels, spec, weights)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-4, rtol=0)
    assert found.logits.dtype == found.maps.dtype == np.float32
    assert found.logits.shape == (count,)
    assert found.maps.shape == (count, size // 32, size // 32)


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_deviation_come_from_the_card(name: str, runtimes: dict[str, Runtime]) -> None:
    pixels = films(2, SPEC.size)
    found = score(runtimes[name], pixels)
    np.testing.assert_allclose(
        found.logits, plain(pixels, SPEC, trained()).logits, atol=1e-4, rtol=0
    )
    others = plain(pixels, Preprocessing(size=SPEC.size), trained()).logits
    assert np.abs(found.logits - others).max() > 1e-3, "the films do not tell the two apart"


@settings(max_examples=8, deadline=None)
@given(order=st.lists(st.integers(0, 5), min_size=1, max_size=7), name=st.sampled_from(NAMES))
def test_a_view_scores_the_same_in_any_company(
    order: list[int], name: str, runtimes: dict[str, Runtime]
) -> None:
    pixels = films(6, SPEC.size)
    alone, together = score(runtimes[name], pixels), score(runtimes[name], pixels[order])
    np.testing.assert_allclose(together.logits, alone.logits[order], atol=1e-5, rtol=0)
    np.testing.assert_allclose(together.maps, alone.maps[order], atol=1e-5, rtol=0)


def test_views_keep_their_places_over_several_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = films(11, SPEC.size)
    runtime = load(trained(), SPEC, runtime="torch", device="cpu")
    one_stream = score(runtime, pixels)
    with ThreadPoolExecutor(3) as streams:
        monkeypatch.setattr(torch_runtime, "_stream_count", lambda: 3)
        monkeypatch.setattr(torch_runtime, "_streams", lambda: streams)
        found = score(runtime, pixels)
    np.testing.assert_allclose(found.logits, one_stream.logits, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.maps, one_stream.maps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_results_outlive_the_next_batch(name: str, runtimes: dict[str, Runtime]) -> None:
    first = score(runtimes[name], films(2, SPEC.size))
    before = first.maps.copy()
    score(runtimes[name], films(3, SPEC.size))
    np.testing.assert_array_equal(first.maps, before)


@pytest.mark.parametrize("name", NAMES)
def test_read_only_pixels_are_scored(name: str, runtimes: dict[str, Runtime]) -> None:
    pixels = films(1, SPEC.size)
    pixels.setflags(write=False)
    assert np.isfinite(score(runtimes[name], pixels).logits).all()


def test_a_warm_network_says_what_it_is(runtimes: dict[str, Runtime]) -> None:
    weights = trained().nbytes
    for name, runtime in runtimes.items():
        assert (runtime.name, runtime.device) == (name, "cpu")
        assert runtime.nbytes >= weights


def test_auto_on_a_cpu_is_openvino() -> None:
    assert load(trained(), SPEC, device="cpu").name == "openvino"


@pytest.fixture
def _no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino_runtime", "openvino_graph", "compiled"):
        monkeypatch.delitem(sys.modules, f"mura_batch.runtime.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.mark.usefixtures("_no_openvino")
def test_auto_without_openvino_is_torch() -> None:
    assert load(trained(), SPEC, device="cpu").name == "torch"


@pytest.mark.usefixtures("_no_openvino")
def test_a_missing_openvino_is_named_with_its_cure() -> None:
    with pytest.raises(Misconfigured, match=r"pip install 'mura-batch\[openvino\]'"):
        load(trained(), SPEC, runtime="openvino")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:-1", "cpu:0", "", "CPU"])
def test_an_unknown_device_stops_with_those_that_are_there(device: str) -> None:
    with pytest.raises(Misconfigured, match=r"auto or one of cpu"):
        load(trained(), SPEC, device=device)


def test_an_unknown_runtime_stops() -> None:
    with pytest.raises(Misconfigured, match=r"auto, torch or openvino"):
        load(trained(), SPEC, runtime="onnx")


@given(st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_parts_for_a_gpu_hold_every_view_once_and_have_few_sizes(count: int) -> None:
    pixels = np.arange(1, count + 1, dtype=np.uint16).view(np.uint8).reshape(count, 1, 2)
    parts = list(portions(pixels))
    whole = [filled(part) for part in parts]
    assert {len(each) for each in whole} <= {1, 2, 4, 8, 16, 32, 64}
    kept = [each[: len(part)] for each, part in zip(whole, parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(kept), pixels)
    assert not any(each[len(part) :].any() for each, part in zip(whole, parts, strict=True))


every_architecture = pytest.mark.parametrize(
    "weights", [trained(MEAN), trained(LSE), drawn(HYBRID)], ids=[MEAN, LSE, HYBRID]
)


@every_architecture
def test_float16_convolutions_say_nearly_what_float32_ones_say(weights: Weights) -> None:
    quick = Passes(network_with(weights), SPEC, "cpu", "fp16")
    pixels = films(2, SPEC.size)
    found, true = quick(torch.from_numpy(pixels)), plain(pixels, SPEC, weights)
    assert found.logit.dtype == found.map.dtype == torch.float32
    assert 1e-6 < np.abs(found.logit.numpy() - true.logits).max() < 0.02
    assert np.abs(found.map.numpy() - true.maps).max() < 0.02
    assert quick.nbytes < 0.7 * weights.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("precision", "tolerance"), [("f32", 1e-3), ("fp16", 2e-2)])
@every_architecture
def test_cuda_scores_like_the_cpu(
    weights: Weights, precision: Literal["f32", "fp16"], tolerance: float
) -> None:
    runtime = CudaRuntime(network_with(weights), SPEC, "cuda:0", precision)
    pixels = films(70, SPEC.size)
    true = plain(pixels, SPEC, weights)
    for count in (70, 3, 1, 70, 4):  # recorded, filled up, and replayed in any order
        found = score(runtime, pixels[:count])
        np.testing.assert_allclose(found.logits, true.logits[:count], atol=tolerance, rtol=0)
        np.testing.assert_allclose(found.maps, true.maps[:count], atol=tolerance, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_passes_under_way_do_not_touch_each_other() -> None:
    runtimes = [CudaRuntime(network_with(trained()), SPEC, "cuda:0", "f32") for _ in range(2)]
    pixels = films(24, SPEC.size)
    alone = [score(runtimes[0], pixels[at : at + 8]).logits for at in (0, 8, 16)]
    started = [runtimes[at % 2].infer(pixels[8 * at : 8 * at + 8]) for at in (0, 1, 2)]
    together = [Inference.joined(parts).logits for parts in started]
    np.testing.assert_allclose(together, alone, atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_auto_on_a_gpu_is_torch_there_and_openvino_refuses_it() -> None:
    found = load(trained(), SPEC, precision="auto")
    assert (found.name, found.device) == ("torch", "cuda:0")
    assert load(trained(), SPEC).precision == "f32"
    with pytest.raises(Misconfigured, match="CPU only"):
        load(trained(), SPEC, runtime="openvino", device="cuda")


def test_a_batch_beyond_all_memory_is_out_of_memory_and_may_be_tried_smaller(
    runtimes: dict[str, Runtime],
) -> None:
    film = films(1, SPEC.size)
    # More than a process can address, so that no system promises it and then cannot keep it.
    endless = np.lib.stride_tricks.as_strided(film, (1, 1 << 24, 1 << 24), (0, 0, 0))
    with pytest.raises(OutOfMemory, match="batch") as caught:
        score(runtimes["torch"], endless)
    assert isinstance(caught.value, Transient)
    assert score(runtimes["torch"], film).logits.shape == (1,)


def raise_(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.01 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Exception from src/inference/src/cpp/core.cpp:109: std::bad_alloc"),
    ],
    ids=["python", "cuda", "mps", "cpu", "openvino"],
)
def test_the_libraries_words_for_a_full_memory_are_understood(error: Exception) -> None:
    with pytest.raises(OutOfMemory), memory_watched(4, "cpu"):
        raise_(error)()


def test_another_failure_of_the_device_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="device-side assert"), memory_watched(4, "cuda:0"):
        raise_(RuntimeError("CUDA error: device-side assert triggered"))()


def test_each_concatenation_goes_on_from_the_one_before() -> None:
    """Else OpenVINO rounds to int8 before each of its parts, which takes four times the memory."""
    graph = openvino_model(trained(), SPEC)
    joins = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Concat"]
    assert len(joins) == sum(BLOCKS)
    assert all(len(join.inputs()) == 2 for join in joins)


def test_torch_leaves_the_weights_as_they_are() -> None:
    weights = drawn()
    before = {name: tensor.copy() for name, tensor in weights.tensors.items()}
    with torch.no_grad():
        for tensor in network_with(weights).state_dict().values():
            tensor.zero_()
    for name, tensor in weights.tensors.items():
        np.testing.assert_array_equal(tensor, before[name])


def test_openvino_tells_nobody_that_it_was_imported(tmp_path: Path) -> None:
    outside_ci = {name: value for name, value in os.environ.items() if name != "CI"}
    subprocess.run(
        [sys.executable, "-c", "import mura_batch.runtime.openvino_runtime"],
        env={**outside_ci, "HOME": str(tmp_path)},
        check=True,
    )
    assert not list(tmp_path.iterdir())  # it would keep the sender's name and its counts here
