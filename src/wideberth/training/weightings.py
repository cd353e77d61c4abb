"""Weightings: how much each sample counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from wideberth.training.objectives import Payment
from wideberth.training.step import Step


class Weighting(ABC):
    """How much each sample counts; a new weighting is one subclass with a `weigh`."""

    @abstractmethod
    def weigh(self, step: Step, payment: Payment) -> Tensor:
        """The weight of each sample's loss, (B,), detached."""


@dataclass(frozen=True)
class Uniform(Weighting):
    """Every sample counts the same."""

    def weigh(self, step: Step, payment: Payment) -> Tensor:
        """Ones, (B,)."""
        return torch.ones_like(payment.losses)
