"""The network's closed-form evidence map, against gradients and against other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM as HookedGradCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional
from torchcam.methods import GradCAM
from torchvision.models import densenet121

from mura_batch.area import Area
from mura_batch.network import Evidence, EvidenceNet, network_with, normalise
from mura_batch.network_input import prepare
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_luminance
from mura_batch.weights import load_bundled

SIDE = 96  # pixels: a 3 x 3 map, and quick
SAMPLES = Path(__file__).parent.parent / "mura_batch" / "samples"


@pytest.fixture(scope="module")
def network() -> EvidenceNet:
    """Trained weights, pooled by the mean as published."""
    pooled = EvidenceNet().eval()
    pooled.load_state_dict(network_with(load_bundled(Area.XR_HAND)[0]).state_dict())
    return pooled


@pytest.fixture(scope="module")
def films() -> Tensor:
    """Two real radiographs as the network sees them, (2, 3, S, S)."""
    files = [SAMPLES / "elbow_lateral.png", SAMPLES / "humerus_ap.jpg"]
    spec = Preprocessing(size=SIDE)
    pixels = np.stack([prepare(read_luminance(file), spec).pixels for file in files])
    return normalise(torch.from_numpy(pixels), spec.mean, spec.std)


@pytest.fixture(scope="module")
def ours(network: EvidenceNet, films: Tensor) -> Evidence:
    with torch.no_grad():
        return network(films)


def explicit(network: EvidenceNet, sign: int) -> nn.Sequential:
    """The same network as a chain whose ReLU after the features is a module that can be hooked.

    With sign -1 its logit is turned round, so that what speaks against the target shows too.
    """
    head = nn.Linear(network.classifier.in_features, 1)
    head.load_state_dict({n: sign * t for n, t in network.classifier.state_dict().items()})
    chain = (network.features, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*chain, head).eval()


def test_logit_is_that_of_torchvisions_densenet(
    network: EvidenceNet, films: Tensor, ours: Evidence
) -> None:
    reference = densenet121(weights=None, num_classes=1)
    reference.load_state_dict(network.state_dict())
    with torch.no_grad():
        theirs = reference.eval()(films)[:, 0]
    torch.testing.assert_close(ours.logit, theirs, atol=1e-5, rtol=1e-5)


def test_logit_is_the_sum_of_the_map_and_the_bias(network: EvidenceNet, ours: Evidence) -> None:
    assert ours.logit.shape == (2,)
    assert ours.map.shape == (2, 3, 3)
    assert ours.map.abs().max() > 1e-3
    total = ours.map.sum(dim=(1, 2)) + network.classifier.bias.detach()
    torch.testing.assert_close(ours.logit, total, atol=1e-5, rtol=1e-5)


def test_map_is_grad_cam_by_autograd(network: EvidenceNet, films: Tensor, ours: Evidence) -> None:
    with torch.no_grad():
        activations = functional.relu(network.features(films))
    activations.requires_grad_()
    logits = network.classifier(activations.mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(logits.sum(), activations)
    weighted = (gradient.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1)
    torch.testing.assert_close(ours.map, weighted.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_map_is_torchcams_grad_cam(
    network: EvidenceNet, films: Tensor, ours: Evidence, sign: int
) -> None:
    chain = explicit(network, sign)
    with GradCAM(chain, target_layer=chain[1]) as extractor:
        (theirs,) = extractor(0, chain(films), normalized=False)
    positive = functional.relu(sign * ours.map)
    torch.testing.assert_close(positive, theirs.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_map_is_pytorch_grad_cams(
    network: EvidenceNet, films: Tensor, ours: Evidence, sign: int
) -> None:
    """That program scales each map to 0-1 and resizes it; the same is done to ours."""
    chain = explicit(network, sign)
    with HookedGradCAM(model=chain, target_layers=[chain[1]]) as extractor:
        theirs = extractor(input_tensor=films, targets=[ClassifierOutputTarget(0)] * 2)
    positive = functional.relu(sign * ours.map).numpy()
    scaled = scale_cam_image(positive, target_size=(SIDE, SIDE))
    np.testing.assert_allclose(scale_cam_image(scaled), theirs, atol=2e-4)


class LogSumExp(nn.Module):
    """A head on every cell, and the logarithm of their mean odds."""

    def __init__(self, head: nn.Linear, sign: int) -> None:
        super().__init__()
        self.cells = nn.Conv2d(head.in_features, 1, 1)
        state = {"weight": head.weight[:, :, None, None], "bias": head.bias}
        self.cells.load_state_dict({name: sign * tensor for name, tensor in state.items()})

    def forward(self, activations: Tensor) -> Tensor:
        odds: Tensor = self.cells(activations).double().exp().mean(dim=(2, 3))
        return odds.log().float()


@pytest.mark.parametrize("sign", [1, -1])
def test_map_under_log_sum_exp_is_torchcams_grad_cam(
    network: EvidenceNet, films: Tensor, ours: Evidence, sign: int
) -> None:
    turned = {n: sign * t if "classifier" in n else t for n, t in network.state_dict().items()}
    pooling = EvidenceNet("log-sum-exp").eval()
    pooling.load_state_dict(turned)
    with torch.no_grad():
        found = pooling(films)
    head = LogSumExp(network.classifier, sign)
    chain = nn.Sequential(network.features, nn.ReLU(), head).eval()
    with GradCAM(chain, target_layer=chain[1]) as extractor:
        logits = chain(films)
        (theirs,) = extractor(0, logits, normalized=False)
    torch.testing.assert_close(found.logit, logits.detach()[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(functional.relu(found.map), theirs.detach(), atol=1e-6, rtol=1e-4)
    assert (found.logit - ours.logit * sign).abs().min() > 1e-3  # another pooling than the mean


def test_the_map_of_an_image_does_not_depend_on_its_batch(
    network: EvidenceNet, films: Tensor, ours: Evidence
) -> None:
    with torch.no_grad():
        alone = network(films[1:])
    torch.testing.assert_close(ours.map[1], alone.map[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours.map[0], ours.map[1], atol=1e-3)


def test_normalise_is_rgb_of_equal_channels_on_the_papers_scale() -> None:
    pixels = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    images = normalise(pixels, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    assert images.shape == (1, 3, 2, 2)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[0, 0], torch.tensor([[-1.0, 1.0], [-0.6, -0.2]]))
    torch.testing.assert_close(images[0, 1], torch.tensor([[-1.0, 3.0], [-0.2, 0.6]]))
    torch.testing.assert_close(images[0, 2], torch.tensor([[0.0, 1.0], [0.2, 0.4]]))
