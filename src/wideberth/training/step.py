"""One batch on its way through the flow, as the policies see it."""

from __future__ import annotations

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


@dataclass
class Step:
    """One training batch: what it holds, when it is, and what may be asked about it.

    Attributes:
        model: the network, in train mode.
        x: (B, ...) augmented inputs in the box.
        y: (B,) int64 labels.
        index: (B,) int64, each row's place in the data set.
        epoch: 0-based; `progress` adds the fraction of the epoch that is over.
        noise: one random stream per row, of this epoch.
        attack_mode: the mode in which the model is attacked and its clean prediction read.
        training_attack: what perturbs the batch; its norm is that of the radii.
        norm: its norm, which is that of the radii.
        box: (low, high) that inputs and adversarial points lie in.
        attack_loss: what it ascends; None: its own loss.
        found: what the attack found that the batch is trained on; None where nothing was attacked.
        near: (B,) bool, whether a boundary was found near enough to be trained on, for policies that look for one.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor
    epoch: int
    progress: float
    noise: Noise
    attack_mode: Mode
    training_attack: Attack
    norm: Norm = "linf"
    box: Box = (0.0, 1.0)
    attack_loss: Loss | None = None
    found: Adversarial | None = None
    near: Tensor | None = None

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits (B, K) on the clean inputs in the attack's mode, without gradient: one forward, shared by all."""
        with lent(self.model, self.attack_mode), torch.no_grad():
            logits: Tensor = self.model(self.x)
        return logits

    @property
    def correct(self) -> Tensor:
        """Whether the clean input is classified correctly, (B,) bool."""
        return ~losses.misclassified(self.clean_logits, self.y)

    def attack(self, eps: Tensor, purpose: str = "attack", *, check_success: bool = False) -> Adversarial:
        """The training attack within `eps` (B,), on noise of its own for each purpose."""
        noise = self.noise.fold(purpose)
        inputs = AttackInputs(self.x, self.y, eps, noise, loss=self.attack_loss)
        with lent(self.model, self.attack_mode):
            return perturb_batch(self.training_attack, self.model, inputs, check_success=check_success)
