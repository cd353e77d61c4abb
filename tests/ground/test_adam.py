"""Adam for points: torch's own optimizer, row by row."""

from __future__ import annotations

import pytest
import torch

from wideberth.adam import adam_step


@pytest.mark.parametrize("by_row", [False, True])
def test_steps_are_those_of_torch(by_row: bool) -> None:
    point = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = torch.optim.Adam([point], lr=0.5, eps=1e-8)
    ours, mean, square = torch.zeros_like(point), torch.zeros_like(point), torch.zeros_like(point)
    for step in range(1, 8):
        gradient = torch.randn(3, 2, dtype=torch.float64)
        point.grad = gradient
        optimizer.step()
        move, mean, square = adam_step(gradient, mean, square, torch.full((3,), step) if by_row else step)
        ours = ours - 0.5 * move
        torch.testing.assert_close(ours.detach(), point.detach(), rtol=1e-12, atol=1e-12)


def test_rows_may_be_at_different_steps() -> None:
    gradient, state = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [0.5]])
    move, _, _ = adam_step(gradient, state, state, torch.tensor([1, 4]))
    alone = adam_step(gradient[1:], state[1:], state[1:], 4)[0]
    torch.testing.assert_close(move, torch.cat([torch.ones(1, 1), alone]))
