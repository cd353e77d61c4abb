"""A driver may record successes after the last step: it must find, and count, what step after step finds."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from attack_oracles import network
from torch import Tensor, nn

from wideberth import geometry
from wideberth.attacks import MIFGSM, PGD, AttackInputs, EarlyStoppedPGD, ProjectedState, Query
from wideberth.attacks.drivers import run_steps
from wideberth.randomness import Noise

ATTACKS = {
    "PGD": PGD(steps=6),
    "PGD, l2": PGD(steps=6, norm="l2"),
    "PGD, l1": PGD(steps=6, norm="l1"),
    "PGD, size": PGD(steps=6, step_size=0.05),
    "MI-FGSM": MIFGSM(steps=6),
    "early-stopped": EarlyStoppedPGD(steps=6, tau=1, omega=0.01),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("targeted", [False, True])
def test_a_run_is_its_steps(name: str, targeted: bool) -> None:
    attack = ATTACKS[name]
    model, x = network(4, 3).eval(), torch.rand(24, 4, dtype=torch.float64)
    y = model(x).detach().argmax(1)
    eps = torch.linspace(0, 0.5, 24, dtype=torch.float64)
    inputs = AttackInputs(x, y, eps, Noise(torch.arange(24), 3), target=(y + 1) % 3 if targeted else None)
    state = attack.init(inputs)
    for _ in range(attack.steps):
        state = attack.update(model, inputs, state)
    run = run_steps(attack, model, inputs, check_success=False)
    assert 0 < int((run.steps_survived < attack.steps).sum()) < 24
    for field in fields(run):
        # Three have no meaning before anyone judged the last point; l2 and l1 have no faces.
        if field.name not in ("best", "best_loss", "adversarial") and getattr(state, field.name) is not None:
            assert torch.equal(getattr(run, field.name), getattr(state, field.name)), field.name
    assert torch.equal(run.best, state.point)


class Holding(nn.Module):
    """Two classes; the gradient of x is always the one tensor that the model holds, in part no number."""

    def __init__(self) -> None:
        super().__init__()
        self.held = torch.tensor([[1.0, -2.0, float("nan"), 0.5]], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        held = self.held

        class Constant(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.sum(1, keepdim=True)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                return held

        score = Constant.apply(x)
        return torch.cat([torch.ones_like(score), score * 0], 1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind", [PGD, MIFGSM])
def test_a_gradient_that_the_model_holds_is_left_alone_and_nan_moves_nothing(kind: type[PGD], norm: Any) -> None:
    model, x = Holding(), torch.full((1, 4), 0.5, dtype=torch.float64)
    before = model.held.clone()
    found = kind(norm=norm, steps=2, start="none")(model, x, torch.zeros(1, dtype=torch.int64), eps=0.1)
    torch.testing.assert_close(model.held, before, equal_nan=True, rtol=0, atol=0)
    delta = (found.x - x)[0]
    assert delta[2] == 0
    if norm == "linf":
        torch.testing.assert_close(delta, torch.tensor([0.1, -0.1, 0, 0.1], dtype=torch.float64))
    assert delta[1] < 0
    assert geometry.norm(found.x - x, norm).item() == pytest.approx(0.1)


def test_a_gradient_that_float32_cannot_hold_moves_a_float64_point_whatever_the_radii_are_in() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[200.0, 200.0, 200.0], [-200.0, -200.0, -200.0]]))
    x = torch.full((1, 3), 0.5, dtype=torch.float64)
    inputs = AttackInputs(x, torch.tensor([0]), torch.tensor([0.25]), Noise(torch.arange(1)))
    for norm, moved in (("linf", 0.25), ("l2", 0.25 / 3**0.5)):
        run = run_steps(PGD(norm=norm, steps=3, start="none"), model, inputs, check_success=False)  # type: ignore[arg-type]
        torch.testing.assert_close(x - run.best, torch.full_like(x, moved))


class Reusing(nn.Module):
    """Answers in the same memory every time, as a captured graph does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.memory = model, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.model(x)
        if self.memory.shape != answer.shape:
            self.memory = torch.empty_like(answer).detach()
        self.memory.detach_().copy_(answer)
        return self.memory


def test_a_model_may_answer_in_the_same_memory_every_time() -> None:
    model, x = network(4, 3).eval(), torch.rand(24, 4, dtype=torch.float64)
    y = model(x).detach().argmax(1)
    plain, reused = (PGD(steps=6)(m, x, y, eps=0.3) for m in (model, Reusing(model)))
    assert 0 < int((plain.steps_survived < 6).sum()) < 24
    assert torch.equal(plain.steps_survived, reused.steps_survived)


def test_a_subclass_cannot_replace_the_update_whose_parts_a_driver_may_call() -> None:
    with pytest.raises(TypeError, match=r"Still\.update: override query, record or move"):

        class Still(PGD):
            def update(self, *_: Any) -> Any: ...


def test_a_subclass_with_a_move_of_its_own_is_run_by_it() -> None:
    class Still(PGD):
        def move(self, inputs: AttackInputs, state: ProjectedState, query: Query) -> ProjectedState:
            return state

    x = torch.rand(2, 4, dtype=torch.float64)
    found = Still(start="none", steps=2)(network(4, 3), x, torch.zeros(2, dtype=torch.int64), eps=0.3)
    assert torch.equal(found.x, x)
