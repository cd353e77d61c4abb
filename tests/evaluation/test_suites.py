"""Every suite on every number of classes, images and tables: what they leave unbroken, exhaustive PGD leaves too."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn

from wideberth import losses
from wideberth.attacks import PGD, SUITES, Stage, suite
from wideberth.attacks.restarts import jobs_of
from wideberth.checks import Norm
from wideberth.evaluation import evaluate
from wideberth.models import MLP, ConvNet

ROWS = 60
CASES: dict[str, tuple[Norm, float]] = {
    "breast cancer": ("linf", 0.06),
    "wine": ("l2", 0.25),
    "five digits": ("l1", 1.0),
}


@cache
def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained model with 2, 3 or 5 classes and its samples, scaled to the box."""
    data = {"breast cancer": load_breast_cancer, "wine": load_wine, "five digits": load_digits}[name]()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0)).clamp_min(1e-9)
    torch.manual_seed(0)
    if name == "five digits":
        x, y = x[y < 5].view(-1, 1, 8, 8), y[y < 5]
        model: nn.Module = ConvNet(shape=(1, 8, 8), classes=5, width=8, batch_norm=True)
    else:
        model = MLP(shape=x.shape[1:], classes=len(data.target_names), hidden=(32,))
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        losses.cross_entropy(model(x), y).mean().backward()
        optimizer.step()
    return model.eval(), x[:ROWS], y[:ROWS]


@cache
def exhaustive(name: str) -> Tensor:
    """Which samples hold against 20 restarts of 50 steps on the margin and on the cross-entropy, (ROWS,) bool."""
    model, x, y = case(name)
    norm, eps = CASES[name]
    held = ~losses.misclassified(model(x), y)
    for loss in (losses.margin_loss, losses.cross_entropy):
        attack = PGD(norm=norm, steps=50, restarts=20, loss=loss, keep="worst")
        found = attack(model, x, y, eps=eps)
        assert found.success is not None
        held &= ~found.success
    return held


@pytest.mark.parametrize("line_up", list(SUITES))
@pytest.mark.parametrize("name", list(CASES))
def test_suites_run_for_any_number_of_classes_and_agree_with_exhaustive_restarts(name: str, line_up: str) -> None:
    """In l1, where PGD moves one entry at a time, a suite may break more; it leaves at most one more standing."""
    model, x, y = case(name)
    norm, eps = CASES[name]
    if line_up == "radius":
        found = evaluate(model, (x, y), norm=norm, eps=eps, suite="pgd", radii=True, margin=False, examined=False)
    else:
        found = evaluate(model, (x, y), norm=norm, eps=eps, suite=line_up, margin=False, examined=False)
    robust, held = torch.tensor(found.samples["robust"].to_numpy()), exhaustive(name)
    assert 5 < held.sum() < ROWS - 5, "else there is nothing to compare"
    # The first look has 2 restarts where the exhaustive attack has 20, which counts in l1.
    assert (robust & ~held).sum() <= (3 if (line_up, norm) == ("pgd", "l1") else 1)
    assert (held & ~robust).sum() <= (10 if norm == "l1" else 1)


def test_a_model_without_robustness_costs_next_to_nothing() -> None:
    """Whoever is broken leaves at once: under 2 % of what all runs of all attacks of `standard` would cost."""
    model, x, y = case("breast cancer")
    found = evaluate(model, (x, y), eps=0.5, suite="standard", margin=False, examined=False)
    assert found.robust_accuracy == 0
    full = 0
    for part in suite("standard", "linf", classes=2).values():
        attack = part.attack if isinstance(part, Stage) else part
        full += len(jobs_of(attack, 2)) * attack.num_steps * (2 if attack.needs_gradient else 1)
    assert found.samples["evaluations"].mean() < 0.02 * full


@pytest.mark.parametrize("name", ["wine", "five digits"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_scale_of_the_logits_hides_nothing_from_the_fast_suite(name: str, norm: Norm) -> None:
    """A thousand times larger, and float32's softmax is flat nearly everywhere."""
    model, x, y = case(name)
    eps = {"linf": 0.08 if name == "wine" else 0.12, "l2": 0.4}[norm]
    plain = evaluate(model, (x, y), eps=eps, norm=norm, suite="fast", examined=False)
    saturated = nn.Sequential(model, Times(1000)).eval()
    scaled = evaluate(saturated, (x, y), eps=eps, norm=norm, suite="fast", examined=False)
    assert 0.1 < plain.robust_accuracy < 0.9
    assert abs(scaled.robust_accuracy - plain.robust_accuracy) <= 1 / ROWS


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x
