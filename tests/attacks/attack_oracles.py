"""Models to attack: one that counts what it is asked, one with everything an attack could disturb, one with answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wideberth.attacks import Attack, AttackInputs
from wideberth.attacks.restarts import jobs_of
from wideberth.attacks.schedule import DueJobs, Schedule


class Counting(nn.Module):
    """A model that counts the rows it is run on, forwards and backwards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def network(features: int = 6, classes: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A smooth net for inputs of any rank, with running statistics, dropout, and sub-modules in different modes.

    It is in train mode except for a frozen batch norm; one parameter takes no gradient, another has one already.
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, 16),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.BatchNorm1d(16),
        nn.Linear(16, classes),
    ).to(dtype)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.dim() == 2:
                value.copy_(drawn)
            elif name.endswith(("bias", "mean")):
                value.copy_(0.2 * drawn)
            elif name.endswith(("weight", "var")):
                value.copy_(1 + 0.2 * drawn.abs())
        model[1].bias.sub_(model[1].weight.sum(1) / 2)  # centred on the middle of the unit box
    model.train()
    model[5].eval()
    model[1].bias.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    return model


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Sequential:
    """z(x) = W x + b, for inputs of any rank."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return nn.Sequential(nn.Flatten(), layer)


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Logits in eval mode, without a trace."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(x)
    for module, flag in flags:
        module.training = flag
    return logits


def schedule_of(attack: Attack, model: nn.Module, inputs: AttackInputs, classes: int = 2, **options: Any) -> Schedule:
    """All jobs of an attack on these inputs, as an evaluation runs them."""
    jobs = len(jobs_of(attack, classes)) if options.get("ranked") is not None else attack.restarts
    none_done = torch.zeros(len(inputs.y), dtype=torch.int64)
    due = DueJobs(inputs.rows, none_done, jobs, options.pop("ranked", None))
    return Schedule(model, attack, due, **options)
