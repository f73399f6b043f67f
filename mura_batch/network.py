"""DenseNet-121 with one logit, and its Grad-CAM out of the same forward pass.

With ``A = ReLU(F)`` the last feature map of shape (N, 1024, h, w), ``w_k`` the classifier's
weights and ``b`` its bias, global average pooling makes

    logit = b + Σ_xy M_xy,   M_xy = Σ_k w_k A_kxy / (h·w)

and Grad-CAM (Selvaraju et al., ICCV 2017) at that layer is ``ReLU(M)``: its channel weights
``α_k = mean_xy ∂logit/∂A_kxy`` are ``w_k / (h·w)``. So one forward pass gives both, without
gradients, and the signed map ``M`` says in logit units what each place adds to the logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import densenet121


class Evidence(NamedTuple):
    """What one forward pass of :class:`EvidenceNet` returns.

    Attributes:
        logit: float, shape (N,); the sigmoid of it is the probability of the target.
        map: float, shape (N, h, w); signed evidence in logit units. Its sum over space is
            ``logit - bias``; its positive part is the Grad-CAM of the last feature map.
    """

    logit: Tensor
    map: Tensor


class EvidenceNet(nn.Module):
    """torchvision's DenseNet-121 (``features``, ``classifier``) with one logit.

    The state dict has torchvision's key names, so published checkpoints load as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        trunk = densenet121(weights=None, num_classes=1)
        self.features = trunk.features
        self.classifier = trunk.classifier

    def forward(self, images: Tensor) -> Evidence:
        """Return logit and signed evidence map of ``images`` (N, 3, H, W), normalised floats."""
        activations = functional.relu(self.features(images))
        height, width = activations.shape[-2:]
        kernel = self.classifier.weight[:, :, None, None] / (height * width)
        evidence = functional.conv2d(activations, kernel)[:, 0]
        return Evidence(evidence.sum(dim=(1, 2)) + self.classifier.bias, evidence)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return uint8 luminance (N, H, W) as normalised float32 RGB of shape (N, 3, H, W)."""
    scale = images.to(torch.float32)[:, None] / 255.0
    centre = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    spread = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    return (scale - centre) / spread
