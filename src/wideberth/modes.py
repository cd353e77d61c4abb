"""Borrowing a model: exact snapshot and restore of train/eval flags and requires_grad.

The only place in the project that touches them. A module-by-module snapshot matters: `model.train()` on the root
thaws batch norms that the caller had frozen, which most attack libraries do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from torch import nn

Mode: TypeAlias = Literal["eval", "train", "keep"]
"""The mode a model is lent in: "keep" leaves every module as its owner set it."""


@contextmanager
def lent(model: nn.Module, mode: Mode = "eval", *, freeze: bool = True) -> Iterator[nn.Module]:
    """Lend a model in `mode`, with parameters that take no gradients, and give it back exactly as it was.

    Args:
        model: any module; flags of all its submodules are recorded on entry and restored on exit, also on error.
        mode: "eval", "train" or "keep".
        freeze: set `requires_grad` of every parameter to False meanwhile; `.grad` is never touched. With frozen
            parameters, an input gradient costs no weight gradients.
    """
    flags = [(module, module.training) for module in model.modules()]
    grads = [(p, p.requires_grad) for p in model.parameters()] if freeze else []
    try:
        if mode != "keep":
            for module, _ in flags:
                module.training = mode == "train"
        for p, _ in grads:
            p.requires_grad_(False)
        yield model
    finally:
        for module, flag in flags:
            module.training = flag
        for p, flag in grads:
            p.requires_grad_(flag)
