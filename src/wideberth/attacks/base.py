"""What every attack is: immutable hyper-parameters that craft when called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.checks import Box, InputError, Norm
from wideberth.losses import Loss
from wideberth.modes import Mode, lent
from wideberth.randomness import Noise

Keep: TypeAlias = Literal["last", "worst", "first_flip"]


@dataclass(frozen=True)
class Adversarial:
    """What an attack found, one row per sample.

    Attributes:
        x: (B, ...) inside ball and box, dtype of the input, detached.
        success: (B,) bool, whether `x` is misclassified (taken for the target, if one was given); None where the
            returned point was not judged.
        steps_survived: (B,) int64, how many iterates were classified correctly before the first flip.
        evaluations: (B,) int64, forwards plus backwards spent.
        iterates: (B,) int64, how many there are to survive: the steps of all runs together.
    """

    x: Tensor
    success: Tensor | None
    steps_survived: Tensor
    evaluations: Tensor
    iterates: Tensor


def input_gradient(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], draws: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one input gradient: logits (B, K), losses (B,), gradient of each row's own loss (B, ...).

    The gradient is the caller's own, to work on in place, and holds no NaN: one has no direction, and would spread to
    the point and end the row's attack. Arguments and errors are those of `raw_gradient`.
    """
    logits, value, gradient = raw_gradient(model, x, loss, draws)
    return logits, value, gradient.nan_to_num(nan=0.0)


def raw_gradient(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], draws: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """What `input_gradient` gives, before that copy: there may be NaN in it, and the model may hold on to its memory.

    Args:
        model: maps x to logits.
        x: (B, ...) where.
        loss: of the logits, one per row.
        draws: of a randomised model: losses and gradients are means over so many passes (expectation over
            transformation, Athalye et al. 2018), the logits are those of the last.

    Raises:
        InputError: where the model's output does not depend differentiably on its input.
    """
    point = x.detach().requires_grad_()
    value, gradient = torch.zeros(()), torch.zeros(())
    for draw in range(draws):
        with torch.enable_grad():
            logits = model(point)
            values = loss(logits)
            if not values.requires_grad:
                raise InputError("the model's output carries no gradient to its input: gradient attacks cannot run")
            if values.shape != x.shape[:1]:
                came = tuple(values.shape)
                raise InputError(f"the loss returned shape {came}: must be one loss per sample, ({len(x)},)")
            # Summed, not averaged: row i of the gradient belongs to sample i alone.
            (found,) = torch.autograd.grad(values.sum(), point, materialize_grads=True)
        value = value + values.detach() if draw else values.detach()
        gradient = gradient + found if draw else found
    if draws > 1:
        value, gradient = value / draws, gradient / draws
    return logits.detach(), value, gradient


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Immutable hyper-parameters; calling it crafts. A new attack is one subclass with `num_steps`, `begin` and `step`.

    A run is a state machine that each row goes through by itself: `begin` places it, `step` asks the model once about
    every row and moves it. So rows at different stages, of different restarts and targets, can share a batch.

    Attributes:
        norm: "linf", "l2" or "l1".
        box: (low, high) that every input and every crafted point lies in.
        restarts: how many runs from starts of their own; after the first, only rows that are still unbroken run again.
        targets: aim at this many classes, the likeliest first, one run each; 0 aims at none in particular. What counts
            is a misclassification, whatever the class.
    """

    norm: Norm = "linf"
    box: Box = (0.0, 1.0)
    restarts: int = 1
    targets: int = 0

    minimum_norm: ClassVar[bool] = False
    """Whether a run looks for the smallest perturbation, and goes on after the first success."""
    needs_gradient: ClassVar[bool] = True
    norm_bounded: ClassVar[bool] = True
    """Whether eps is the radius of a ball of `norm` around the input; where not, the attack says what it is."""

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        checks.norm_name(self.norm)
        checks.valid_box(self.box)
        checks.at_least("restarts", self.restarts, 1)
        checks.at_least("targets", self.targets, 0)

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """How many steps a run takes."""

    @abstractmethod
    def init(self, inputs: AttackInputs) -> AttackState:
        """The state before the model was asked anything."""

    @abstractmethod
    def step(self, model: nn.Module, inputs: AttackInputs, state: AttackState, loss: Loss | None = None) -> AttackState:
        """Ask the model about `state.point`, take account of the answer, and choose the point to ask about next.

        Or several points of a row, where that finds the same for the same cost.

        No host synchronisation and no data-dependent shapes. `loss` overrides the attack's own.
        """

    def fitted(self, rows: int, room: int) -> Attack:
        """The same attack, as its next step is best done on so many rows where the model takes `room` points.

        What it finds, and what counts as its cost, must not depend on that; the states of both are of one kind.
        """
        del rows, room
        return self

    def result(self, state: AttackState) -> Tensor:
        """What an ended run offers to the judge, (B, ...): `kept`, or a point that was not asked about yet."""
        return state.kept

    # ---- runs: restarts and targets -----------------------------------------------------------------------------

    def runs(self, classes: int) -> list[tuple[int, int]]:
        """The runs that a sample is due, in order: (restart, which target), the latter -1 where none is aimed at."""
        ranks = range(min(self.targets, classes - 1)) if self.targets else (-1,)
        return [(restart, rank) for restart in range(self.restarts) for rank in ranks]

    def prepared(self, inputs: AttackInputs, run: Tensor, likely: Tensor | None) -> AttackInputs:
        """The problem as the rows' runs see it: with noise, and maybe a target, of their own.

        Args:
            inputs: the rows.
            run: (B,) int64, which of `runs` each row is at.
            likely: (B, K - 1) classes other than the label, the likeliest first; needed for `targets`.
        """
        noise = inputs.noise.then(run)
        if not self.targets or inputs.target is not None or likely is None:
            return replace(inputs, noise=noise)
        runs = torch.tensor(self.runs(likely.shape[1] + 1), device=run.device)
        aim = likely.gather(1, runs[run, 1:]).squeeze(1)
        return replace(inputs, noise=noise, target=aim, strict=False)

    def perturb(
        self, model: nn.Module, inputs: AttackInputs, *, loss: Loss | None = None, judge: bool = True
    ) -> Adversarial:
        """The attack itself, on a model whose mode and gradient flags are as they should be.

        With one run and `judge=False` there is a fixed number of steps, no host synchronisation and no data-dependent
        shape: this is what training calls. `loss` overrides the attack's own (an objective may ask for the loss it
        pays); it is tied to its batch (TRADES' clean logits), so with it all rows run again.
        """
        likely, runs = None, self.restarts
        if self.targets and inputs.target is None:
            with torch.no_grad():
                likely = losses.likeliest(model(inputs.x), inputs.y)
            runs = len(self.runs(likely.shape[1] + 1))
        found: AttackState | None = None
        for run in range(runs):
            left = torch.arange(len(inputs.y), device=inputs.y.device)
            if found is not None and not self.minimum_norm and loss is None:
                left = (~found.broken).nonzero().squeeze(1)
            if not len(left):
                break
            part = inputs.rows(left)
            if runs > 1 or likely is not None:
                part = self.prepared(part, torch.full_like(left, run), None if likely is None else likely[left])
            again = self.run(model, part, loss=loss, judge=judge or runs > 1)
            found = again if found is None else self._merged(found, again, left)
        assert found is not None
        judged = judge or runs > 1 or self.judges
        success = found.broken if judged else None
        spent = found.spent + (likely is not None)
        iterates = torch.full_like(found.steps_survived, runs * self.num_steps)
        return Adversarial(found.kept.detach(), success, found.steps_survived, spent, iterates)

    @property
    def judges(self) -> bool:
        """Whether a run tells success without being asked, because it needs to know itself."""
        return True

    def run(
        self, model: nn.Module, inputs: AttackInputs, *, loss: Loss | None = None, judge: bool = True
    ) -> AttackState:
        """One run of all rows, to its end."""
        del judge
        state = self.init(inputs)
        for _ in range(self.num_steps):
            state = self.step(model, inputs, state, loss)
        return state

    def _merged(self, found: AttackState, again: AttackState, left: Tensor) -> AttackState:
        """What is known after the rows `left` ran once more: the better of the two, and the cost of both."""
        before = found.rows(left)
        new = (again.broken & ~before.broken) | ((again.broken == before.broken) & self.improves(before, again))
        merged = found
        for name in ("point", "kept", "value", "broken"):
            part = getattr(again, name)
            chosen = torch.where(geometry.column(new, part), part, getattr(before, name))
            merged = replace(merged, **{name: getattr(merged, name).index_copy(0, left, chosen)})
        return replace(
            merged,
            steps_survived=found.steps_survived.index_add(0, left, again.steps_survived),
            spent=found.spent.index_add(0, left, again.spent),
        )

    def improves(self, before: AttackState, again: AttackState) -> Tensor:
        """Of two runs that both succeeded or both failed, whether the later is to be returned, (B,) bool."""
        return again.value > before.value if self.minimum_norm else torch.zeros_like(again.broken)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        eps: float | Tensor,
        index: Tensor | None = None,
        target: Tensor | None = None,
        seed: int = 0,
        judge: bool = True,
        mode: Mode = "eval",
    ) -> Adversarial:
        """Craft the worst points found within `eps` of `x`.

        Args:
            model: maps (B, ...) to logits (B, K >= 2). Its flags, gradients, buffers and the global random state are
                left as they were, except that layers attacked in train mode update statistics and draw dropout.
            x: (B, ...) floating point in the box.
            y: (B,) integer labels.
            eps: one radius, or (B,) radii; a row with radius 0 comes back bit for bit.
            index: (B,) int64 that names each row's random stream (default: its position), so that a sample meets the
                same noise in every batch.
            target: (B,) classes to be taken for, or None to be misclassified as anything.
            seed: of all randomness.
            judge: spend one more forward to tell whether the returned points succeed.
            mode: "eval", "train" or "keep".

        Raises:
            InputError: for eps, inputs, labels or logits that cannot be used.
        """
        checks.valid_inputs(x, self.box)
        checks.valid_eps(eps, len(x))
        x = x.detach()
        with lent(model, "eval"), torch.no_grad():
            # One row tells the shape of the output, and costs next to nothing.
            logits = model(x[:1])
        checks.valid_logits(logits, 1)
        checks.valid_labels(y, len(x), logits.shape[1])
        if target is not None:
            checks.valid_labels(target, len(x), logits.shape[1])
        with lent(model, mode):
            where = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
            inputs = AttackInputs(x, y, geometry.per_sample(eps, x), Noise(where, seed), target)
            return self.perturb(model, inputs, judge=judge)
