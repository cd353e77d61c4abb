"""Lending a model: exact restoration of what its use may change.

The only place in the project that changes train/eval flags and `requires_grad`. They are recorded module by module:
`model.train()` on the root would unfreeze batch norms that the caller had frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from wideberth.randomness import own_generators

_T = TypeVar("_T")

Mode: TypeAlias = Literal["eval", "train", "keep"]
"""The mode a model is lent in; "keep" leaves the flag of every module as it is."""


@contextmanager
def lent(model: nn.Module, mode: Mode = "eval", *, freeze: bool = True) -> Iterator[nn.Module]:
    """Lend a model in `mode`, and restore the flags of its modules and parameters on exit, also on error.

    Args:
        model: any module.
        mode: "eval", "train" or "keep", for all submodules.
        freeze: set `requires_grad` of every parameter to False meanwhile, so that an input gradient costs no weight
            gradients; `.grad` is not changed.
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


@contextmanager
def untouched(model: nn.Module, device: torch.device, seed: int) -> Iterator[nn.Module]:
    """Lend a model in eval mode, and restore on exit all that a forward pass may change.

    These are the flags (see `lent`), the parameters and buffers, and the global random generators, which are seeded
    meanwhile (see `own_generators`). Costs a copy of all parameters and buffers.

    Args:
        model: any module.
        device: where its parameters are.
        seed: of the global random generators meanwhile.
    """
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    before = snapshot(model)
    try:
        with own_generators(seed, device), lent(model):
            yield model
    finally:
        # A forward pass may also replace a tensor by another, or add one.
        for module, parameters, buffers in held:
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
        for name in changed(model, before):
            with torch.no_grad():
                _tensors(model)[name].copy_(before[name])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name, including those that are in no `state_dict`."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def changed(model: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors of a `snapshot` whose values have changed since; NaN equals NaN."""
    now = {name: tensor for name, tensor in _tensors(model).items() if name in before}
    return [name for name, tensor in now.items() if not _equal(tensor.detach(), before[name])]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _put_back(now: dict[str, _T], before: dict[str, _T]) -> None:
    if len(now) != len(before) or any(now.get(name) is not value for name, value in before.items()):
        now.clear()
        now.update(before)
