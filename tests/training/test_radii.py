"""How far each input may be moved: the fact sheet's steps, on a model whose distance to the boundary is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_tools import context_of, fit, halves, mlp, module_of, tensors

import wideberth as wb
from wideberth.training.batch import BatchContext, TrainingPoints
from wideberth.training.catalogue import exported
from wideberth.training.radii import ClassWise, Fixed, InstanceAdaptive, Radius, ShortestSuccessful, Zero
from wideberth.training.schedules import Cosine, Ramp, Steps

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


def away(*units: float, epoch: int = 1, **options: Any) -> BatchContext:
    """A batch of class 0, each row so many units from the boundary, misclassified where negative."""
    x = 0.5 + torch.tensor(units, dtype=torch.float64)[:, None] * UNIT
    return context_of(halves(), x, torch.zeros(len(units), dtype=torch.int64), epoch=epoch, **options)


def units(tensor: Tensor) -> list[float]:
    return (tensor * 255).tolist()


def observe(made: Radius, step: BatchContext, eps: Tensor) -> None:
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

    def perturb(self, model: nn.Module, inputs: Any, **options: Any) -> Any:
        found = super().perturb(model, inputs, **options)
        return replace(found, x=torch.ones_like(found.x), success=torch.zeros_like(inputs.y, dtype=torch.bool))


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
        def init(self, inputs: Any) -> Any:
            seen.append(inputs.noise.uniform((3,)))
            return super().init(inputs)

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
        def compute(self, batch: Any, points: Any) -> Any:
            seen.append(points.x)
            return super().compute(batch, points)

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
        return made.propose(context_of(halves().float(), x, y, progress=progress)).tolist()

    assert at(Fixed(0.1), 0.0) == pytest.approx([0.1] * 3)
    ramp = Fixed(0.1, warmup=4)
    assert [at(ramp, p)[0] for p in (0, 0.5, 2, 4, 9)] == pytest.approx([0, 0.0125, 0.05, 0.1, 0.1])
    assert ramp.eval_eps() == 0.1
    assert at(Fixed(Ramp(0.2, 10)), 5.0) == pytest.approx([0.1] * 3)
    assert at(Fixed(Cosine(0.2, 10)), 5.0) == pytest.approx([0.1] * 3)
    assert Fixed(Cosine(0.2, 10)).eval_eps() == 0.2
    assert Fixed(Steps(0.2, [3], factor=0.5)).eval_eps() == pytest.approx(0.1)
    assert at(Zero(), 3.0) == [0.0] * 3
    assert (Zero().eval_eps(), len(Zero().radii)) == (0.0, 0)


def test_cosine() -> None:
    wave = Cosine(3.0, 6, start=1.0)
    assert [wave(epoch) for epoch in (0, 2, 3, 4, 6, 99)] == pytest.approx([1, 1.5, 2, 2.5, 3, 3])
    with pytest.raises(wb.InputError, match=r"Cosine\(epochs=0\): must be positive"):
        Cosine(1.0, 0)


def test_class_wise() -> None:
    x, y = torch.rand(4, 1), torch.tensor([1, 0, 0, 1])
    made, ramp = ClassWise([0.1, 0.3]), ClassWise([0.1, 0.3], warmup=4)
    assert made.propose(context_of(halves().float(), x, y)).tolist() == pytest.approx([0.3, 0.1, 0.1, 0.3])
    assert ramp.propose(context_of(halves().float(), x, y, progress=1.0)).tolist() == pytest.approx(
        [0.075, 0.025, 0.025, 0.075]
    )
    assert ramp.eval_eps() == 0.3
    assert len(ramp.radii) == 0
    assert ClassWise([0.1, 0.3]).half().by_class.dtype == torch.float32
    assert "by_class" not in made.state_dict()


def test_class_wise_wants_a_radius_for_every_class() -> None:
    made = ClassWise([0.1, 0.1, 0.1])
    with pytest.raises(wb.InputError, match="eps: 3 radii, the model has 2 classes: one for each"):
        made.propose(context_of(halves().float(), torch.rand(2, 1), torch.tensor([0, 1])))


def test_class_wise_asks_the_model_once_and_leaves_it_alone() -> None:
    module = module_of(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), radius=ClassWise([0.1, 0.2, 0.0]))
    forwards: list[int] = []
    module.model.register_forward_hook(lambda _, given, __: forwards.append(len(given[0])))
    for _ in range(2):
        module.training_step(tensors().train().__getitems__([0, 1, 2, 3]), 0)
    assert forwards == [1, 4, 4, 4, 4, 4, 4]  # two steps of the attack and the objective's own
    assert module.model[0].num_batches_tracked == 2


# ---- the shortest successful perturbation ---------------------------------------------------------------------------

BOUNDARY: dict[str, Any] = {"loss": wb.losses.soft_margin_loss, "steps": 3, "step_size": 0.2}


def margins(
    x: list[float], maximum: float = 0.3, **options: Any
) -> tuple[ShortestSuccessful, BatchContext, TrainingPoints]:
    """One visit to inputs (B, 1) of class 0, which `halves` puts |x - 1/2| from the boundary; their points."""
    bisections, epochs = options.pop("bisections", 20), options.pop("epochs", 1)
    made = ShortestSuccessful(maximum, minimum=0.01, bisections=bisections).double()
    made.allocate(len(x))
    made.double()
    points = torch.tensor(x, dtype=torch.float64)[:, None]
    attack = wb.attacks.PGD(**(BOUNDARY | options.pop("attack", {})))
    for epoch in range(epochs):
        step = context_of(
            halves(), points, torch.zeros(len(x), dtype=torch.int64), epoch=epoch, attack=attack, **options
        )
        points = made.adjust(step, step.attack(made.propose(step)))
    return made, step, points


def found_at(step: BatchContext, x_adv: Tensor) -> Any:
    """The result of an attack that found these points."""
    return replace(step.attack(torch.zeros(len(step.y), dtype=step.x.dtype)), x=x_adv)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_boundary_is_found(norm: Any) -> None:
    """From 0.01 inside to far away; wrong ones stay; those beyond the maximum are not near."""
    x = [0.51, 0.6, 0.75, 0.79, 0.81, 0.95, 0.4, 0.5]
    made, _, points = margins(x, attack={"norm": norm})
    assert points.x[:4, 0].tolist() == pytest.approx([0.5] * 4, abs=1e-6)
    assert points.x[6:, 0].tolist() == [0.4, 0.5]
    assert made.radii.tolist()[:4] == pytest.approx([0.01, 0.1, 0.25, 0.29], abs=1e-6)
    assert made.radii.tolist()[4:] == pytest.approx([0.31, 0.315, 0, 0], abs=1e-6)  # the search ends at 1.05 maxima
    assert points.near_boundary is not None
    assert points.near_boundary.tolist() == [True] * 4 + [False] * 2 + [True] * 2


@pytest.mark.parametrize("bisections", [1, 2, 5, 10])
def test_every_bisection_halves_what_is_not_known(bisections: int) -> None:
    x = torch.linspace(0.511, 0.79, 40).tolist()
    made, _, points = margins(x, bisections=bisections)
    error = (points.x[:, 0] - 0.5).abs().max().item()
    assert error <= 0.315 / 2**bisections + 1e-9
    assert error > 0.315 / 2 ** (bisections + 3)
    assert (x[0] - points.x[0, 0]).item() == pytest.approx(made.radii[0].item())


def test_the_first_point_tried_is_the_one_that_the_attack_found() -> None:
    tried: list[Tensor] = []
    model = halves()
    model.register_forward_hook(lambda _, given, __: tried.append(given[0].clone()))
    made = ShortestSuccessful(0.3, minimum=0.1, bisections=3).double()
    made.allocate(1)
    step = context_of(model, torch.tensor([[0.7]], dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
    found = step.attack(made.propose(step))
    tried.clear()
    made.adjust(step, found)
    assert [point.item() for point in tried] == pytest.approx([0.6, 0.7 - (0.1 + 0.315) / 2, 0.7 - (0.1 + 0.2075) / 2])


def test_the_next_visit_attacks_at_the_distance_of_the_last() -> None:
    made, step, _ = margins([0.503, 0.6, 0.4, 0.95])
    assert made.propose(step).tolist() == pytest.approx([0.01, 0.1, 0, 0.315], abs=1e-6)  # at least the minimum
    made.radii.fill_(0.2)
    assert made.propose(step).tolist() == pytest.approx([0.2, 0.2, 0, 0.2])


def test_rows_that_are_not_in_the_batch_keep_their_distance() -> None:
    made = ShortestSuccessful(0.3, minimum=0.01).double()
    made.allocate(5)
    made.radii += 0.123
    x, y = torch.tensor([[0.6], [0.7]], dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    step = context_of(halves(), x, y, index=torch.tensor([3, 1]))
    made.adjust(step, step.attack(made.propose(step)))
    assert made.radii[[3, 1]].tolist() == pytest.approx([0.1, 0.2], abs=1e-3)
    assert made.radii[[0, 2, 4]].tolist() == pytest.approx([0.123] * 3)


def test_the_points_lie_in_the_box() -> None:
    """A boundary outside the box is not reached, and the point stops at its face."""
    _, _, points = margins([0.6, 0.75], attack={"box": (0.55, 1.0)})
    assert points.x[:, 0].tolist() == pytest.approx([0.55, 0.55])
    assert points.near_boundary is not None
    assert points.near_boundary.tolist() == [False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adjusted_points_have_the_kind_of_the_input(dtype: torch.dtype) -> None:
    made = ShortestSuccessful(0.3, minimum=0.05)
    made.allocate(4)
    x = torch.tensor([[0.9], [0.6], [0.4], [1.0]], dtype=dtype)
    step = context_of(halves().to(dtype), x, torch.zeros(4, dtype=torch.int64))
    settled = made.adjust(step, step.attack(made.propose(step))).x
    assert (settled.dtype, settled.requires_grad) == (dtype, False)
    assert torch.equal(settled, settled.clamp(0, 1))
    assert settled[2] == x[2]
    assert made.radii.dtype == torch.float32
    assert settled[1].item() == pytest.approx(0.5, abs=0.01)


def test_an_attack_that_did_not_move_has_no_direction() -> None:
    made = ShortestSuccessful(0.3, minimum=0.05)
    made.allocate(1)
    step = context_of(halves().float(), torch.tensor([[0.9]]), torch.zeros(1, dtype=torch.int64))
    points = made.adjust(step, found_at(step, step.x))
    assert points.x.tolist() == step.x.tolist()
    assert points.near_boundary is not None
    assert not points.near_boundary
    assert made.radii.isfinite().all()


def test_a_point_further_than_the_search_goes_is_brought_back() -> None:
    made = ShortestSuccessful(0.1, minimum=0.05)
    made.allocate(2)
    x = torch.tensor([[0.9], [0.55]])
    step = context_of(halves().float(), x, torch.zeros(2, dtype=torch.int64))
    points = made.adjust(step, found_at(step, x - 0.5))
    assert points.x[:, 0].tolist() == pytest.approx([0.795, 0.5], abs=1e-3)
    assert points.near_boundary is not None
    assert points.near_boundary.tolist() == [False, True]


def test_a_wrong_input_stays_wherever_the_attack_went() -> None:
    made = ShortestSuccessful(0.3, minimum=0.05)
    made.allocate(2)
    step = context_of(halves().float(), torch.tensor([[0.4], [0.5]]), torch.zeros(2, dtype=torch.int64))
    points = made.adjust(step, found_at(step, torch.ones(2, 1)))
    assert torch.equal(points.x, step.x)
    assert made.radii.tolist() == [0, 0]
    assert points.near_boundary is not None
    assert points.near_boundary.all()


def test_the_search_leaves_the_model_alone() -> None:
    """The original's bisection moves batch-norm statistics and leaves a graph."""
    model = nn.Sequential(nn.BatchNorm1d(1), halves().float()).train()
    made = ShortestSuccessful(0.3, minimum=0.05)
    module = module_of(model, 4, radius=made, objective=wb.objectives.MaxMargin(), attack=wb.attacks.PGD(**BOUNDARY))
    forwards: list[bool] = []
    model.register_forward_hook(lambda module, *_: forwards.append(module.training))
    module.training_step((torch.rand(4, 1), torch.zeros(4, dtype=torch.int64), torch.arange(4)), 0)
    assert forwards == [False] * (1 + 3 + 10) + [True] * 2  # clean, attack, bisections; the objective's two
    assert model[0].num_batches_tracked == 2
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_max_margin_training_resumes_with_what_it_found(tmp_path: Path) -> None:
    def run(out: Path, epochs: int, **options: Any) -> Any:
        model = mlp()
        policies = {"radius": ShortestSuccessful(0.3, 0.05), "objective": wb.objectives.MaxMargin()}
        options["optimizer"] = partial(torch.optim.Adam, lr=0.1)  # so that some are right by more than half
        made = fit(model, tensors(), out, epochs=epochs, attack=wb.attacks.PGD(**BOUNDARY), **policies, **options)
        assert made.samples is not None
        return made.samples["radius"].tolist(), [p.detach().clone() for p in model.parameters()]

    radii_straight, straight = run(tmp_path / "straight", 4)
    run(tmp_path / "run", 2)
    radii_resumed, resumed = run(tmp_path / "run", 4, resume=True)
    assert radii_straight == radii_resumed
    assert len(set(radii_straight)) > 2
    assert all(map(torch.equal, straight, resumed))


def test_the_ramp_is_followed_within_an_epoch() -> None:
    seen: list[float] = []

    class Look(Fixed):
        def propose(self, batch: BatchContext) -> Tensor:
            seen.append(float(super().propose(batch)[0]))
            return super().propose(batch)

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
    "ClassWise": [
        (lambda: ClassWise([0.1]), r"eps=\[0.1\]: must be one radius per class, at least 2"),
        (lambda: ClassWise([0.1, -0.2]), r"eps\[1\]=-0.2: must be at least 0"),
        (lambda: ClassWise([0.1, 0.2], warmup=-1), "warmup=-1: must be at least 0"),
    ],
    "ShortestSuccessful": [
        (lambda: ShortestSuccessful(-1.0), "maximum=-1.0: must be at least 0"),
        (lambda: ShortestSuccessful(0.1, minimum=0), r"minimum=0: must be in \(0, maximum=0.1\]"),
        (lambda: ShortestSuccessful(0.1, minimum=0.2), r"minimum=0.2: must be in \(0, maximum=0.1\]"),
        (lambda: ShortestSuccessful(bisections=0), "bisections=0: must be at least 1"),
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
    assert exported("radius").keys() == REFUSED.keys()


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
