"""A hunt for broken contracts: random attacks on random models and inputs, what `test_conformance` has no rows for.

`WIDEBERTH_HUNT=10000 uv run pytest tests/attacks/test_hunt.py` tries so many cases, others each time; without it, a
few, always the same.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from attack_oracles import Counting, schedule_of
from exported import FEW, exported, norms_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from wideberth import geometry, losses
from wideberth.attacks import (
    APGD,
    DDN,
    FAB,
    FGSM,
    FMN,
    MIFGSM,
    NFGSM,
    PGD,
    PMA,
    Adversarial,
    Attack,
    AttackInputs,
    CarliniWagner,
    DeepFool,
    EarlyStoppedPGD,
    Flow,
    RandomNoise,
    ScaledStep,
    Spatial,
    Square,
    Wasserstein,
)
from wideberth.attacks.drivers import perturb_batch
from wideberth.checks import Box, InputError
from wideberth.modes import lent
from wideberth.randomness import Noise
from wideberth.verification import inside

CASES = os.environ.get("WIDEBERTH_HUNT")
INFINITE = float("inf")


# ---- models ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A linear layer that answers a row the same, to the last bit, whoever else is asked about."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        total = self.bias.expand(len(x), -1)
        for column, entry in zip(self.weight.unbind(1), x.unbind(1), strict=True):
            total = total + entry[:, None] * column
        return total


class Conv(nn.Module):
    """Four kernels of width three along the flattened input, their largest and mean answers, and a layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.kernels, self.out = Layer(3, 4), Layer(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.pad(x.flatten(1), (1, 1)).unfold(1, 3, 1)
        answers = self.kernels(patches.flatten(0, 1)).relu().view(len(x), -1, 4).unbind(1)
        largest, total = answers[0], answers[0]
        for answer in answers[1:]:
            largest, total = torch.maximum(largest, answer), total + answer
        out: Tensor = self.out(torch.cat([largest, total / len(answers)], 1))
        return out


class Then(nn.Module):
    """What another model says, and something done to it; or something done to the input first."""

    def __init__(self, inner: nn.Module, last: Callable[[Tensor, Tensor], Tensor], first: Any = None) -> None:
        super().__init__()
        self.inner, self.first, self.last = inner, first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x if self.first is None else self.first(x)), x)


def mlp(features: int, classes: int) -> nn.Module:
    """With running statistics and dropout."""
    middle = nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(6)
    return nn.Sequential(nn.Flatten(), Layer(features, 6), *middle, Layer(6, classes))


def beyond(x: Tensor, what: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits times `what`, which is no number to count with, where the first entry is larger than any of these."""
    most = x.flatten(1)[:, 0].max()
    return lambda z, at: torch.where(at.flatten(1)[:, :1] > most, what * z, z)


def same(z: Tensor, x: Tensor) -> Tensor:
    return z


ZOO: dict[str, Callable[[Tensor, int], nn.Module]] = {
    "linear": lambda x, k: nn.Sequential(nn.Flatten(), Layer(x[0].numel(), k)),
    "mlp": lambda x, k: mlp(x[0].numel(), k),
    "conv": lambda x, k: Conv(k),
    "tied": lambda x, k: Then(mlp(x[0].numel(), k), lambda z, _: 0 * z),
    "constant": lambda x, k: Then(mlp(x[0].numel(), k), lambda z, _: 0 * z + torch.arange(k)),
    "steps": lambda x, k: Then(mlp(x[0].numel(), k), same, lambda x: (8 * x).round() / 8),
    "quantised logits": lambda x, k: Then(mlp(x[0].numel(), k), lambda z, _: z.round()),
    "NaN": lambda x, k: Then(mlp(x[0].numel(), k), beyond(x, float("nan"))),
    "infinite": lambda x, k: Then(mlp(x[0].numel(), k), beyond(x, INFINITE)),
    "huge": lambda x, k: Then(mlp(x[0].numel(), k), lambda z, _: 1e4 * z),
    "tiny": lambda x, k: Then(mlp(x[0].numel(), k), lambda z, _: 1e-8 * z),
    "vanishing": lambda x, k: Then(mlp(x[0].numel(), k), lambda z, _: 1e-30 * z),
    "saturated": lambda x, k: Then(mlp(x[0].numel(), k), lambda z, _: 20 * (1e3 * z).tanh()),
    "no graph": lambda x, k: Then(mlp(x[0].numel(), k), lambda z, _: z.detach()),
}


# ---- cases ----------------------------------------------------------------------------------------------------------


def logit_of_label(logits: Tensor, y: Tensor) -> Tensor:
    """A loss of the user's own."""
    return -logits.gather(1, y[:, None]).squeeze(1)


def of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


few = of(1, 2, 4, 7)
several = of(1, 2, 5, 9)
norm = of("linf", "l2", "l1")
loss = of(
    losses.cross_entropy,
    losses.margin_loss,
    losses.soft_margin_loss,
    losses.probability_margin_loss,
    losses.dlr_loss,
    logit_of_label,
)
start = of("none", "uniform", "gaussian")
size = of(ScaledStep(), ScaledStep(1.0), ScaledStep(2, floor=0.1), 0.05, 0.0, 3.0)
once = {"targets": of(0, 0, 1, 3)}
runs = once | {"restarts": of(1, 1, 2, 3)}
pgd = runs | {"norm": norm, "steps": few, "step_size": size, "start": start, "loss": loss, "draws": of(1, 1, 2)}

DRAWN: tuple[tuple[type[Attack], dict[str, st.SearchStrategy[Any]]], ...] = (
    (FGSM, runs | {"norm": norm, "start": start, "step_size": size, "loss": loss}),
    (NFGSM, once | {"restarts": of(1, 2), "noise": of(0.0, 1.0, 2.0), "step_size": size, "loss": loss}),
    (PGD, pgd | {"keep": of("last", "worst", "first_flip")}),
    (MIFGSM, pgd | {"keep": of("last", "worst", "first_flip"), "decay": of(0.0, 0.5, 1.0)}),
    (EarlyStoppedPGD, pgd | {"tau": of(0, 1, 2), "omega": of(0.0, 0.05)}),
    (
        PMA,
        runs
        | {
            "norm": norm,
            "steps": few,
            "diverse": of(0, 1, 3),
            "largest": of(0.3, 2.0),
            "loss": loss,
            "draws": of(1, 2),
        },
    ),
    (APGD, runs | {"norm": norm, "steps": several, "loss": loss, "rho": of(0.0, 0.75, 1.0), "draws": of(1, 2)}),
    (APGD, runs | {"norm": of("l1"), "steps": several, "loss": loss, "large_eps": of(True)}),
    (
        FAB,
        runs
        | {"norm": norm, "steps": few, "alpha_max": of(0.0, 0.1, 1.0), "eta": of(1.0, 1.05), "beta": of(0.0, 0.9, 1.0)},
    ),
    (DDN, once | {"steps": several, "init_eps": of(0.0, 0.1, 1.0), "levels": of(None, 2, 256), "loss": loss}),
    (FMN, once | {"norm": norm, "steps": several, "step_size": of(0.0, 1.0), "gamma": of(0.0, 0.05, 1.0)}),
    (
        CarliniWagner,
        once
        | {
            "norm": of("linf", "l2"),
            "steps": several,
            "search_steps": of(1, 3),
            "learning_rate": of(0.01, 0.5),
            "initial_c": of(0.0, 1e-3, 10.0),
            "cuts": of(0, 1),
        },
    ),
    (DeepFool, runs | {"norm": norm, "steps": few, "overshoot": of(0.0, 0.02, 1.0), "candidates": of(1, 2, 10)}),
    (RandomNoise, runs | {"norm": norm, "tries": few, "loss": loss, "keep": of("worst", "first_flip")}),
    (
        Square,
        runs
        | {"norm": norm, "queries": of(1, 6, 14), "p_init": of(0.05, 0.8, 1.0), "rescaled": of(False, True)}
        | {"parallel_queries": of(1, 2, 5)},
    ),
    (Spatial, runs | {"tries": few, "loss": loss, "translation": of(0.0, 1.0)}),
    (Spatial, runs | {"search": of("grid"), "grid": of((1, 1, 1), (2, 1, 3)), "rotation": of(0.0, 30.0)}),
    (Flow, runs | {"steps": few, "step_size": size, "start": start, "tau": of(0.0, 0.05), "loss": loss}),
    (
        Wasserstein,
        runs
        | {
            "norm": of("linf", "l2"),
            "steps": of(1, 2),
            "iterations": of(1, 6),
            "order": of(0.5, 1.0, 2.0),
            "loss": loss,
        },
    ),
)
"""Kinds of attack, with what their hyper-parameters are drawn from."""
DONE = {kind for kind, _ in DRAWN}
KINDS = [*exported(norm_bounded=True), *exported(norm_bounded=False)]
ATTACKS = DRAWN + tuple(
    (kind, {"norm": of(*norms_of(kind))} | {f.name: of(FEW[f.name]) for f in fields(kind) if f.name in FEW})
    for kind in KINDS
    if kind not in DONE
)
"""All kinds that are exported."""
SHAPES = ((1,), (5,), (1, 4), (2, 3), (1, 1, 1), (2, 1, 3), (1, 3, 4), (2, 4, 3))
BOXES: tuple[Box, ...] = ((0.0, 1.0), (-1.0, 1.0), (-0.3, 0.7), (2.0, 2.5), (0.0, 255.0))
RADII = (0.0, 1e-30, 1e-8, 0.01, 0.1, 0.5, 100.0, 1e30)


@dataclass(frozen=True)
class Case:
    """An attack on a model and a batch; its repr is what a failure shows, and all that is needed to repeat it.

    Attributes:
        attack: its box included.
        zoo: the model's name in `ZOO`.
        seed: of the model's weights, the inputs and the labels.
        shape: of a sample.
        dtype: of inputs and weights.
        classes: of the model.
        rows: what kind of input each row is.
        eps: a radius for each.
        aimed: whether targets are given.
        right: whether labels are what the model predicts; else they are any.
        judge: as in the call.
        dense: whether the inputs lie in memory row after row.
        slots: of the schedule.
        parallel_restarts: runs of a row side by side in it.
    """

    attack: Attack
    zoo: str
    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    classes: int
    rows: tuple[str, ...]
    eps: tuple[float, ...]
    aimed: bool
    right: bool
    judge: bool
    dense: bool
    slots: int
    parallel_restarts: int

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    @cached_property
    def x(self) -> Tensor:
        low, high = self.attack.box if self.attack.box in BOXES else (-2.0, 2.0)
        between = self.drawn(len(self.rows), *self.shape).sigmoid()
        kinds = {
            "low": lambda row: 0 * row,
            "high": lambda row: 0 * row + 1,
            "middle": lambda row: 0 * row + 0.5,
            "random": lambda row: row,
            "edges": lambda row: (3 * row - 1).clamp(0, 1),
        }
        x = torch.stack([kinds[kind](row) for kind, row in zip(self.rows, between, strict=True)])
        x = (low + (high - low) * x).to(self.dtype).clamp(low, high)
        return x if self.dense else x.transpose(0, -1).contiguous().transpose(0, -1)

    @cached_property
    def model(self) -> Counting:
        """In train mode but for one module; one parameter takes no gradient, another has one already."""
        model = ZOO[self.zoo](self.x, self.classes)
        generator = torch.Generator().manual_seed(self.seed + 1)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                drawn = torch.randn(value.shape, generator=generator)
                value.copy_(1 + drawn.abs() if name.endswith("var") else drawn)
        modules, parameters = list(model.modules()), list(model.parameters())
        modules[-1].eval()
        parameters[0].requires_grad_(False)
        model.to(self.dtype)
        parameters[-1].grad = torch.ones_like(parameters[-1])
        return Counting(model)

    @cached_property
    def y(self) -> Tensor:
        any_class = (self.drawn(len(self.rows), 2)[:, 1].abs() * 1000).long() % self.classes
        return losses.predictions(self.asked(self.x)) if self.right else any_class

    @cached_property
    def inputs(self) -> AttackInputs:
        eps = geometry.per_sample(torch.tensor(self.eps, dtype=torch.float64), self.x)
        index = 100 + 7 * torch.arange(len(self.rows))
        target = (self.y + 1 + self.seed % 2) % self.classes if self.aimed else None
        return AttackInputs(self.x, self.y, eps, Noise(index, self.seed), target)

    def asked(self, x: Tensor) -> Tensor:
        """Logits in eval mode, without a trace."""
        with lent(self.model), torch.no_grad():
            logits: Tensor = self.model.inner(x)
        return logits

    def perturb(self, rows: list[int] | None = None) -> Adversarial:
        """Of all rows or some; an infinite radius, which a call refuses, is what an evaluation gives a inputs."""
        inputs = self.inputs if rows is None else self.inputs.rows(torch.tensor(rows))
        if inputs.eps.isinf().any():
            with lent(self.model):
                return perturb_batch(self.attack, self.model, inputs, check_success=self.judge)
        return self.attack(
            self.model,
            inputs.x,
            inputs.y,
            eps=inputs.eps,
            index=inputs.noise.index,
            target=inputs.target,
            seed=self.seed,
            check_success=self.judge,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    attack = draw(st.one_of([st.builds(kind, **options) for kind, options in ATTACKS]))
    box = draw(of(*BOXES))
    # Some refuse a box without faces: tested where they are.
    if not isinstance(attack, CarliniWagner | Spatial | Wasserstein) and getattr(attack, "levels", None) is None:
        box = draw(of(box, box, box, (-INFINITE, INFINITE)))
    attack = replace(attack, box=box)
    least = 4 if getattr(attack, "loss", None) is losses.dlr_loss else 2
    radii = (*RADII, INFINITE) if attack.minimum_norm else RADII
    seed, batch = draw(st.integers(0, 9999)), draw(of(1, 2, 3, 5, 9))
    # Not drawn one by one: of what repeats, hypothesis makes variations for most of its examples.
    chance = random.Random(seed)

    return Case(
        attack=attack,
        zoo=draw(of(*ZOO)),
        seed=seed,
        shape=draw(of(*[shape for shape in SHAPES if attack.norm_bounded or len(shape) == 3])),
        dtype=draw(of(torch.float64, torch.float64, torch.float32, torch.bfloat16)),
        classes=draw(of(*[classes for classes in (2, 3, 5, 10) if classes >= least])),
        rows=tuple(chance.choices(("random", "random", "edges", "edges", "middle", "low", "high"), k=batch)),
        eps=tuple(chance.choices(radii, k=batch)),
        aimed=draw(of(False, False, True)),
        right=draw(of(True, True, False)),
        judge=draw(of(True, True, False)),
        dense=draw(of(True, True, False)),
        slots=draw(of(1, 2, 3, 4)),
        parallel_restarts=draw(of(1, 2, 3)),
    )


# ---- contracts ------------------------------------------------------------------------------------------------------


def trace(model: nn.Module) -> list[Any]:
    """All that an attack could leave behind."""
    state = [value.clone() for value in model.state_dict().values()]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    flags = [m.training for m in model.modules()], [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return [*state, *grads, torch.tensor([*flags[0]]), torch.tensor(flags[1]), torch.random.get_rng_state()]


def assert_same(one: Adversarial, other: Adversarial, atol: float = 0) -> None:
    torch.testing.assert_close(one.x, other.x, rtol=0, atol=atol)
    assert (one.success is None) == (other.success is None)
    for name in ("success", "steps_survived", "evaluations"):
        if getattr(one, name) is not None:
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def broken(case: Case) -> Tensor:
    """Which rows an evaluation breaks, (B,) bool: by continuous batching, each ended run judged as a verdict does."""
    attack, inputs = case.attack, case.inputs
    ranked = None if case.aimed or not attack.targets else losses.likeliest(case.asked(case.x), case.y)
    found = torch.zeros_like(inputs.y, dtype=torch.bool)
    with lent(case.model):
        options = {"batch_size": case.slots, "parallel_restarts": case.parallel_restarts, "ranked": ranked}
        schedule = schedule_of(attack, case.model, inputs, case.classes, **options)
        while schedule.busy:
            for ended in schedule.step():
                part, points = inputs.rows(ended.sample), attack.result(ended.state)
                wrong = part.goal_reached(case.asked(points))
                if attack.norm_bounded:
                    wrong &= inside(part.x, points, part.eps, attack.norm, attack.box)
                found[ended.sample] |= wrong
                schedule.confirm(ended, ~wrong | part.eps.isinf())
    return found


def check(case: Case) -> None:
    """Every contract that the case has anything to say about."""
    attack, x, eps, model = case.attack, case.x, case.inputs.eps, case.model
    before, given = trace(model), [x.clone(), case.y.clone(), eps.clone()]
    if case.zoo == "no graph" and attack.needs_gradient:
        with pytest.raises(InputError, match="carries no gradient"):
            case.perturb()
        return
    found = case.perturb()
    spent = model.forwards + model.backwards - (1 if eps.isfinite().all() else 0)  # the look at one row

    # The kind of the answer.
    assert (found.x.shape, found.x.dtype, found.x.requires_grad) == (x.shape, x.dtype, False)
    assert found.success is not None or not (case.judge or attack.knows_success)
    for value, kind in (
        (found.success, torch.bool),
        (found.steps_survived, torch.int64),
        (found.evaluations, torch.int64),
    ):
        assert value is None or (value.dtype, tuple(value.shape)) == (kind, (len(x),))
    assert ((found.steps_survived >= 0) & (found.steps_survived <= found.num_iterates)).all()
    assert (found.evaluations > 0).all()
    assert found.evaluations.sum() == spent

    # Where the points lie.
    assert found.x.isfinite().all()
    assert torch.equal(found.x, found.x.clamp(*attack.box))
    assert torch.equal(found.x[eps == 0], x[eps == 0])
    if attack.norm_bounded:
        assert inside(x, found.x, eps, attack.norm, attack.box).all()

    # What is said of them.
    if found.success is not None:
        assert torch.equal(found.success, case.inputs.goal_reached(case.asked(found.x)))
        if attack.minimum_norm:
            assert torch.equal(found.x[~found.success], x[~found.success])

    # No trace, and nothing that depends on what was before or who else is there.
    for was, now in zip(before + given, [*trace(model), x, case.y, eps], strict=True):
        assert torch.equal(now, was)
    assert_same(case.perturb(), found)
    row = case.seed % len(x)
    if case.dtype == torch.float64:
        part = Adversarial(*(None if v is None else v[[row]] for v in vars(found).values()))
        assert_same(case.perturb([row]), part, atol=1e-9)

    # An evaluation breaks the same rows; what keeps the last point passes by mistakes that an evaluation stops at.
    if found.success is not None:
        seen = broken(case)
        if getattr(attack, "keep", None) == "last":
            assert (seen | ~found.success).all()
        else:
            assert torch.equal(seen, found.success)


def test_every_exported_attack_is_hunted() -> None:
    assert {kind for kind, _ in ATTACKS} == set(KINDS)


@settings(
    max_examples=int(CASES or 150),
    derandomize=CASES is None,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_no_contract_is_broken(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "found",
    [
        {
            "attack": CarliniWagner(steps=5, search_steps=1, initial_c=0.0, cuts=0),
            "zoo": "linear",
            "seed": 152,
            "shape": (5,),
            "rows": ("high", "edges", "random", "high", "low"),
            "eps": (0.5, INFINITE, 0.5, 0.0, 100.0),
        },
        {
            "attack": CarliniWagner(box=(0.0, 255.0), steps=5, search_steps=1, initial_c=10.0, cuts=1),
            "zoo": "steps",
            "seed": 298,
            "shape": (1, 4),
            "rows": ("random", "middle", "random", "random", "low"),
            "eps": (0.1, 1e30, 0.1, 0.1, 100.0),
        },
    ],
    ids=["rounding taken for progress", "a stride by a gradient of rounding"],
)
def test_what_was_broken_once_is_not_again(found: dict[str, Any]) -> None:
    rest = {"aimed": False, "right": True, "judge": True, "dense": True, "slots": 1, "parallel_restarts": 1}
    check(Case(dtype=torch.float64, classes=2, **found, **rest))
