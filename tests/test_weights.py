"""Cards, and the store of weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, NoWeights, WeightsRefused
from mura_batch.network import network_of, network_with, weights_of
from mura_batch.preprocessing import Preprocessing
from mura_batch.tensors import checked, read, shapes
from mura_batch.weights import (
    BUNDLED,
    Calibration,
    Card,
    Metric,
    OperatingPoint,
    WeightsStore,
    bundled_card,
    sha256_of,
)
from mura_batch.weights_card import ARCHITECTURE, ARCHITECTURES

HAND, WRIST = Area.XR_HAND, Area.XR_WRIST
BUNDLED_FILE = BUNDLED / "generalist.safetensors"

# ---------------------------------------------------------------------------- cards

shares = st.floats(0, 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
channels = st.floats(0.01, 1)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
words = st.text(max_size=30)
points = st.builds(
    OperatingPoint,
    st.just("balanced"),
    shares,
    st.none() | shares,
    st.none() | shares,
)
cards = st.builds(
    Card,
    area=st.sampled_from(Area),
    target=st.sampled_from(["abnormal", "fracture"]),
    sha256=digests,
    operating_points=st.tuples(points)
    | st.tuples(points, st.builds(OperatingPoint, st.just("high_sensitivity"), shares)),
    training_data=words,
    licence=words,
    origin=st.sampled_from(["bundled", "published", "imported", "trained"]),
    preprocessing=st.builds(
        Preprocessing,
        size=st.integers(32, 4096),
        crop=st.sampled_from(["none", "foreground"]),
        fit=st.sampled_from(["squash", "pad"]),
        mean=st.tuples(channels, channels, channels),
        std=st.tuples(channels, channels, channels),
    ),
    calibration=st.none() | st.builds(Calibration, st.floats(1e-6, 1e6), numbers, words),
    metrics=st.dictionaries(
        words, st.builds(Metric, numbers, st.none() | numbers, st.none() | numbers, words)
    ),
    source=words,
    source_sha256=st.just("") | digests,
    notes=words,
)


@given(cards)
def test_a_card_survives_its_json(card: Card) -> None:
    assert Card.from_json(card.to_json()) == card
    assert hash(Card.from_json(card.to_json())) == hash(card)


def a_card(digest: str = "ab" * 32, **changes: object) -> Card:
    card = Card(
        area=HAND,
        target="abnormal",
        sha256=digest,
        operating_points=(OperatingPoint("balanced", 0.4, 0.9, 0.8),),
        training_data="made up",
        licence="MIT",
        origin="trained",
        calibration=Calibration(1.5, -0.2, "made up"),
        metrics={"study_auc": Metric(0.9, 0.8, 1.0, "made up")},
    )
    return replace(card, **changes)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", 2, "format"),
        ("area", "XR_KNEE", "area"),
        ("area", 7, "area must be text"),
        ("target", "cancer", "target"),
        ("sha256", "AB" * 32, "sha256"),
        ("sha256", "", "sha256"),
        ("architecture", "resnet50", "architecture"),
        ("licence", None, "licence"),
        ("surprise", 1, "unknown surprise"),
        ("operating_points", [], "balanced"),
        ("operating_points", {}, "operating_points"),
        ("operating_points.0.threshold", float("nan"), "threshold"),
        ("operating_points.0.threshold", 1.5, "threshold"),
        ("operating_points.0.threshold", True, "threshold"),
        ("operating_points.0.threshold", 10**400, "threshold"),
        ("operating_points.0.name", "best", "name"),
        ("operating_points.0.sensitivity", "high", "sensitivity"),
        ("preprocessing.size", 224.5, "size"),
        ("preprocessing.size", 10**6, "size"),
        ("preprocessing.crop", "smart", "crop"),
        ("preprocessing.mean", [0.5, 0.5], "mean"),
        ("preprocessing.std", [0.5, 0.5, 0], "std"),
        ("preprocessing.gamma", 1, "gamma"),
        ("calibration.slope", -1, "slope"),
        ("calibration.intercept", float("inf"), "intercept"),
        ("metrics.study_auc", 0.9, "study_auc"),
        ("metrics.study_auc.on", 3, "on"),
    ],
)
def test_a_bad_card_is_refused_by_the_name_of_what_is_bad(
    path: str, value: object, said: str
) -> None:
    data = json.loads(a_card().to_json())
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    with pytest.raises(WeightsRefused, match=said):
        Card.from_json(json.dumps(data))


def test_every_member_of_a_card_is_needed() -> None:
    data = json.loads(a_card().to_json())
    for name in data:
        with pytest.raises(WeightsRefused, match=name):
            Card.from_json(json.dumps({k: v for k, v in data.items() if k != name}))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, "\x00", '{"format": 1e999}']
)
def test_what_is_no_card_at_all_is_refused(text: str) -> None:
    with pytest.raises(WeightsRefused):
        Card.from_json(text)


def test_an_operating_point_that_nobody_measured_is_a_setting_to_correct() -> None:
    assert a_card().threshold == 0.4
    with pytest.raises(Misconfigured, match="high_specificity"):
        a_card().point("high_specificity")


# ---------------------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def half_state() -> dict[str, Tensor]:
    return load_file(BUNDLED_FILE)


@pytest.fixture(scope="module")
def other_file(half_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled tensors in another file, which therefore has another digest."""
    file = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_file(half_state, file, metadata={"version": "other"})
    return file


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    store = WeightsStore(tmp_path / "weights")
    store.install_bundled()
    return store


def test_bundled_weights_serve_every_area_and_lie_there_once(store: WeightsStore) -> None:
    for area in Area:
        card = store.active(area)
        assert card is not None
        assert card == bundled_card(area)
        assert (card.area, card.origin) == (area, "bundled")
        assert card.sha256 == sha256_of(store.file(card))
    assert len(list((store.directory / "files").glob("*.safetensors"))) == 1
    assert store.verify() == []


def test_installing_bundled_weights_again_changes_nothing(store: WeightsStore) -> None:
    before = {p: p.stat().st_mtime_ns for p in store.directory.rglob("*.[js]*")}
    assert store.install_bundled() == []
    assert {p: p.stat().st_mtime_ns for p in store.directory.rglob("*.[js]*")} == before


def test_installing_bundled_weights_keeps_what_is_active_and_mends_its_own_file(
    tmp_path: Path, other_file: Path
) -> None:
    store = WeightsStore(tmp_path)
    own = store.add(other_file, replace(bundled_card(HAND), sha256=sha256_of(other_file)))
    store.activate(HAND, own.short)
    assert store.install_bundled() == [area for area in Area if area != HAND]
    assert store.active(HAND) == own
    file = store.file(bundled_card(WRIST))
    file.write_bytes(b"spoilt")
    store.install_bundled()
    assert store.verify() == []


def test_an_area_without_weights_names_the_command_that_fixes_it(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path / "none yet")
    assert store.active(HAND) is None
    assert store.cards() == []
    assert store.verify() == []
    with pytest.raises(NoWeights, match="mura-batch models fetch XR_HAND"):
        store.require(HAND)


def test_half_precision_is_stored_and_float32_is_loaded(
    store: WeightsStore, half_state: dict[str, Tensor]
) -> None:
    network = network_with(store.load(store.require(WRIST)))
    assert not network.training
    for name, tensor in half_state.items():
        loaded = network.state_dict()[name]
        if tensor.is_floating_point():
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, tensor.float())


def test_every_load_checks_the_digest(store: WeightsStore) -> None:
    card = store.require(HAND)
    with store.file(card).open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    with pytest.raises(WeightsRefused, match="changed since its sha256"):
        store.load(card)
    assert all("is damaged" in problem for problem in store.verify())
    assert len(store.verify()) == len(Area)
    store.file(card).unlink()
    with pytest.raises(WeightsRefused, match="mura-batch models fetch XR_HAND"):
        store.load(card)
    assert all("is missing" in problem for problem in store.verify())


def test_weights_are_activated_by_a_prefix_and_rolled_back(
    store: WeightsStore, other_file: Path
) -> None:
    first = store.require(HAND)
    card = store.add(other_file, replace(first, sha256=sha256_of(other_file), origin="trained"))
    assert store.active(HAND) == first
    assert store.activate(HAND, card.sha256[:8]) == card == store.active(HAND)
    assert store.active(WRIST) == bundled_card(WRIST)
    assert store.rollback(HAND) == first == store.active(HAND)
    with pytest.raises(Misconfigured, match="nothing to go back to"):
        store.rollback(HAND)
    with pytest.raises(Misconfigured, match=f"stored: .*{card.short}"):
        store.activate(HAND, "not a digest")
    with pytest.raises(Misconfigured, match="several"):
        store.find(HAND, "")


def test_the_same_tensors_with_another_threshold_are_refused(store: WeightsStore) -> None:
    card = store.require(HAND)
    assert store.add(BUNDLED_FILE, replace(card, notes="seen again")) == card
    other = replace(card, operating_points=(OperatingPoint("balanced", 0.123),))
    with pytest.raises(WeightsRefused, match="set `threshold` in config"):
        store.add(BUNDLED_FILE, other)


def test_a_file_that_is_not_what_its_card_says_is_not_stored(
    tmp_path: Path, half_state: dict[str, Tensor]
) -> None:
    store = WeightsStore(tmp_path / "weights")
    with pytest.raises(WeightsRefused, match="sha256"):
        store.add(BUNDLED_FILE, a_card())
    small = tmp_path / "small.safetensors"
    save_file({"classifier.bias": half_state["classifier.bias"]}, small)
    with pytest.raises(WeightsRefused, match=r"missing: classifier\.weight"):
        store.add(small, a_card(sha256_of(small)))
    small.write_bytes(b"\xff" * 100)
    with pytest.raises(WeightsRefused, match="not a safetensors file"):
        store.add(small, a_card(sha256_of(small)))
    assert not store.directory.exists()


def test_verify_names_unreadable_cards_and_what_is_active_but_broken(store: WeightsStore) -> None:
    card = store.require(HAND)
    place = store.directory / HAND / f"{card.short}.json"
    shutil.copy(place, store.directory / WRIST / "0123456789ab.json")
    place.write_text("{}")
    (store.directory / Area.XR_ELBOW / "active.json").write_text('{"digest": "../../x"}')
    problems = "\n".join(store.verify())
    assert f"{place}: card: format is missing" in problems
    assert "XR_HAND: what is active cannot be used" in problems
    assert "XR_ELBOW: what is active cannot be used" in problems
    assert "0123456789ab.json: is the card of XR_HAND" in problems
    assert store.cards(HAND) == []
    with pytest.raises(WeightsRefused):
        store.active(HAND)


def test_a_card_in_the_folder_of_another_area_is_never_used(
    store: WeightsStore, other_file: Path
) -> None:
    card = store.add(
        other_file, replace(bundled_card(WRIST), sha256=sha256_of(other_file), origin="trained")
    )
    place = store.directory / HAND / f"{card.short}.json"
    shutil.copy(store.directory / WRIST / place.name, place)
    assert store.cards(HAND) == [bundled_card(HAND)]
    with pytest.raises(Misconfigured, match="no weights have"):
        store.activate(HAND, card.sha256)
    assert store.active(WRIST) == bundled_card(WRIST)
    state = store.directory / HAND / "active.json"
    state.write_text(json.dumps({"digest": card.sha256, "history": [card.sha256]}))
    for use in (store.active, store.rollback):
        with pytest.raises(WeightsRefused, match="is the card of XR_WRIST"):
            use(HAND)
    assert "what is active cannot be used" in "\n".join(store.verify())


def test_a_card_of_other_tensors_is_never_used(store: WeightsStore) -> None:
    place = store.directory / HAND / f"{store.require(HAND).short}.json"
    place.write_text(a_card().to_json())
    with pytest.raises(WeightsRefused, match="is the card of XR_HAND abab"):
        store.active(HAND)
    with pytest.raises(Misconfigured, match="no weights have"):
        store.find(HAND, "abab")


def test_verify_names_a_file_that_cannot_be_read(store: WeightsStore) -> None:
    file = store.file(store.require(HAND))
    file.unlink()
    file.symlink_to("/proc/self/mem")  # a file whose first byte nobody can read
    problems = store.verify()
    assert len(problems) == len(Area)
    assert all("cannot be read (Input/output error)" in problem for problem in problems)


DIGESTS = [f"{n:02x}" * 32 for n in range(3)]


def _with_cards(directory: Path) -> WeightsStore:
    """A store with three cards of one area, which can be activated though no tensors are there."""
    for digest in DIGESTS:
        place = directory / HAND / f"{digest[:12]}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(a_card(digest).to_json())
    return WeightsStore(directory)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.none() | st.sampled_from(DIGESTS), max_size=8))
def test_rollback_undoes_activations_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str | None]
) -> None:
    """Against a plain list: a digest activates, None rolls back."""
    store = _with_cards(tmp_path_factory.mktemp("store"))
    expected: list[str] = []
    for digest in steps:
        if digest is not None:
            store.activate(HAND, digest)
            if expected[-1:] != [digest]:
                expected.append(digest)
        elif len(expected) > 1:
            assert store.rollback(HAND).sha256 == expected[-2]
            expected.pop()
        else:
            with pytest.raises(Misconfigured):
                store.rollback(HAND)
        active = store.active(HAND)
        assert (active.sha256 if active else None) == (expected[-1] if expected else None)


def test_changes_at_the_same_time_all_count(tmp_path: Path) -> None:
    """Two writers, each with the folder opened on its own; none of their changes is lost."""
    _with_cards(tmp_path)
    rounds = 15

    def work(digest: str) -> None:
        store = WeightsStore(tmp_path)
        for _ in range(rounds):
            store.activate(HAND, digest)
            store.activate(HAND, DIGESTS[2])

    workers = [threading.Thread(target=work, args=(digest,)) for digest in DIGESTS[:2]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    state = json.loads((tmp_path / HAND / "active.json").read_text())
    order = [*state["history"], state["digest"]]
    assert order.count(DIGESTS[0]) == order.count(DIGESTS[1]) == rounds
    assert all(a != b for a, b in pairwise(order))


def test_listing_weights_does_not_import_torch(store: WeightsStore) -> None:
    program = (
        "import sys; from pathlib import Path;"
        "from mura_batch.weights import WeightsStore;"
        "store = WeightsStore(Path(sys.argv[1]));"
        "assert len(store.cards()) == 7 and not store.verify();"
        "sys.exit(sorted({'torch', 'torchvision', 'safetensors'} & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", program, store.directory]
    repository = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------------------- tensors


def test_tensors_that_do_not_fit_are_refused_by_name(half_state: dict[str, Tensor]) -> None:
    def refused(**changes: Tensor | None) -> str:
        state = {**half_state, **{k.replace("__", "."): v for k, v in changes.items()}}
        with pytest.raises(WeightsRefused) as caught:
            read(save({n: t for n, t in state.items() if t is not None}), ARCHITECTURE)
        return str(caught.value)

    bias, variance = "classifier__bias", "features__norm0__running_var"
    assert "missing: classifier.bias" in refused(**{bias: None})
    assert "unexpected: classifier.2.bias" in refused(classifier__2__bias=torch.zeros(1))
    assert "classifier.weight (2, 1024) instead of (1, 1024)" in refused(
        classifier__weight=torch.zeros(2, 1024)
    )
    for value in (float("nan"), float("inf")):
        assert "NaN or infinite: classifier.bias" in refused(**{bias: torch.tensor([value])})
    for kind in (torch.int64, torch.bool, torch.float8_e4m3fn):
        told = refused(**{bias: torch.ones(1, dtype=kind)})
        assert "no floats of 16, 32 or 64 bits: classifier.bias" in told
    huge = torch.tensor([1e300], dtype=torch.float64)
    assert "NaN or infinite: classifier.bias" in refused(**{bias: huge})
    assert "not a safetensors file" in refused(**{bias: torch.ones([1] * 65)})
    assert "negative variances: features.norm0.running_var" in refused(
        **{variance: -torch.ones(64)}
    )


def test_of_many_wrong_names_the_first_are_named_and_the_rest_counted() -> None:
    with pytest.raises(
        WeightsRefused, match=r"classifier\.bias, classifier\.weight.* and 601 more"
    ):
        checked({}, ARCHITECTURE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tensors_of_an_architecture_are_those_of_its_network(architecture: str) -> None:
    state = network_of(architecture).state_dict()
    assert shapes(architecture) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_float_precision_are_read_as_torch_reads_them(kind: torch.dtype) -> None:
    torch.manual_seed(5)
    state = network_of(ARCHITECTURE).state_dict()
    state = {n: t.to(kind) for n, t in state.items() if t.is_floating_point()}
    found = read(save(state), ARCHITECTURE)
    assert found.tensors.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found.tensors[name].astype(np.float32), tensor.float())
    same = weights_of(state, ARCHITECTURE)
    assert found.nbytes == same.nbytes == sum(tensor.nbytes for tensor in same.tensors.values())
