"""What the policies are given: one batch before the attack, and the points that it is trained on after the attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from wideberth import losses
from wideberth.attacks import Adversarial, Attack, AttackInputs, perturb_batch
from wideberth.checks import Box, Norm
from wideberth.losses import Loss
from wideberth.modes import Mode, lent
from wideberth.randomness import Noise


@dataclass(frozen=True)
class BatchContext:
    """One training batch, its position in the run, and the attack that perturbs it.

    Attributes:
        model: the network, in train mode.
        x: (B, ...) augmented inputs in the box.
        y: (B,) int64 labels.
        index: (B,) int64, each row's index in the data set.
        epoch: 0-based.
        progress: the epoch plus the fraction of it that is over.
        noise: one random stream per row, of this epoch.
        training_attack: the attack that perturbs the batch.
        attack_mode: the mode of the model during the attack and for `clean_logits`.
        make_attack_loss: the objective's choice of the loss that the attack maximises, see `Objective.attack_loss`.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor
    epoch: int
    progress: float
    noise: Noise
    training_attack: Attack
    attack_mode: Mode = "eval"
    make_attack_loss: Callable[[BatchContext], Loss | None] | None = None

    @property
    def norm(self) -> Norm:
        """The norm of the radii: the attack's."""
        return self.training_attack.norm

    @property
    def box(self) -> Box:
        """The box (low, high) of inputs and adversarial points: the attack's."""
        return self.training_attack.box

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits (B, K) at the clean inputs, without graph: one forward in the attack's mode, shared by all."""
        with lent(self.model, self.attack_mode), torch.no_grad():
            logits: Tensor = self.model(self.x)
        return logits

    @property
    def correct(self) -> Tensor:
        """Whether the clean input is classified correctly, (B,) bool."""
        return ~losses.misclassified(self.clean_logits, self.y)

    @cached_property
    def attack_loss(self) -> Loss | None:
        """The loss that the attack maximises; None: the attack's own."""
        return None if self.make_attack_loss is None else self.make_attack_loss(self)

    def attack(self, eps: Tensor, purpose: str = "attack", *, check_success: bool = False) -> Adversarial:
        """Run the training attack within `eps` (B,).

        Args:
            eps: (B,) radii.
            purpose: names the random streams: attacks of different purposes start at different points.
            check_success: spend one more forward to tell whether the points found are misclassified.
        """
        inputs = AttackInputs(self.x, self.y, eps, self.noise.fold(purpose), loss=self.attack_loss)
        with lent(self.model, self.attack_mode):
            return perturb_batch(self.training_attack, self.model, inputs, check_success=check_success)


@dataclass(frozen=True)
class TrainingPoints:
    """The points that a batch is trained on.

    Attributes:
        x: (B, ...) in the box; the clean inputs where no attack was made.
        found: the attack's result; None where no attack was made.
        near_boundary: (B,) bool, whether the decision boundary is within the radius policy's maximum; None for
            policies that do not search for the boundary.
    """

    x: Tensor
    found: Adversarial | None = None
    near_boundary: Tensor | None = None
