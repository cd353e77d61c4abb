"""Layers in bfloat16, with an input and logits that keep their precision.

A step of bfloat16 at 0.5 is an eighth of 8/255, and logits in bfloat16 have three digits: rounding the input and the
output would hide the small changes that an attack looks for. So the first layer takes the input in two parts, and the
last layer stays in float32.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wideberth.acceleration.fused_relu import FusedConvolution, absorb_relus, convolution_relu
from wideberth.acceleration.self_check import checked_copy
from wideberth.acceleration.transposed_convolution import TransposedConvolution

_TOLERANCE = 0.03
"""Largest difference in units of the largest logit: sound copies differ by up to 0.7 %."""


def in_bfloat16(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose convolutions and linear layers compute in bfloat16, all but the last.

    Args:
        model: any module, a folded copy as a rule; left as it is.
        x: (B, ...) inputs to compare on.

    Returns:
        The model itself where `x` is not float32, where the device has no bfloat16 arithmetic (emulation is slower than
        float32), and where the model is a single layer. The model under autocast where the copy cannot run, or where
        its logits differ (hooks, layers of the user's own kind, layers that do not take bfloat16).
    """
    if x.dtype != torch.float32 or not _has_bfloat16(x.device):
        return model
    if isinstance(model, nn.Conv2d | nn.Linear):  # it is the last layer, which stays as it is
        return model
    copy = checked_copy(_narrow, model, x, _TOLERANCE)
    return _Autocast(model) if copy is None else copy


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device has arithmetic for bfloat16, and does not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch before 2.10
    return device.type == "cpu" and any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))


def _narrow(model: nn.Module) -> nn.Module:
    """A copy with every convolution and linear layer replaced."""
    copy = deepcopy(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    absorbing = absorb_relus(copy, names[:-1])
    for name in names:
        layer, (parent, _, leaf) = copy.get_submodule(name), name.rpartition(".")
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        kind = FirstLayer if name == names[0] else Bfloat16Layer
        setattr(
            copy.get_submodule(parent),
            leaf,
            LastLayer(layer) if name == names[-1] else kind(layer, relu=name in absorbing),
        )
    return copy


class Bfloat16Layer(nn.Module):
    """A layer in bfloat16.

    Args:
        layer: converted in place.
        relu: whether to apply a ReLU to its output.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, relu: bool = False) -> None:
        super().__init__()
        self.layer, self.relu = layer.to(torch.bfloat16), relu
        self.fused: FusedConvolution | None = None
        if relu and isinstance(layer, nn.Conv2d) and FusedConvolution.applies(layer):
            self.fused = FusedConvolution(layer)

    def forward(self, x: Tensor) -> Tensor:
        """From x in any precision to outputs in bfloat16."""
        return self._compute(x.to(torch.bfloat16))

    def _compute(self, x: Tensor) -> Tensor:
        if self.fused is not None and x.device.type == "cpu":
            return self.fused(x)
        output: Tensor = self.layer(x)
        return F.relu(output) if self.relu else output


class FirstLayer(Bfloat16Layer):
    """The first layer in bfloat16, on twice as many channels: the rounded input, and what rounding took away.

    Args:
        layer: changed in place.
        relu: whether to apply a ReLU to its output.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, relu: bool = False) -> None:
        # The gradient is the same for both halves of the channels, so one half's convolution is enough.
        half = deepcopy(layer).to(torch.bfloat16)
        twice = torch.cat([layer.weight, layer.weight], 1)
        if isinstance(layer, nn.Conv2d):
            twice = twice.contiguous(memory_format=torch.channels_last)
        layer.weight = nn.Parameter(twice, requires_grad=False)
        super().__init__(layer, relu)
        self.axis = 1 if isinstance(layer, nn.Conv2d) else -1
        self.transpose: TransposedConvolution | None = None
        if isinstance(half, nn.Conv2d):
            self.transpose = TransposedConvolution(half, single_pixels=True)

    def forward(self, x: Tensor) -> Tensor:
        """From x in float32 to outputs in bfloat16."""
        direct = self.transpose is not None and self.transpose.supported
        if self.fused is not None and direct and x.device.type == "cpu" and torch.is_grad_enabled():
            return convolution_relu(x, self._run_fused, self._input_gradient)
        return self._compute(self._parts(x))

    def _run_fused(self, x: Tensor) -> Tensor:
        assert self.fused is not None
        return self.fused.run(self._parts(x))

    def _input_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        assert self.transpose is not None
        return self.transpose(gradient, x).to(x.dtype, memory_format=torch.contiguous_format)

    def _parts(self, x: Tensor) -> Tensor:
        """The rounded input and the rest, side by side along the channels."""
        rounded = x.to(torch.bfloat16)
        return torch.cat([rounded, (x - rounded).detach().to(torch.bfloat16)], self.axis)


class LastLayer(nn.Module):
    """The last layer in its own precision.

    Args:
        layer: left as it is.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.dtype = layer, next(layer.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        """From x in any precision to logits in the layer's."""
        logits: Tensor = self.layer(x.to(self.dtype))
        return logits


class _Autocast(nn.Module):
    """A model under autocast to bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits
