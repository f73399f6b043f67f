"""DenseNet-121 with one logit, and its Grad-CAM out of the same forward pass; and a hybrid.

With ``A = ReLU(F)`` the last feature map of shape (N, 1024, h, w), ``w_k`` the classifier's
weights and ``b`` its bias, global average pooling makes

    logit = b + Σ_xy M_xy,   M_xy = Σ_k w_k A_kxy / (h·w)

and Grad-CAM (Selvaraju et al., ICCV 2017) at that layer is ``ReLU(M)``: its channel weights
``α_k = mean_xy ∂logit/∂A_kxy`` are ``w_k / (h·w)``. So one forward pass gives both, without
gradients, and the signed map ``M`` says in logit units what each place adds to the logit.

A mean drowns what is small in what is not: a fracture fills one or two of a film's hundred cells.
With log-sum-exp pooling (P. O. Pinheiro and R. Collobert, CVPR 2015; X. Wang et al.,
"ChestX-ray8", CVPR 2017) of the same evidence,

    logit = b + log(mean_xy exp(h·w · M_xy)),

the place with most evidence decides. ``∂logit/∂A_kxy`` is ``w_k`` times a softmax over places,
whose mean over them is ``1 / (h·w)``: so Grad-CAM is ``ReLU(M)`` here too, out of one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import densenet121

from mura_batch.tensors import ENCODER_LAYERS, POOLINGS, TOKEN_WIDTH, Pooling, Weights, checked

_HEADS = 4  # of the hybrid's encoder


class Evidence(NamedTuple):
    """What one forward pass of a network returns.

    Attributes:
        logit: float, shape (N,); the sigmoid of it is the probability of the target.
        map: float, shape (N, h, w); signed evidence, whose positive part is the Grad-CAM of the
            last feature map. Where :class:`EvidenceNet` pools by the mean, its sum over space is
            ``logit - bias``.
    """

    logit: Tensor
    map: Tensor


class EvidenceNet(nn.Module):
    """torchvision's DenseNet-121 (``features``, ``classifier``) with one logit.

    The state dict has torchvision's key names, so published checkpoints load as they are.

    Args:
        pooling: of the evidence into the logit: the published mean, or log-sum-exp.
    """

    def __init__(self, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.pooling = pooling
        trunk = densenet121(weights=None, num_classes=1)
        self.features = trunk.features
        self.classifier = trunk.classifier

    def forward(self, images: Tensor) -> Evidence:
        """Return logit and signed evidence map of ``images`` (N, 3, H, W), normalised floats."""
        return self.read(functional.relu(self.features(images)))

    def read(self, activations: Tensor) -> Evidence:
        """Return logit and signed evidence map of the last feature map (N, 1024, h, w)."""
        height, width = activations.shape[-2:]
        cells = height * width
        kernel = self.classifier.weight[:, :, None, None] / cells
        evidence = functional.conv2d(activations, kernel)[:, 0]
        if self.pooling == "mean":
            pooled = evidence.sum(dim=(1, 2))
        else:
            pooled = (evidence * cells).logsumexp(dim=(1, 2)) - math.log(cells)
        return Evidence(pooled + self.classifier.bias, evidence)


def normalise(
    images: Tensor, mean: tuple[float, ...] | Tensor, std: tuple[float, ...] | Tensor
) -> Tensor:
    """Return uint8 luminance (N, H, W) as normalised float32 RGB of shape (N, 3, H, W)."""
    scale = images.to(torch.float32)[:, None] / 255.0
    centre, spread = (
        torch.as_tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std)
    )
    return (scale - centre) / spread


class HybridNet(nn.Module):
    """DenseNet-121 with a Transformer encoder over the cells of its last feature map, one logit.

    Grad-CAM at that feature map by gradient through the encoder: with ``α_k`` the mean over space
    of ``∂logit/∂A_k``, the map is ``Σ_k α_k A_k``. The trunk is passed once, the encoder once
    forward and once back. ``features`` and ``classifier`` are named as in :class:`EvidenceNet`.
    """

    def __init__(self) -> None:
        super().__init__()
        trunk = densenet121(weights=None, num_classes=1)
        self.features = trunk.features
        self.project = nn.Linear(trunk.classifier.in_features, TOKEN_WIDTH)
        layer = nn.TransformerEncoderLayer(
            TOKEN_WIDTH,
            _HEADS,
            2 * TOKEN_WIDTH,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, ENCODER_LAYERS, enable_nested_tensor=False)
        self.classifier = nn.Linear(TOKEN_WIDTH, 1)

    def forward(self, images: Tensor) -> Evidence:
        """Return logit and signed map of ``images`` (N, 3, H, W); also in inference mode."""
        return self.read(functional.relu(self.features(images)))

    def read(self, activations: Tensor) -> Evidence:
        """Return logit and signed evidence map of the last feature map (N, 1024, h, w)."""
        differentiable = torch.is_grad_enabled()
        twice = sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext()
        with torch.inference_mode(mode=False), torch.enable_grad(), twice:
            cells = activations if differentiable else activations.clone().detach()
            if not cells.requires_grad:
                cells.requires_grad_()
            logit = self._decide(cells)
            (slope,) = torch.autograd.grad(logit.sum(), cells, create_graph=differentiable)
            evidence = (slope.mean(dim=(2, 3), keepdim=True) * cells).sum(dim=1)
        return (
            Evidence(logit, evidence)
            if differentiable
            else Evidence(logit.detach(), evidence.detach())
        )

    def _decide(self, activations: Tensor) -> Tensor:
        tokens = self.project(activations.flatten(2).transpose(1, 2))
        tokens = tokens + _positions(*activations.shape[-2:]).to(tokens)
        logit: Tensor = self.classifier(self.encoder(tokens).mean(dim=1))[:, 0]
        return logit


def _positions(height: int, width: int) -> Tensor:
    """Return sines and cosines of rows and columns, (h · w, width of a token).

    Source: A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, half of the width for
    each direction; so a map of any size has them.
    """
    quarter = TOKEN_WIDTH // 4
    rates = 10_000 ** (-torch.arange(quarter) / quarter)
    rows = torch.arange(height)[:, None, None] * rates
    columns = torch.arange(width)[None, :, None] * rates
    angles = (rows.expand(height, width, quarter), columns.expand(height, width, quarter))
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=-1).view(height * width, TOKEN_WIDTH)


Network = EvidenceNet | HybridNet


def network_of(architecture: str) -> Network:
    """Return a network with random weights by its name in a card (``ARCHITECTURES`` there)."""
    pooling = POOLINGS[architecture]
    return HybridNet() if pooling is None else EvidenceNet(pooling)


def network_with(weights: Weights) -> Network:
    """Return the float32 network with a copy of these weights, in evaluation mode, on the CPU."""
    with torch.device("meta"):
        network = network_of(weights.architecture)
    state = {name: torch.zeros((), dtype=torch.int64) for name in network.state_dict()}  # counters
    for name, values in weights.tensors.items():
        state[name] = torch.tensor(values, dtype=torch.float32)
    network.load_state_dict(state, assign=True)
    return network.eval()


def weights_of(state: Mapping[str, Tensor], architecture: str) -> Weights:
    """Return the weights that a state dict of any float precision holds.

    Raises:
        WeightsRefused: as for :func:`mura_batch.tensors.checked`.
    """
    floats = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    return checked({n: t.detach().cpu().numpy() for n, t in floats.items()}, architecture)
