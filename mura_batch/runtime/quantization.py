"""What int8 needs to know of a network: how large the inputs of its convolutions become."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mura_batch.network import EvidenceNet, normalise
from mura_batch.preprocessing import Preprocessing


@torch.inference_mode()
def activation_ranges(
    network: EvidenceNet, spec: Preprocessing, batches: Iterable[NDArray[np.uint8]]
) -> dict[str, float]:
    """Return the largest input of each convolution that may run in int8, by its name.

    The first convolution and the classifier stay f32: they are a twentieth of the work, and an
    error of theirs reaches every cell or the logit itself (measured on the bundled weights: the
    first one's rounded weights alone cost twice what all others' do).

    Args:
        network: on the CPU.
        spec: the preprocessing from the weights' card.
        batches: luminance of shape (N, S, S) of films like those that will be scored.
    """
    highest: dict[str, float] = {}

    def look(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        highest[name] = max(highest.get(name, 0.0), float(inputs[0].max()))

    inner = [
        (name, layer)
        for name, layer in network.features.named_modules()
        if isinstance(layer, nn.Conv2d) and name != "conv0"
    ]
    looking = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in inner]
    try:
        for films in batches:
            network(normalise(torch.from_numpy(films), spec.mean, spec.std))
    finally:
        for hook in looking:
            hook.remove()
    return {name: most for name, most in highest.items() if most > 0}
