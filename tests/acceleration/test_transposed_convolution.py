"""Gradients taken back through a convolution as a convolution to blocks of pixels: what autograd says, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from wideberth.acceleration.transposed_convolution import TransposedConvolution


def whole(*shape: int) -> torch.Tensor:
    """Small whole numbers, whose sums are exact."""
    return torch.randint(-3, 4, shape).float()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 40),
    side=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    pads=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    stride=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(4, 14), st.integers(4, 14)),
    plain=st.booleans(),
)
def test_says_what_autograd_says(
    channels: int, side: tuple[int, int], pads: tuple[int, int], stride: int, size: tuple[int, int], plain: bool
) -> None:
    assume(all(n + 2 * pad >= k for n, pad, k in zip(size, pads, side, strict=True)))
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 3, side, stride, pads)
    layer.weight = nn.Parameter(whole(*layer.weight.shape))
    x = whole(2, channels, *size).requires_grad_()
    output = layer(x)
    gradient = whole(*output.shape)
    (expected,) = torch.autograd.grad(output, x, gradient)
    with torch.no_grad():
        assert torch.equal(TransposedConvolution(layer, plain)(gradient, x), expected)


@pytest.mark.parametrize(
    ("channels", "stride", "size", "plain", "block"),
    [
        (1, 1, (28, 28), True, 4),
        (3, 1, (32, 32), True, 2),
        (1, 1, (9, 6), True, 3),
        (1, 1, (7, 7), True, 1),
        (17, 1, (8, 8), True, 1),
        (17, 1, (8, 8), False, None),
        (1, 2, (28, 28), False, 4),
        (16, 2, (32, 32), False, 2),
        (32, 2, (16, 16), False, None),
        (64, 2, (16, 16), False, None),
        (16, 2, (15, 16), False, None),
        (16, 3, (15, 15), False, None),
    ],
)
def test_blocks_are_used_where_they_pay(
    channels: int, stride: int, size: tuple[int, int], plain: bool, block: int | None
) -> None:
    layer = nn.Conv2d(channels, 4, 3, stride, 1)
    assert TransposedConvolution(layer, plain).block_side(torch.Size(size)) == block


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "circular"}])
def test_leaves_other_convolutions_to_torch(options: dict[str, object]) -> None:
    assert TransposedConvolution(nn.Conv2d(2, 4, 3, **options)).block_side(torch.Size((8, 8))) is None
