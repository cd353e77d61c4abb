"""A lent model is restored exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wideberth.modes import changed, lent, snapshot, untouched

Flags = tuple[list[bool], list[bool]]


def flags(model: nn.Module) -> Flags:
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.fixture
def model() -> nn.Module:
    """In train mode, except for a frozen batch norm, and a submodule in eval mode that has one in train mode."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), inner, nn.Linear(4, 2))
    model[1].eval()
    model[1].requires_grad_(False)
    inner.training = False
    model[0].weight.grad = torch.ones(4, 3)
    return model


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_lent_sets_the_mode_and_restores_every_flag(model: nn.Module, mode: Any, freeze: bool) -> None:
    before = flags(model)
    with lent(model, mode, freeze=freeze) as the_model:
        assert the_model is model
        training, gradients = flags(model)
        assert training == {"eval": [False] * 7, "train": [True] * 7, "keep": before[0]}[mode]
        assert gradients == ([False] * len(gradients) if freeze else before[1])
    assert flags(model) == before
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))  # type: ignore[index]


def test_restores_on_an_exception(model: nn.Module) -> None:
    before = flags(model)
    with pytest.raises(ZeroDivisionError), lent(model):
        1 / 0  # noqa: B018
    assert flags(model) == before


def test_flags_that_were_changed_meanwhile_are_restored(model: nn.Module) -> None:
    before = flags(model)
    with lent(model):
        model.train()
        model.requires_grad_(True)
    assert flags(model) == before


def test_nested_calls_restore_in_turn(model: nn.Module) -> None:
    before = flags(model)
    with lent(model, "eval", freeze=False):
        between = flags(model)
        with lent(model, "train"):
            assert flags(model) != between
        assert flags(model) == between
    assert flags(model) == before


def test_frozen_parameters_cost_no_gradient_and_the_input_still_gets_one(model: nn.Module) -> None:
    x = torch.rand(5, 3, requires_grad=True)
    with lent(model):
        model(x).sum().backward()
    assert x.grad is not None
    assert model[3].weight.grad is None  # type: ignore[index]


def test_eval_leaves_batch_norm_statistics_and_train_moves_them() -> None:
    norm = nn.BatchNorm1d(3)
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    with lent(norm, "eval"):
        norm(torch.rand(5, 3))
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]
    with lent(norm, "train"):
        norm(torch.rand(5, 3))
    assert not torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


class Restless(nn.Module):
    """A forward pass that changes whatever it can, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("history", torch.zeros(1), persistent=False)
        self.register_buffer("optional", None)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight += 1
            self.count.add_(1)
        self.replaced = self.replaced + 1
        self.history = torch.cat([self.history, torch.ones(1)])
        self.optional = torch.ones(1)
        self.register_buffer("added", torch.ones(1))
        self.train()
        self.weight.requires_grad_(False)
        return x + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002 (a user's layer may)


@pytest.mark.parametrize("error", [False, True])
def test_untouched_restores_flags_tensors_and_generators(error: bool) -> None:
    model = Restless().eval()
    tensors, before = {**dict(model.named_parameters()), **dict(model.named_buffers())}, snapshot(model)

    def generators() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002

    states, drawn = generators(), []
    for _ in range(2):
        try:
            with untouched(model, torch.device("cpu"), seed=7):
                drawn.append(float(model(torch.zeros(()))))
                if error:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert error
        now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert list(now) == list(tensors)
        assert all(tensor is tensors[name] for name, tensor in now.items())
        assert changed(model, before) == []
        assert model.optional is None
        assert flags(model) == ([False], [True])
        assert generators() == states
    assert drawn[0] == drawn[1], "the generators are seeded"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda model: None, []),
        (lambda model: model.count.fill_(float("nan")), []),
        (lambda model: model.count.fill_(1), ["count"]),
        (lambda model: model.weight.data.mul_(2), ["weight"]),
        (lambda model: model.history.fill_(5), ["history"]),
        (lambda model: model.register_buffer("replaced", torch.zeros(3)), ["replaced"]),
    ],
)
def test_changed_names_the_tensors_with_other_values(change: Callable[[Restless], object], names: list[str]) -> None:
    model = Restless()
    model.count.fill_(float("nan"))
    before = snapshot(model)
    change(model)
    assert changed(model, before) == names
