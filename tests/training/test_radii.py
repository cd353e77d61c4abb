"""How far each input may be moved: the fact sheet's steps, on a model whose distance to the boundary is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_tools import defined_in, fit, halves, module_of, step_of, tensors

import wideberth as wb
from wideberth.training import radii
from wideberth.training.radii import Fixed, InstanceAdaptive, Radius, Zero
from wideberth.training.schedules import Ramp, Steps
from wideberth.training.step import Step

UNIT = 1 / 255
AUTHORS: dict[str, Any] = {"eps": 8 * UNIT, "rule": "lookahead", "gamma": 1.9 * UNIT, "beta": 0.1, "warmup": 0}


def policy(units: float | list[float] | None = None, rows: int = 1, **options: Any) -> InstanceAdaptive:
    """The policy in float64, with these radii in units of 1/255 in its memory."""
    made = InstanceAdaptive(**(AUTHORS | options)).double()
    made.allocate(rows)
    made.double()
    if units is not None:
        made.radii.copy_(torch.as_tensor(units, dtype=torch.float64) * UNIT)
    return made


def away(*units: float, epoch: int = 1, **options: Any) -> Step:
    """A batch of class 0, each row so many units from the boundary, misclassified where negative."""
    x = 0.5 + torch.tensor(units, dtype=torch.float64)[:, None] * UNIT
    return step_of(halves(), x, torch.zeros(len(units), dtype=torch.int64), epoch=epoch, **options)


def units(tensor: Tensor) -> list[float]:
    return (tensor * 255).tolist()


def observe(made: Radius, step: Step, eps: Tensor) -> None:
    """What the loop does after `propose`: craft, forward, tell the policy."""
    with torch.no_grad():
        made.observe(step, step.model(step.attack(eps).x))


# ---- the authors' rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "before", "after"),
    [
        (10.0, 8, 8.19),  # holds at 8 + 1.9 too
        (9.0, 8, 8.0),  # holds at 8 alone
        (7.0, 8, 7.81),  # holds at neither
        (0.5, 1, 0.9),  # 1 - 1.9 is below 0, so the target is 0
        (5.0, 0, 0.19),
        (1.0, 0, 0.0),
    ],
)
@pytest.mark.parametrize("misclassified", ["clean", "decay"])
def test_lookahead(misclassified: Any, distance: float, before: float, after: float) -> None:
    made = policy([before], misclassified=misclassified)
    eps = made.propose(away(distance))
    assert units(made.radii) == pytest.approx([after], rel=1e-6, abs=1e-12)
    assert units(eps) == pytest.approx([after], rel=1e-6, abs=1e-12)


def test_lookahead_of_a_misclassified_input() -> None:
    decayed, cleaned = policy([8], misclassified="decay"), policy([8], misclassified="clean")
    assert units(decayed.propose(away(-1.0))) == pytest.approx([7.2], rel=1e-6)  # attacked at the decayed radius
    assert units(decayed.radii) == pytest.approx([7.2], rel=1e-6)
    assert units(cleaned.propose(away(-1.0))) == [0]  # trained at the clean input
    assert units(cleaned.radii) == pytest.approx([7.81], rel=1e-6)  # as after a successful attack


class Feeble(wb.attacks.FGSM):
    """Turns a misclassified input into a well classified one, as an attack that overshoots may."""

    def craft(self, model: nn.Module, problem: Any, **options: Any) -> Any:
        found = super().craft(model, problem, **options)
        return replace(found, x=torch.ones_like(found.x), success=torch.zeros_like(problem.y, dtype=torch.bool))


@pytest.mark.parametrize(("rule", "after"), [("lookahead", 7.81), ("simple", 6.1)])
def test_a_misclassified_input_never_counts_as_held(rule: Any, after: float) -> None:
    made, step = policy([8], rule=rule), away(-1.0, attack=Feeble())
    observe(made, step, made.propose(step))
    assert units(made.radii) == pytest.approx([after], rel=1e-6)


@pytest.mark.parametrize(("start", "end"), [(0, 19.0), (8, 27.0)])
def test_a_hundred_successes(start: float, end: float) -> None:
    made = policy([start])
    for epoch in range(100):
        made.propose(away(100.0, epoch=epoch))
    assert units(made.radii) == pytest.approx([end], rel=1e-6)


def test_lookahead_attacks_on_noise_of_its_own() -> None:
    """The training attack must not begin where the two probes did, or the radius would be judged on its own noise."""
    seen: list[Tensor] = []

    class Spy(wb.attacks.PGD):
        def craft(self, model: nn.Module, problem: Any, **options: Any) -> Any:
            seen.append(problem.noise.uniform((3,)))
            return super().craft(model, problem, **options)

    step, made = away(9.0, attack=Spy(steps=1)), policy([8])
    step.attack(made.propose(step))
    assert len(seen) == 3
    assert len({tuple(noise.flatten().tolist()) for noise in seen}) == 3


# ---- the simple rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "before", "after"),
    [(10.0, 8, 9.9), (7.0, 8, 6.1), (0.5, 1, 0.0), (5.0, 0, 1.9), (0.1, 0, 1.9), (-1.0, 8, 6.1), (-1.0, 1, 0.0)],
)
def test_simple(distance: float, before: float, after: float) -> None:
    made, step = policy([before], rule="simple"), away(distance)
    eps = made.propose(step)
    assert units(eps) == pytest.approx([0 if distance < 0 else before], rel=1e-6)
    observe(made, step, eps)
    assert units(made.radii) == pytest.approx([after], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("distance", "after"), [(10.0, 9.9), (7.0, 6.1), (-1.0, 7.2)])
def test_simple_with_decay(distance: float, after: float) -> None:
    made, step = policy([8], rule="simple", misclassified="decay"), away(distance)
    eps = made.propose(step)
    assert units(eps) == pytest.approx([7.2 if distance < 0 else 8], rel=1e-6)
    observe(made, step, eps)
    assert units(made.radii) == pytest.approx([after], rel=1e-6)


@pytest.mark.parametrize("rule", ["simple", "lookahead"])
def test_the_maximum(rule: Any) -> None:
    made = policy([8.0, 8.0], rows=2, rule=rule, maximum=8.1 * UNIT)
    for epoch in range(3):
        step = away(100.0, 1.0, epoch=epoch)
        observe(made, step, made.propose(step))
    top, other = units(made.radii)
    assert top == pytest.approx(8.1, rel=1e-9)
    assert other < 8


# ---- the warm-up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["simple", "lookahead"])
@pytest.mark.parametrize(("misclassified", "after"), [("clean", [8, 8, 8]), ("decay", [8, 8, 0])])
def test_warm_up(misclassified: Any, after: list[float], rule: Any) -> None:
    made = policy(rows=3, rule=rule, misclassified=misclassified, warmup=2)
    for epoch in (0, 1):
        step = away(10.0, 1.0, -1.0, epoch=epoch)
        eps = made.propose(step)
        assert units(eps) == pytest.approx([8, 8, 0])  # misclassified inputs are trained as they are
        observe(made, step, eps)
        assert units(made.radii) == pytest.approx(after)
    step = away(10.0, 1.0, -1.0, epoch=2)
    observe(made, step, made.propose(step))
    assert units(made.radii)[0] > 8 > units(made.radii)[1]


def test_a_late_sample_recovers_from_the_warm_up_with_decay() -> None:
    made = policy(rows=1, misclassified="decay", warmup=2)
    assert [units(made.propose(away(-1.0, epoch=0)))[0], units(made.propose(away(9.0, epoch=1)))[0]] == [
        0,
        pytest.approx(8),
    ]


@pytest.mark.parametrize("rule", ["simple", "lookahead"])
@pytest.mark.parametrize("misclassified", ["clean", "decay"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_only_rows_of_the_batch_move(rule: Any, misclassified: Any, warmup: int) -> None:
    made = policy([8.0] * 6, rows=6, rule=rule, misclassified=misclassified, warmup=warmup)
    made.radii.mul_(torch.arange(1, 7))  # all different
    before = made.radii.clone()
    step = away(100.0, 1.0, -1.0, index=torch.tensor([4, 0, 2]))
    observe(made, step, made.propose(step))
    moved = made.radii != before
    assert moved[[1, 3, 5]].any().item() is False
    if warmup == 0:
        assert moved[[0, 2, 4]].all()


def test_a_misclassified_input_is_trained_exactly_where_it_is() -> None:
    seen: list[Tensor] = []

    class Look(wb.objectives.AdversarialCrossEntropy):
        def pay(self, step: Step, x_adv: Tensor) -> Any:
            seen.append(x_adv)
            return super().pay(step, x_adv)

    x = torch.tensor([[0.4], [0.6], [0.500001]])
    made = InstanceAdaptive(0.05, warmup=0)
    module = module_of(halves().float(), 3, radius=made, objective=Look(), attack=wb.attacks.PGD(steps=3))
    module.training_step((x, torch.zeros(3, dtype=torch.int64), torch.arange(3)), 0)
    assert seen[0][0].equal(x[0])
    assert not seen[0][1].equal(x[1])
    assert not seen[0][2].equal(x[2])


# ---- the others -----------------------------------------------------------------------------------------------------


def test_fixed_and_its_warm_up() -> None:
    x = torch.rand(3, 1)
    y = torch.zeros(3, dtype=torch.int64)

    def at(made: Radius, progress: float) -> list[float]:
        return made.propose(step_of(halves().float(), x, y, progress=progress)).tolist()

    assert at(Fixed(0.1), 0.0) == pytest.approx([0.1] * 3)
    ramp = Fixed(0.1, warmup=4)
    assert [at(ramp, p)[0] for p in (0, 0.5, 2, 4, 9)] == pytest.approx([0, 0.0125, 0.05, 0.1, 0.1])
    assert ramp.nominal() == 0.1
    assert at(Fixed(Ramp(0.2, 10)), 5.0) == pytest.approx([0.1] * 3)
    assert Fixed(Steps(0.2, [3], factor=0.5)).nominal() == pytest.approx(0.1)
    assert at(Zero(), 3.0) == [0.0] * 3
    assert (Zero().nominal(), len(Zero().radii)) == (0.0, 0)


def test_the_ramp_is_followed_within_an_epoch() -> None:
    seen: list[float] = []

    class Look(Fixed):
        def propose(self, step: Step) -> Tensor:
            seen.append(float(super().propose(step)[0]))
            return super().propose(step)

    module = module_of(halves().float(), 4, radius=Look(0.4, warmup=1))
    batch = (torch.rand(2, 1), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    for place in range(4):
        module.training_step(batch, place)
    assert seen == pytest.approx([0, 0.1, 0.2, 0.3])


REFUSED: dict[str, list[tuple[Callable[[], Radius], str]]] = {
    "Zero": [],
    "Fixed": [
        (lambda: Fixed(-0.1), "eps=-0.1: must be at least 0"),
        (lambda: Fixed(0.1, warmup=-1), "warmup=-1: must be at least 0"),
    ],
    "InstanceAdaptive": [
        (lambda: InstanceAdaptive(-1.0), "eps=-1.0: must be at least 0"),
        (lambda: InstanceAdaptive(rule="clever"), "rule='clever': accepted are simple, lookahead"),  # type: ignore[arg-type]
        (lambda: InstanceAdaptive(misclassified="drop"), "misclassified='drop': accepted are clean, decay"),  # type: ignore[arg-type]
        (lambda: InstanceAdaptive(gamma=-0.1), "gamma=-0.1: must be at least 0"),
        (lambda: InstanceAdaptive(beta=1.5), r"beta=1.5: a share, must be in \[0, 1\]"),
        (lambda: InstanceAdaptive(warmup=-1), "warmup=-1: must be at least 0"),
        (lambda: InstanceAdaptive(maximum=-1.0), "maximum=-1.0: must be at least 0"),
        (lambda: InstanceAdaptive(0.3, maximum=0.2), "maximum=0.2: below eps=0.3"),
    ],
}


def test_every_policy_has_a_row() -> None:
    assert defined_in(radii, Radius) == REFUSED.keys()


@pytest.mark.parametrize(("make", "message"), [case for cases in REFUSED.values() for case in cases])
def test_refusals(make: Callable[[], Radius], message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


# ---- in a run -------------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Says the same of every input; its one parameter moves no logit."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(1))
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        answer = torch.tensor(self.logits, dtype=x.dtype).expand(len(x), -1)
        return answer + 0 * (self.idle + x.flatten(1)[:, :1])


@pytest.mark.parametrize(
    ("rule", "visited", "after"),
    [
        ("simple", 3, {0: 0.05 + 3 * 0.02, 1: 0.0, 2: 0.0}),
        ("lookahead", 3, {0: 0.05 + 3 * 0.002, 1: 0.05 - 3 * 0.002, 2: 0.05 - 3 * 0.002}),
    ],
)
def test_radii_of_a_run_move_as_predicted(tmp_path: Path, rule: Any, visited: int, after: dict[int, float]) -> None:
    """Nothing breaks class 0 of a model that always says so, and nothing saves the others."""
    data = tensors(10, classes=3)
    run = fit(
        Constant([1.0, 0.0, 0.0]),
        data,
        tmp_path / "run",
        radius=InstanceAdaptive(0.05, rule, gamma=0.02, beta=0.1, warmup=1),
        epochs=1 + visited,
        probe=0,
    )
    samples = run.samples
    assert samples is not None
    assert set(samples["label"]) == {0, 1, 2}
    assert samples["radius"].to_numpy() == pytest.approx([after[y] for y in samples["label"]], abs=1e-6)
    metrics = run.metrics
    assert metrics is not None
    assert metrics["radius_mean"].iloc[0] == pytest.approx(0.05)  # the warm-up
    if rule == "simple":
        zero = (samples["label"] == 0).to_numpy()
        means = [np.where(zero, 0.05 + 0.02 * done, max(0, 0.05 - 0.02 * done)).mean() for done in range(visited + 1)]
        assert metrics["radius_mean"].to_numpy() == pytest.approx(np.array(means), abs=1e-6)
        assert metrics["radius_q0"].iloc[-1] == pytest.approx(0, abs=1e-9)
        assert metrics["radius_q100"].iloc[-1] == pytest.approx(0.11, abs=1e-6)


def test_a_constant_model_shrinks_all_radii_to_zero(tmp_path: Path) -> None:
    """Ties count as misclassified: all logits equal is no robustness."""
    run = fit(
        Constant([0.0, 0.0, 0.0]), tensors(10), tmp_path / "run", radius=InstanceAdaptive(0.05, gamma=0.03, warmup=0)
    )
    assert run.samples is not None
    assert run.samples["radius"].tolist() == [0.0] * 10


def test_the_other_objective_moves_radii_too(tmp_path: Path) -> None:
    run = fit(
        Constant([1.0, 0.0, 0.0]),
        tensors(10),
        tmp_path / "run",
        radius=InstanceAdaptive(0.05, gamma=0.01, warmup=0),
        objective=wb.objectives.TRADES(),
    )
    assert run.samples is not None
    expected = np.where(run.samples["label"] == 0, 0.07, 0.03)
    assert run.samples["radius"].to_numpy() == pytest.approx(expected, abs=1e-6)
