"""A convolution and the ReLU after it in one pass through memory, by oneDNN, in bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wideberth.acceleration.transposed_convolution import TransposedConvolution


def fuses_relu() -> bool:
    """Whether this CPU runs oneDNN's bfloat16 convolutions that end in a ReLU; elsewhere these operators raise."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    needed = ("_convolution_pointwise", "_reorder_convolution_weight", "_is_mkldnn_bf16_supported")
    known = all(hasattr(torch.ops.mkldnn, name) for name in needed)
    return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def absorb_relus(model: nn.Module, names: list[str]) -> set[str]:
    """Remove the ReLUs that directly follow some convolutions from a traced model.

    Args:
        model: changed in place; a module that is not a `GraphModule` is left as it is.
        names: of the layers that may take over the ReLU after them.

    Returns:
        The names of the convolutions that have to apply a ReLU from now on. A convolution that is called more than
        once, or whose output is used elsewhere too, is not among them.
    """
    absorbing: set[str] = set()
    if not isinstance(model, fx.GraphModule):
        return absorbing
    called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    for node in list(model.graph.nodes):
        name = str(node.target)
        if node.op != "call_module" or name not in names or len(node.users) != 1 or called.count(name) != 1:
            continue
        (follower,) = node.users
        if isinstance(model.get_submodule(name), nn.Conv2d) and _is_relu(model, follower):
            follower.replace_all_uses_with(node)
            model.graph.erase_node(follower)
            absorbing.add(name)
    model.recompile()
    return absorbing


def _is_relu(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) is nn.ReLU
    return (node.op == "call_function" and node.target in (F.relu, torch.relu)) or (
        node.op == "call_method" and node.target == "relu"
    )


class FusedConvolution:
    """A convolution with a ReLU, from bfloat16 inputs on a CPU, with a gradient to the input alone.

    Args:
        layer: in bfloat16, with weights that no longer change and padding by zeros, given as numbers.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer
        self._transpose = TransposedConvolution(layer)
        padding = [int(pad) for pad in layer.padding]
        self._settings = (padding, list(layer.stride), list(layer.dilation), layer.groups)
        self._packed: Tensor | None = None

    @staticmethod
    def applies(layer: nn.Module) -> bool:
        """Whether the layer is a convolution that can be computed in this way on this machine."""
        simple = isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
        return simple and fuses_relu()

    def __call__(self, x: Tensor) -> Tensor:
        """ReLU of the convolution of x (B, C, H, W), with graph where gradients are enabled."""
        if torch.is_grad_enabled():
            return convolution_relu(x, self.run, self._transpose)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The same without graph."""
        layer: Any = self.layer
        if self._packed is None:  # laid out for oneDNN once, and not in every call
            size = list(x.shape)
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *self._settings, size)
        settings: tuple[Any, ...] = (*self._settings, "relu", [], "")
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self._packed, layer.bias, *settings)
        return output


def convolution_relu(
    x: Tensor, run: Callable[[Tensor], Tensor], input_gradient: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The output of a convolution with a ReLU, with graph to x.

    Args:
        x: (B, C, H, W).
        run: from x to the output of the ReLU.
        input_gradient: from the gradient in the convolution's output, and x, to the gradient in x.
    """
    output: Tensor = _ConvolutionReLU.apply(x, run, input_gradient)
    return output


class _ConvolutionReLU(torch.autograd.Function):
    """A convolution and its ReLU, which is known to have been active wherever the output is positive."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], input_gradient: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        output = run(x)
        ctx.save_for_backward(x, output)
        ctx.input_gradient = input_gradient
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, output = ctx.saved_tensors
        # The gradient of a mean over pixels is a broadcast view; laid out as the output, it is masked several times as
        # fast.
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        before_relu = torch.ops.aten.threshold_backward(gradient, output, 0)
        return ctx.input_gradient(before_relu, x), None, None
