"""Second derivatives without the zeros: piecewise-linear activations as multiplications by constants.

The second derivative of a ReLU is zero, but autograd does not know: it stores zeros and pushes them back through the
whole forward graph, which costs as much as another full backward. Writing relu(x) as x * (x > 0), with the mask a
constant, gives the same values and the same first and second derivatives, and no path for the zeros to take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def _times(x: Tensor, slope: Tensor, inplace: bool) -> Tensor:
    return x.mul_(slope) if inplace else x * slope  # in place: the caller may go on with the tensor it gave


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _times(input, input.detach() > 0, inplace)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    # A slope of x's dtype: one of float32 would round it, and turn bfloat16 into float32.
    slope = torch.ones_like(input).masked_fill_(input.detach() <= 0, negative_slope)
    return _times(input, slope, inplace)


def _max_pool2d(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("return_indices", None)
    _, where = F.max_pool2d_with_indices(input.detach(), *args, **kwargs)
    return input.flatten(-2).gather(-1, where.flatten(-2)).view_as(where)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps) if weight is None else weight * torch.rsqrt(running_var + eps)
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    channel = [1, -1, *[1] * (input.dim() - 2)]
    return input * scale.view(channel) + shift.view(channel)


_CONSTANT: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.max_pool2d: _max_pool2d,
    F.batch_norm: _batch_norm,
}


class _ConstantRegions(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        run: Callable[..., Any] = _CONSTANT.get(func, func)
        return run(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run forwards whose gradients will be differentiated again; smooth activations are left as they are.

    Attention runs by its plain formula: torch's fused kernels have no second derivative.
    """
    with _ConstantRegions(), sdpa_kernel(SDPBackend.MATH):
        yield
