"""How fast each part of a network learns, and when."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from training.settings import FitSettings, Phase

_BLOCKS = (  # of the trunk, from the top; what is below learns more slowly
    ("norm5", "denseblock4"),
    ("transition3", "denseblock3"),
    ("transition2", "denseblock2"),
    ("transition1", "denseblock1"),
    ("conv0", "norm0"),
)


def parameter_groups(
    network: nn.Module, settings: FitSettings, phase: Phase
) -> list[dict[str, Any]]:
    """Return an optimiser's groups: a rate a block; biases and norms do not decay."""
    head = [module for name, module in network.named_children() if name != "features"]
    trunk = [[network.get_submodule(f"features.{n}") for n in names] for names in _BLOCKS]
    groups = []
    blocks = [head] if phase == "head" else [head, *trunk]
    top = settings.head_rate if phase == "head" else settings.rate
    for depth, modules in enumerate(blocks):
        members = [p for module in modules for p in module.parameters()]
        rate = top * settings.block_decay**depth
        for decays in (True, False):
            some = [p for p in members if (p.ndim > 1) is decays]
            decay = settings.weight_decay if decays else 0.0
            groups.append({"params": some, "lr": rate, "weight_decay": decay})
    return groups


def warm_cosines(stages: Sequence[int]) -> Callable[[int], float]:
    """Return the learning rate's factor per step, over stages of so many steps.

    Each stage begins with a short rise, then falls by half a cosine to 0: what changes with it
    (crops to whole films) is learned at a rate of its own. After I. Loshchilov and F. Hutter,
    "SGDR", ICLR 2017.
    """
    ends = list(accumulate(stages))

    def factor(step: int) -> float:
        stage = min(bisect_right(ends, step), len(ends) - 1)
        steps = stages[stage]
        done = step - (ends[stage] - steps)
        warm = max(1, steps // 20)
        if done < warm:
            return (done + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm) / max(1, steps - warm))))

    return factor
