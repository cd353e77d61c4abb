"""A copy of a network that computes the same, faster: what a search asks, while the network itself is the judge."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

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
