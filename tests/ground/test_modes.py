"""A lent model comes back exactly as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from wideberth.modes import lent

Flags = tuple[list[bool], list[bool]]


def flags(model: nn.Module) -> Flags:
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.fixture
def model() -> nn.Module:
    """In train mode, but for a batch norm that its owner froze and a part in eval mode with a part in train mode."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), inner, nn.Linear(4, 2))
    model[1].eval()
    model[1].requires_grad_(False)
    inner.training = False
    model[0].weight.grad = torch.ones(4, 3)
    return model


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_lends_in_the_mode_asked_for_and_restores_every_flag(model: nn.Module, mode: Any, freeze: bool) -> None:
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


def test_restores_what_the_borrower_changed(model: nn.Module) -> None:
    before = flags(model)
    with lent(model):
        model.train()
        model.requires_grad_(True)
    assert flags(model) == before


def test_nested_loans_come_back_in_turn(model: nn.Module) -> None:
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
