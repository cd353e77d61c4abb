"""Every method with every other: objective x radius x weighting x regularizer x perturbation, on digits."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from examples import examples
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import mlp, module_of, plain_sgd

import wideberth as wb
from wideberth.training.objectives import Objective
from wideberth.training.perturbation import AWP
from wideberth.training.radii import Radius
from wideberth.training.regularizers import Regularizer
from wideberth.training.weightings import Weighting

THESE_OBJECTIVES: dict[str, Callable[[], Objective]] = examples("objective")
THESE_RADII: dict[str, Callable[[], Radius]] = examples("radius")
WEIGHTINGS: dict[str, Callable[[], Weighting]] = examples("weighting")
REGULARIZERS: dict[str, Callable[[], Regularizer] | None] = {"none": None} | examples("regularizers")
PERTURBATIONS = {"none": None, "AWP": AWP(0.01)}
DIGITS = wb.data.Digits()


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), mlp(64, 10, batch_norm=True))


@cache
def learned() -> dict[str, Tensor]:
    """Weights that get some digits right, so that every policy has something to do."""
    model, (x, y, _) = network(), DIGITS.train().tensors()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def refusal(objective: str, radius: str, weighting: str) -> str | None:
    """What is wrong with a combination, as its refusal begins; None where nothing is."""
    if objective == "CleanCrossEntropy":
        if radius != "Zero":
            return f"radius={radius} with objective=CleanCrossEntropy: "
        if weighting != "Uniform":
            return f"weighting={weighting} with objective=CleanCrossEntropy: "
    if weighting == "GAIRAT" and radius == "Zero":
        return "weighting=GAIRAT with radius=Zero: "
    return None


def made(objective: str, radius: str, weighting: str, regularizer: str, perturbation: str) -> wb.RobustTraining:
    model = network()
    model.load_state_dict(learned())
    return module_of(
        model,
        len(DIGITS.train()),
        attack=wb.attacks.PGD(steps=1),
        radius=THESE_RADII[radius](),
        objective=THESE_OBJECTIVES[objective](),
        weighting=WEIGHTINGS[weighting](),
        regularizers=[] if (make := REGULARIZERS[regularizer]) is None else [make()],
        perturbation=PERTURBATIONS[perturbation],
    )


def stepped(module: wb.RobustTraining, optimizer: torch.optim.Optimizer, place: int) -> Tensor:
    """One step on the rows of that place; the loss."""
    loss = module.training_step(DIGITS.train().__getitems__(list(range(4 * place, 4 * place + 4))), place)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(("objective", "radius"), product(THESE_OBJECTIVES, THESE_RADII))
def test_trains_and_is_restored(objective: str, radius: str) -> None:
    """Two steps; then one more, from where the module is and from its checkpoint, which must come to the same."""
    for weighting, regularizer, perturbation in product(WEIGHTINGS, REGULARIZERS, PERTURBATIONS):
        names = (objective, radius, weighting, regularizer, perturbation)
        wrong = refusal(*names[:3])
        if wrong is not None:
            with pytest.raises(wb.InputError) as told:
                made(*names)
            assert str(told.value).startswith(wrong), names
            assert "\n" not in str(told.value), names
            continue
        module = made(*names)
        before = module.radius.radii.clone()
        optimizer = plain_sgd(module.parameters())
        for place in range(2):
            assert torch.isfinite(stepped(module, optimizer, place)), names
            gradients = [parameter.grad for parameter in module.parameters()]
            assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients), names
        assert module.visited.nonzero().flatten().tolist() == list(range(8)), names
        if len(before):
            assert torch.equal(module.radius.radii[8:], before[8:]), names
            assert (module.radius.radii[:8] != before[:8]).any(), names
            assert (module.radius.radii >= 0).all(), names
        file = io.BytesIO()
        torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
        on = stepped(module, optimizer, 0)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = made(*names)
        again.load_state_dict(saved["module"])
        other = plain_sgd(again.parameters())
        other.load_state_dict(saved["optimizer"])
        assert torch.equal(stepped(again, other, 0), on), names
        assert all(map(torch.equal, again.state_dict().values(), module.state_dict().values())), names
