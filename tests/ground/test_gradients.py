"""Input gradients: each row's own, and one message where there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wideberth import gradients, losses
from wideberth.attacks import FAB, PGD
from wideberth.checks import InputError
from wideberth.margins import measure

X, Y = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2].detach() * 1.0


@pytest.mark.parametrize(
    "take",
    [
        lambda model: gradients.input_gradient(model, X, lambda z: losses.cross_entropy(z, Y)),
        lambda model: gradients.class_gradients(model, X, lambda z: z),
        lambda model: measure(model, X, Y),
        lambda model: PGD(steps=1)(model, X, Y, eps=0.1),
        lambda model: FAB(steps=1)(model, X, Y, eps=0.1),
    ],
)
def test_there_is_one_message_where_there_is_no_gradient(take: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(InputError) as refused:
        take(Detached())
    assert str(refused.value) == (
        "the model's output carries no gradient to its input: attacks by gradients and effective margins need one"
    )


class Steep(nn.Module):
    """Logits (x0, 0) plus something whose gradient is NaN in row 0 and infinite in row 1."""

    def forward(self, x: Tensor) -> Tensor:
        extra = torch.zeros(len(x))
        extra[0] = (0 * x[0, 1]).sqrt()
        extra[1] = (x[1, 1] - x[1, 1].detach()).sqrt()
        return torch.stack([x[:, 0] + extra, torch.zeros(len(x))], 1)


def test_what_has_no_direction_is_zero_but_in_the_raw_gradient() -> None:
    def first(logits: Tensor) -> Tensor:
        return logits[:, 0]

    raw = gradients.raw_input_gradient(Steep(), X, first)[2]
    assert raw[0, 1].isnan()
    assert raw[1, 1].isinf()
    found = gradients.input_gradient(Steep(), X, first)[2]
    assert found[0, 1] == 0
    assert found[1, 1] > 1e30
    (each,) = gradients.class_gradients(Steep(), X, lambda z: z[:, :1]).each
    assert each[:2, 1].tolist() == [0, 0]
    for gradient in (raw, found, each):
        assert gradient[:, 0].tolist() == [1, 1, 1, 1]


def test_gradients_and_losses_are_means_over_draws_and_logits_the_last() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x[:, :2] * self.calls

    logits, value, gradient = gradients.input_gradient(Counting(), X, lambda z: z[:, 0], draws=3)
    torch.testing.assert_close(logits, 3 * X[:, :2])
    torch.testing.assert_close(value, 2 * X[:, 0])
    assert gradient.tolist() == [[2, 0, 0]] * 4


def test_a_gradient_can_be_differentiated_again_where_that_was_asked_for() -> None:
    point = X.clone().requires_grad_()
    output = point.pow(3).sum(1)
    plain = gradients.gradient_of(output, point, retain_graph=True)
    assert not plain.requires_grad
    again = gradients.gradient_of(gradients.gradient_of(output, point, create_graph=True).sum(1), point)
    torch.testing.assert_close(again, 6 * X)
