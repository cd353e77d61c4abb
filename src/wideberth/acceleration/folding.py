"""Batch norm folded into the convolution before it, and channels last in memory.

About half the time of a small convolutional network goes into batch norm and into reordering channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from wideberth.acceleration.self_check import checked_copy

_MARK = "wideberth.folded"
"""Key in a traced copy's `meta`: a copy is not folded again."""
_TOLERANCE = 1e-3
"""Largest difference in units of the largest logit: float32 and TF32 stay within it."""


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A traced copy with batch norms folded into convolutions, channels last, or the model itself.

    The copy follows the path that the model's Python code takes for `x`; it is used only where its logits agree.

    Args:
        model: any module; left as it is.
        x: (B, ...) inputs to compare on.

    Returns:
        The model itself where it is such a copy, where it has no convolution, where it cannot be traced (control flow
        that depends on the input, autograd inside), or where its logits differ from the copy's (random layers).
    """
    if isinstance(model, fx.GraphModule) and _MARK in model.meta:
        return model
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model
    copy = checked_copy(_fold, model, x, _TOLERANCE)
    return model if copy is None else copy


def _fold(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse  # imported where it is needed: importing takes half a second

    copy = fuse(model).to(memory_format=torch.channels_last)
    assert isinstance(copy, fx.GraphModule)
    copy.meta[_MARK] = True
    return copy
