"""What a search asks in a network's place: a copy that computes the same, faster. The network itself is the judge."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from wideberth.modes import borrowed

_SAME = 1e-3
"""How far the copy's logits may be off, in units of the largest logit: float32 and TF32 stay within it."""


def fused(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode with batch norm folded into its convolutions, channels last; or the model itself.

    About half the time of a small convolutional network goes into batch norm and into reordering channels. A copy
    follows the path that the model's Python code takes, so it is used only where it says the same about `x`.

    Args:
        model: any module; left as it is.
        x: (B, ...) inputs to compare on.

    Returns:
        The copy, its parameters without gradients. The model itself where it has no convolution, cannot be traced
        (control flow that depends on the input, autograd inside), or answers differently from its copy (randomness).
    """
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model
    from torch.fx.experimental.optimization import fuse  # not loaded before it is needed: it takes half a second

    with borrowed(model), torch.no_grad():
        try:
            copy = fuse(model).to(memory_format=torch.channels_last)
            logits, again = model(x), copy(x)
        except Exception:  # tracing runs the model's own code on stand-ins for tensors: anything may be raised
            return model
        same = again.shape == logits.shape and bool(
            ((again - logits).abs() <= _SAME * logits.abs().amax().clamp_min(1e-30)).all()
        )
    return copy.eval().requires_grad_(False) if same else model


def narrowed(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose layers compute in bfloat16, but for the last, and the first takes the input in two parts.

    A step of bfloat16 at 0.5 is an eighth of 8/255, and logits in bfloat16 have three digits: rounding the input and
    the output would hide what a search looks for. Where such a copy cannot run (layers that do not take bfloat16
    beside float32), autocast does what it can. A model that is not in float32, and any on a machine that has no
    arithmetic of its own for bfloat16, where all this would be slower, is returned as it is.

    Args:
        model: as `fused` returns it; left as it is.
        x: (B, ...) inputs to try it on, float32.
    """
    if x.dtype != torch.float32 or not _has_bfloat16(x.device):
        return model
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with borrowed(model), torch.no_grad():
        try:
            copy = deepcopy(model)
            for name in layers:
                kind = _Last if name == layers[-1] else _First if name == layers[0] else _Narrow
                parent, _, leaf = name.rpartition(".")
                setattr(copy.get_submodule(parent), leaf, kind(copy.get_submodule(name)))
            copy(x)
        except Exception:  # whatever a network makes of other numbers than its own
            return _Autocast(model)
    return copy.eval().requires_grad_(False)


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself, and does not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.10 does not tell
    return device.type == "cpu" and any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))


class _Narrow(nn.Module):
    """A layer in bfloat16."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.to(torch.bfloat16))
        return found


class _First(_Narrow):
    """The first layer in bfloat16, on twice as many channels: the input rounded, and what rounding took from it."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        twice = torch.cat([layer.weight, layer.weight], 1)
        if isinstance(layer, nn.Conv2d):
            twice = twice.contiguous(memory_format=torch.channels_last)
        layer.weight = nn.Parameter(twice, requires_grad=False)
        super().__init__(layer)
        self.axis = 1 if isinstance(layer, nn.Conv2d) else -1

    def forward(self, x: Tensor) -> Tensor:
        rounded = x.to(torch.bfloat16)
        # One of the two passes the gradient on: it is the same for both.
        found: Tensor = self.layer(torch.cat([rounded, (x - rounded).detach().to(torch.bfloat16)], self.axis))
        return found


class _Last(nn.Module):
    """The last layer as it is, on what the others hand on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.dtype = layer, next(layer.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.to(self.dtype))
        return logits


class _Autocast(nn.Module):
    """The model under autocast to bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits
