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

from wideberth.acceleration.transposed_convolution import Settings, convolution_gradients


class _Gate(torch.autograd.Function):
    """A gradient on its way back through a (leaky) ReLU whose output was `output`: linear, so its own derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, output: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(output)
        ctx.slope = slope
        if slope == 0:  # the kernel of the plain ReLU is the faster one
            passed: Tensor = torch.ops.aten.threshold_backward(gradient, output, 0)
        else:
            passed = torch.ops.aten.leaky_relu_backward(gradient, output, slope, True)
        return passed

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
        return _Gate.apply(second, *ctx.saved_tensors, ctx.slope), None, None


class _LeakyReLU(torch.autograd.Function):
    """A (leaky) ReLU whose gradient is `_Gate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        output = F.relu(x) if slope == 0 else F.leaky_relu(x, slope)
        ctx.save_for_backward(output)
        ctx.slope = slope
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return _Gate.apply(gradient, output.detach(), ctx.slope), None


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if negative_slope < 0:  # the sign of the output no longer tells that of the input
        return F.leaky_relu(input, negative_slope, inplace)
    output: Tensor = _LeakyReLU.apply(input, negative_slope)
    return input.copy_(output) if inplace else output  # in place: the caller may go on with the tensor it gave


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _leaky_relu(input, 0.0, inplace)


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
    return torch.addcmul(shift.view(channel), input, scale.view(channel))


class _InputGradient(torch.autograd.Function):
    """The gradient of a convolution in its input: bilinear in the output's gradient and the weight.

    Its own derivatives are a convolution and a weight gradient, for which there are fast kernels; autograd's double
    backward instead convolves with batch and channels exchanged, at several times the cost.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, x: Tensor, settings: Settings) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.settings = settings
        found: Tensor = convolution_gradients(gradient, x, weight, settings, (True, False, False))[0]
        return found

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        to_gradient = F.conv2d(second, weight, None, stride, padding, dilation, groups)
        to_weight = convolution_gradients(gradient, second, weight, ctx.settings, (False, True, False))[1]
        return to_gradient, to_weight, None, None


class _Convolution(torch.autograd.Function):
    """conv2d, whose input gradient is `_InputGradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.biased = settings, bias is not None
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = _InputGradient.apply(gradient, weight, x.detach(), ctx.settings) if ctx.needs_input_grad[0] else None
        to_weight = to_bias = None
        if ctx.needs_input_grad[1] and _asked_for(ctx.next_functions[1][0]):
            to_weight = convolution_gradients(gradient, x, weight, ctx.settings, (False, True, False))[1]
        if ctx.biased and ctx.needs_input_grad[2] and _asked_for(ctx.next_functions[2][0]):
            to_bias = gradient.sum((0, 2, 3))
        return to_x, to_weight, to_bias, None


def _asked_for(node: Any) -> bool:
    """Whether the backward under way goes on to `node`: `autograd.grad` for an input needs no weight gradients.

    Built-in functions are told; a custom one must ask, by a private name. Without it the answer is yes, only slower.
    """
    ask = getattr(torch._C, "_will_engine_execute_node", None)
    try:
        return ask is None or bool(ask(node))
    except RuntimeError:  # torch's way of saying that the node is one that `autograd.grad` was asked for
        return True


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    pair = [[value, value] if isinstance(value, int) else list(value) for value in (stride, padding, dilation)]
    made: Tensor = _Convolution.apply(input, weight, bias, (*pair, groups))
    return made


_CONSTANT: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.max_pool2d: _max_pool2d,
    F.batch_norm: _batch_norm,
    F.conv2d: _conv2d,
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
