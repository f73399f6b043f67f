"""Checkpoints from elsewhere: what is taken, converted, and refused."""

from __future__ import annotations

import pickle
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mura_batch import weights_import
from mura_batch.area import Area
from mura_batch.errors import WeightsRefused
from mura_batch.network import network_with
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights import (
    BUNDLED,
    WeightsStore,
    bundled_card,
    load_bundled,
    sha256_of,
)
from mura_batch.weights_import import (
    Facts,
    import_checkpoint,
    load_checkpoint,
    read_restricted,
    says_of_itself,
    tensors_of,
)

HAND, WRIST = Area.XR_HAND, Area.XR_WRIST
BUNDLED_FILE = BUNDLED / "generalist.safetensors"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return network_with(load_bundled(HAND)[0]).state_dict()


def old_names(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """As torchvision named tensors in its first years, saved from a DataParallel network."""
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in state.items():
        head, _, tail = name.rpartition("denselayer")
        for number in "12":
            tail = tail.replace(f"norm{number}.", f"norm.{number}.")
            tail = tail.replace(f"conv{number}.", f"conv.{number}.")
        if "num_batches_tracked" not in name:
            renamed[f"module.{head}{'denselayer' if head else ''}{tail}"] = tensor
    assert "module.features.denseblock1.denselayer1.norm.1.weight" in renamed
    return renamed


def test_a_published_checkpoint_is_imported_bit_for_bit(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    checkpoint = {
        "model_state": old_names(state),
        "area": "XR_HAND",
        "img_size": 320,
        "best_auc": np.float64(0.87),
        "epoch": 7,
    }
    file = tmp_path / "XR_HAND_FINAL_best.pt"
    torch.save(checkpoint, file)
    store = WeightsStore(tmp_path / "weights")
    card = import_checkpoint(file, Facts(area=HAND, threshold=0.3), store)
    assert store.cards() == [card]
    assert store.active(HAND) is None
    assert (card.origin, card.target, card.threshold) == ("imported", "abnormal", 0.3)
    assert card.preprocessing == Preprocessing(size=320)
    assert (card.source, card.source_sha256) == (file.name, sha256_of(file))
    loaded = network_with(store.load(card)).state_dict()
    assert loaded.keys() == state.keys()
    assert all(
        torch.equal(loaded[n], t) for n, t in state.items() if "num_batches_tracked" not in n
    )
    with pytest.raises(WeightsRefused, match="says XR_HAND, not XR_WRIST"):
        import_checkpoint(file, Facts(area=WRIST), store)
    file = file.rename(tmp_path / "best.pt")
    with pytest.raises(WeightsRefused, match=r"best\.pt says XR_HAND, not XR_WRIST"):
        import_checkpoint(file, Facts(area=WRIST), store)
    assert store.cards() == [card]


@pytest.mark.parametrize("wrapper", ["model_state", "model_state_dict", "state_dict", None])
def test_state_dicts_are_found_wrapped_or_bare(
    wrapper: str | None, state: dict[str, Tensor]
) -> None:
    given_state = old_names(state)
    found = tensors_of({wrapper: given_state, "epoch": 3} if wrapper else given_state)
    assert found.keys() == {n for n in state if "num_batches_tracked" not in n}


def test_what_holds_no_state_dict_is_refused() -> None:
    for nothing in (None, [1], {}, {"model_state": {}}, {"model_state": 3}):
        with pytest.raises(WeightsRefused, match="no state dict"):
            tensors_of(nothing)
    with pytest.raises(WeightsRefused, match="'epoch', which is no tensor"):
        tensors_of({"weights": torch.zeros(1), "epoch": 3})
    with pytest.raises(WeightsRefused, match=r"classifier\.bias twice"):
        tensors_of({"classifier.bias": torch.zeros(1), "module.classifier.bias": torch.zeros(1)})


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ({"area": "XR_WRIST"}, {"area": "XR_WRIST"}),
        ({"config": {"body_part": "wrist", "img_size": 320}}, {"area": "wrist", "img_size": 320}),
        ({"area": 3, "img_size": "large"}, {}),
        (torch.zeros(1), {}),
    ],
)
def test_what_a_checkpoint_says_of_itself(checkpoint: object, said: dict[str, object]) -> None:
    assert says_of_itself(checkpoint) == said


@pytest.mark.parametrize(
    ("named", "refused"),
    [
        ("XR_HAND", False),
        ("hand", False),
        ("", False),
        ("v2, all areas", False),
        ("xr_wrist_final_best.pt", True),
        ("Wrist", True),
        ("XR_KNEE", True),
    ],
)
def test_a_checkpoint_for_another_area_is_refused_when_it_says_so(
    named: str, *, refused: bool
) -> None:
    areas = weights_import._areas_in(named)
    if refused:
        with pytest.raises(WeightsRefused, match="not XR_HAND"):
            weights_import._same_area(areas, HAND, "it")
    else:
        weights_import._same_area(areas, HAND, "it")


class Hostile:
    """Unpickled by an ordinary reader, this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, state: dict[str, Tensor]) -> None:
    marker, file = tmp_path / "it ran", tmp_path / "hostile.pt"
    torch.save({"model_state": state, "extra": Hostile(marker)}, file)
    store = WeightsStore(tmp_path / "weights")
    with pytest.raises(WeightsRefused, match="more than tensors"):
        import_checkpoint(file, Facts(area=HAND), store)
    file.write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    with pytest.raises(WeightsRefused, match="more than tensors"):
        read_restricted(file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())  # noqa: S301 - shows that the file is the trap it should be
    assert marker.exists()


def test_a_small_file_with_tensors_of_terabytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.pt"
    torch.save({"classifier.bias": torch.zeros(1).expand(1 << 40)}, file)
    assert file.stat().st_size < 10_000
    with pytest.raises(WeightsRefused, match=r"bomb\.pt.*(damaged|not what it seems)"):
        import_checkpoint(file, Facts(area=HAND), WeightsStore(tmp_path / "weights"))


def test_a_checkpoint_that_takes_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_import, "_MAX_SECONDS", 0.01)
    file = tmp_path / "slow.pt"
    torch.save({"classifier.bias": torch.zeros(1)}, file)
    with pytest.raises(WeightsRefused, match="could not be read within"):
        import_checkpoint(file, Facts(area=HAND), WeightsStore(tmp_path / "weights"))


def test_a_whole_pickled_network_is_refused_with_advice(tmp_path: Path) -> None:
    file = tmp_path / "network.pt"
    torch.save(torch.nn.Linear(2, 1), file)
    with pytest.raises(WeightsRefused, match=r"torch\.nn.*Linear.*save its state_dict"):
        read_restricted(file)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"classifier.bias": torch.zeros(1000)}, whole)
    file = tmp_path / "file.pt"
    file.write_bytes(whole.read_bytes()[:-900])
    with pytest.raises(WeightsRefused, match="damaged or cut off"):
        read_restricted(file)
    store = WeightsStore(tmp_path / "weights")
    for content in (b"<!DOCTYPE html><title>Sign in</title>", b"", b"\x89PNG\r\n\x1a\n"):
        file.write_bytes(content)
        with pytest.raises(WeightsRefused, match="not a torch checkpoint"):
            import_checkpoint(file, Facts(area=HAND), store)
    with pytest.raises(WeightsRefused, match="cannot be read"):
        import_checkpoint(tmp_path / "absent.pt", Facts(area=HAND), store)


def test_a_safetensors_file_is_loaded_with_the_card_beside_it(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path / "weights")
    store.install_bundled()
    card = bundled_card(HAND)
    file = tmp_path / "mine.safetensors"
    shutil.copy(BUNDLED_FILE, file)
    with pytest.raises(WeightsRefused, match=r"has no card.*mine\.json"):
        load_checkpoint(file, HAND)
    file.with_suffix(".json").write_text(card.to_json())
    with pytest.raises(WeightsRefused, match="is for XR_HAND, not for XR_WRIST"):
        load_checkpoint(file, WRIST)
    for place in (file, BUNDLED_FILE, store.file(card)):
        weights, found = load_checkpoint(place, HAND)
        assert found == card
        bias = load_file(BUNDLED_FILE)["classifier.bias"].numpy()
        np.testing.assert_array_equal(weights.tensors["classifier.bias"], bias)


def test_a_safetensors_file_is_stored_with_its_card(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path / "weights")
    file = tmp_path / "mine.safetensors"
    save_file(load_file(BUNDLED_FILE), file, metadata={"version": "another digest"})
    with pytest.raises(WeightsRefused, match=r"has no card.*mine\.json"):
        import_checkpoint(file, Facts(area=HAND), store)
    card = replace(bundled_card(HAND), sha256=sha256_of(file), origin="trained")
    file.with_suffix(".json").write_text(card.to_json())
    with pytest.raises(WeightsRefused, match="no more than the area"):
        import_checkpoint(file, Facts(area=HAND, threshold=0.3), store)
    assert import_checkpoint(file, Facts(area=HAND), store) == card
    assert store.cards() == [card]
    assert store.verify() == []
