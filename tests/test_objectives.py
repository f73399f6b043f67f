"""What the evidence map is pulled towards in training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.objectives import outside, unsteady


def maps(seed: int, count: int = 3, side: int = 5) -> torch.Tensor:
    return torch.randn(count, side, side, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000))
def test_evidence_in_the_box_costs_less_than_outside(seed: int) -> None:
    evidence = maps(seed)
    boxes = torch.zeros(3, 5, 5)
    boxes[:2, 1:3, 2:4] = 1
    lost = outside(evidence, boxes)
    assert (lost[:2] > 0).all()
    assert lost[2] == pytest.approx(0, abs=1e-5)
    assert (outside(evidence + boxes, boxes)[:2] < lost[:2]).all()
    assert (outside(evidence + 1 - boxes, boxes)[:2] > lost[:2]).all()
    assert outside(evidence, torch.ones(3, 5, 5)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)


def test_a_box_without_any_evidence_is_pulled_up() -> None:
    evidence = torch.full((1, 3, 3), -1.0, requires_grad=True)
    boxes = torch.zeros(1, 3, 3)
    boxes[0, 1, 1] = 1
    outside(evidence, boxes).sum().backward()
    assert evidence.grad is not None
    assert evidence.grad[0, 1, 1] < 0
    assert evidence.grad[0, 0, 0] > 0


@given(st.integers(0, 10_000))
def test_maps_that_move_and_mirror_with_the_film_are_steady(seed: int) -> None:
    film = maps(seed, side=6)
    seen, moved = film[:, :-1, :-1], film[:, 1:, 1:].flip(-1)
    assert unsteady(seen, moved).tolist() == pytest.approx([0, 0, 0])
    assert (unsteady(seen, moved.flip(-1)) > 0).all()
