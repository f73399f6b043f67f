"""DenseNet-121 with a Transformer encoder: its map, and its way through the product."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from safetensors.torch import save_file
from site_home import SAMPLES, make_home
from torch import Tensor, nn

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, WeightsRefused
from mura_batch.network import HybridNet
from mura_batch.runtime import load
from mura_batch.weights import WeightsStore, bundled_card, read_weights, sha256_of
from training.start import settings_for, state_of

HYBRID = "densenet121-transformer"


@pytest.fixture(scope="module")
def network() -> HybridNet:
    torch.manual_seed(3)
    return HybridNet().eval()


@pytest.fixture(scope="module")
def films() -> Tensor:
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))


class Chain(nn.Module):
    """The same network with a module after the features that can be hooked."""

    def __init__(self, network: HybridNet) -> None:
        super().__init__()
        self.network = network
        self.last = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        cells = self.last(self.network.features(images))
        logit: Tensor = self.network._decide(cells)
        return logit[:, None]


def test_map_is_pytorch_grad_cams(network: HybridNet, films: Tensor) -> None:
    with torch.inference_mode():
        found = network(films)
    chain = Chain(network)
    with GradCAM(model=chain, target_layers=[chain.last]) as extractor:
        theirs = extractor(films, [ClassifierOutputTarget(0)] * 2)
    assert found.map.shape == (2, 3, 2)
    assert not found.map.requires_grad
    positive = scale_cam_image(found.map.clamp_min(0).numpy(), (64, 96))
    np.testing.assert_allclose(scale_cam_image(positive), theirs, atol=2e-4)


def test_map_is_the_same_with_and_without_gradients(network: HybridNet, films: Tensor) -> None:
    seen = network(films)
    with torch.inference_mode():
        bare = network(films)
    torch.testing.assert_close(bare.map, seen.map)
    torch.testing.assert_close(bare.logit, seen.logit)
    (slope,) = torch.autograd.grad(seen.map.square().sum(), network.features.conv0.weight)
    assert slope.abs().sum() > 0


def test_a_hybrid_is_stored_served_and_shown(network: HybridNet, tmp_path: Path) -> None:
    file = tmp_path / "hybrid.safetensors"
    floats = {n: t for n, t in network.state_dict().items() if t.is_floating_point()}
    save_file(floats, file)
    card = replace(
        bundled_card(Area.XR_HAND), sha256=sha256_of(file), architecture=HYBRID, origin="trained"
    )
    home = make_home(tmp_path / "home", runtime="auto")
    store = WeightsStore(home.path / "weights")
    store.activate(Area.XR_HAND, store.add(file, card).sha256)
    shutil.copytree(SAMPLES / "XR_HAND", home.inbox / "XR_HAND")
    done = home.command("watch", "--once")
    assert done.returncode == 0, done.stderr
    rows = json.loads(home.command("query", "--images", "--json").stdout)
    assert rows
    for row in rows:
        assert row["weights"] == card.sha256 or card.sha256.startswith(row["weights"])
        assert (home.path / row["overlay"]).stat().st_size > 1000


def test_what_does_not_fit_a_hybrid_is_refused(network: HybridNet, tmp_path: Path) -> None:
    file = tmp_path / "hybrid.safetensors"
    save_file({n: t for n, t in network.state_dict().items() if t.is_floating_point()}, file)
    card = replace(bundled_card(Area.XR_HAND), sha256=sha256_of(file), architecture=HYBRID)
    with pytest.raises(Misconfigured, match="set `runtime` to auto or torch"):
        load(read_weights(file, card), card.preprocessing, runtime="openvino")
    with pytest.raises(WeightsRefused, match="not a DenseNet-121 with one logit"):
        read_weights(file, replace(card, architecture="densenet121"))
    file.with_suffix(".json").write_text(card.to_json())
    assert settings_for(str(file)).architecture == HYBRID
    state = state_of(str(file))
    assert state is not None
    assert torch.equal(state["project.weight"], network.project.weight)
