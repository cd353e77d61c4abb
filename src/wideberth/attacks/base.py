"""What an attack is: hyper-parameters, and one algorithm as three functions of inputs and state.

`init`, `update` and `result` treat every row by itself, as an optimiser's init and update treat parameters. They know
nothing of restarts, of when a row is finished or of who checks its result. Two drivers know that: `drivers` runs a
fixed number of steps, for training and for a call; `schedule` keeps an evaluation's batches full. The drivers ask an
attack for nothing but these functions and the traits that its class declares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from wideberth import checks, geometry
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.checks import Box, Norm
from wideberth.gradients import input_gradient as input_gradient
from wideberth.gradients import raw_input_gradient as raw_input_gradient
from wideberth.modes import Mode, lent
from wideberth.randomness import Noise

Keep: TypeAlias = Literal["last", "worst", "first_flip"]
S = TypeVar("S", bound=AttackState, default=Any)


@dataclass(frozen=True)
class Adversarial:
    """What an attack found, one row per sample.

    Attributes:
        x: (B, ...) inside ball and box, dtype of the input, detached.
        success: (B,) bool, whether `x` is misclassified (predicted as the target, if one was given); None where the
            returned point was not checked.
        steps_survived: (B,) int64, points that were classified correctly before the first that was not.
        evaluations: (B,) int64, forwards plus backwards spent.
        num_iterates: (B,) int64, how many points there are to survive: the steps of all restarts together.
    """

    x: Tensor
    success: Tensor | None
    steps_survived: Tensor
    evaluations: Tensor
    num_iterates: Tensor


@dataclass(frozen=True, kw_only=True)
class Attack(ABC, Generic[S]):
    """An attack on norm balls; a new one is one subclass with `num_steps`, `init` and `update`.

    Attributes:
        norm: "linf", "l2" or "l1".
        box: (low, high) that every input and every adversarial point lies in.
        restarts: how many runs from different starts; after the first, only rows without a success run again.
        targets: aim at so many other classes, the likeliest first, once per restart; 0 aims at none. A
            misclassification as any class is a success.
    """

    norm: Norm = "linf"
    box: Box = (0.0, 1.0)
    restarts: int = 1
    targets: int = 0

    minimum_norm: ClassVar[bool] = False
    """Whether it looks for the smallest perturbation, and goes on after the first success."""
    needs_gradient: ClassVar[bool] = True
    """Whether it differentiates the model."""
    norm_bounded: ClassVar[bool] = True
    """Whether eps is the radius of a ball of `norm` around the input; where not, the attack says what it is."""
    ends_early: ClassVar[bool] = False
    """Whether a row may be finished before `num_steps` updates; its `iteration` then stands at `num_steps`."""

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        checks.norm_name(self.norm)
        checks.valid_box(self.box)
        checks.at_least("restarts", self.restarts, 1)
        checks.at_least("targets", self.targets, 0)

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """How many updates one restart takes."""

    @abstractmethod
    def init(self, inputs: AttackInputs) -> S:
        """The state before the first query of the model."""

    @abstractmethod
    def update(self, model: nn.Module, inputs: AttackInputs, state: S) -> S:
        """Query the model at `state.point`, record what it returns, and choose the next point.

        Row i of the result depends on row i of the arguments alone. On a GPU there is no host synchronisation and no
        data-dependent shape.
        """

    def result(self, state: S) -> Tensor:
        """The point that the attack returns from this state, (B, ...)."""
        return state.best

    @property
    def knows_success(self) -> bool:
        """Whether the last state tells which rows are a success, without a further forward."""
        return True

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
        check_success: bool = True,
        mode: Mode = "eval",
    ) -> Adversarial:
        """Perturb a batch: find the worst point within `eps` of each row of `x`.

        Args:
            model: maps (B, ...) to logits (B, K >= 2). Its flags, gradients, buffers and the global random state are
                left as they were, except that layers attacked in train mode update statistics and draw dropout.
            x: (B, ...) floating point in the box.
            y: (B,) int64 labels.
            eps: one radius, or (B,) radii; a row with radius 0 comes back bit for bit.
            index: (B,) int64 that names each row's random stream (default: its position), so that a sample meets the
                same noise in every batch.
            target: (B,) int64 classes to be predicted, or None for any misclassification.
            seed: of all randomness.
            check_success: spend one more forward, where needed, to tell whether the returned points are a success.
            mode: of the model during the attack: "eval", "train" or "keep".

        Raises:
            InputError: for eps, inputs, labels or logits that cannot be used.
        """
        from wideberth.attacks.drivers import perturb_batch  # a driver knows attacks, and not the other way round

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
            names = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
            inputs = AttackInputs(x, y, geometry.per_sample(eps, x), Noise(names, seed), target)
            return perturb_batch(self, model, inputs, check_success=check_success)


class Query(NamedTuple):
    """What the model returned at a point.

    Attributes:
        logits: (B, K).
        loss: (B,).
        gradient: (B, ...) of the loss, raw: it may hold NaN, and its memory may be the model's own. Empty where none
            was asked for.
        cost: forwards plus backwards.
    """

    logits: Tensor
    loss: Tensor
    gradient: Tensor
    cost: int


@dataclass(frozen=True, kw_only=True)
class SteppedAttack(Attack[S]):
    """An attack whose update has three parts: query the model, record what it returned, move on.

    Where no move depends on what was recorded, a driver may leave the record to the end. The last move is not followed
    by a query: whether the point it leads to is a success takes one more forward, which is optional.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a subclass that replaces `update`, since a driver may call its parts instead."""
        super().__init_subclass__(**options)
        if "update" in vars(cls):
            raise TypeError(f"{cls.__name__}.update: override query, record or move, or subclass Attack")

    @abstractmethod
    def query(self, model: nn.Module, inputs: AttackInputs, state: S) -> Query:
        """Logits, loss and gradient at `state.point`."""

    @abstractmethod
    def check(self, model: nn.Module, inputs: AttackInputs, state: S) -> Query:
        """Logits and loss at `state.point`, without a gradient."""

    @abstractmethod
    def record(self, inputs: AttackInputs, state: S, query: Query) -> S:
        """The state with this query counted and its point compared with the best so far."""

    @abstractmethod
    def move(self, inputs: AttackInputs, state: S, query: Query) -> S:
        """The state with the next point; `state.iteration` is one higher than at the query."""

    @final
    def update(self, model: nn.Module, inputs: AttackInputs, state: S) -> S:
        """Query, record, move."""
        query = self.query(model, inputs, state)
        return self.move(inputs, self.record(inputs, state, query), query)

    def result(self, state: S) -> Tensor:
        """The best point where that is a success, else the point that the last move led to."""
        return geometry.choose(state.adversarial, state.best, state.point)
