"""Surrogate gradients: the same outputs, with slopes where a function is flat or has a kink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_RELUS = {
    *(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    *(F.relu6, F.threshold),
}
_STEPS = {
    *(F.hardtanh, F.hardtanh_),
    *(torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, torch.clip, Tensor.clip, Tensor.clip_),
    *(torch.round, torch.round_, Tensor.round, Tensor.round_, torch.floor, torch.floor_, Tensor.floor, Tensor.floor_),
    *(torch.ceil, torch.ceil_, Tensor.ceil, Tensor.ceil_, torch.trunc, torch.trunc_, Tensor.trunc, Tensor.trunc_),
    *(torch.sign, Tensor.sign, Tensor.sign_, torch.heaviside, Tensor.heaviside),
}


class SurrogateGradients(nn.Module):
    """The same function with other gradients: those of smooth ReLUs, and of identities for rounding and clamping.

    Only the gradients differ (BPDA, Athalye et al. 2018), unless `noisy` moves the inputs, which makes them gradients
    of the function's mean over a neighbourhood. Comparisons and casts to integers have no surrogate.

    Args:
        model: any module that was not compiled or scripted.
        noisy: from x (B, ...) and the number of earlier calls to the points (B, ...) to evaluate; None for x itself.
    """

    def __init__(self, model: nn.Module, noisy: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.model, self.noisy, self.calls = model, noisy, 0

    def forward(self, x: Tensor) -> Tensor:
        """From x (B, ...) to the model's logits (B, K)."""
        if self.noisy is not None:
            x = x + (self.noisy(x.detach(), self.calls) - x.detach())
            self.calls += 1
        with _ReplacedGradients():
            logits: Tensor = self.model(x)
        return logits


class _ReplacedGradients(TorchFunctionMode):
    """Leaves the values of functions as they are, and replaces the gradients of those that are flat somewhere."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat = func in _STEPS or func in _RELUS
        if not (flat and args and isinstance(args[0], Tensor) and args[0].requires_grad):
            return func(*args, **(kwargs or {}))
        x = args[0]
        copy = x.detach().clone()
        slope = _smooth_slope(x.detach()) if func in _RELUS else torch.ones(())
        value = func(copy, *args[1:], **(kwargs or {}))
        output = x * slope + (value - (x * slope).detach())
        # A function that works in place still does: other code may hold the same tensor.
        return x.copy_(output) if value is copy else output


def _smooth_slope(x: Tensor) -> Tensor:
    """The slope of a smooth ReLU at x: in (0, 1), 1/2 at zero, on the scale of the entries of each row."""
    scale = x.abs().flatten(1).mean(1) if x.dim() > 1 else x.abs()
    return torch.sigmoid(4 * x / scale.view(-1, *[1] * (x.dim() - 1)).clamp_min(1e-12))
