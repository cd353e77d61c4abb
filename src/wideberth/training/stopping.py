"""Reasons to stop before the last epoch, beside patience."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from wideberth import checks
from wideberth.attacks import PGD
from wideberth.checks import InputError
from wideberth.training.module import Batch, RobustTraining
from wideberth.training.policies import within_norm


class OverfittingGuard(L.Callback):
    """Stops training when robustness breaks down from one epoch to the next (Wong, Rice and Kolter 2020).

    A model trained with one attack step may suddenly become robust to that step and to nothing else. Therefore PGD, in
    the training attack's norm at the policy's `eval_eps`, attacks the first training batch of each epoch after it.

    Args:
        drop: how much robust accuracy may fall within an epoch, as a share of the batch, in [0, 1].
        steps: of the attack.

    That epoch is not kept: the weights of the one before are the run's last. With weight averaging, the average is
    attacked.

    What we do differently: a point counts as adversarial where any step flipped it.
    """

    def __init__(self, drop: float = 0.2, steps: int = 5) -> None:
        checks.share("drop", drop)
        checks.at_least("steps", steps, 1)
        self.drop, self.steps = drop, steps
        self.before: float | None = None
        self.reason: str | None = None
        self._batch: Batch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset what an earlier run left."""
        self.before, self.reason, self._batch = None, None, None

    def state_dict(self) -> dict[str, Any]:
        """The accuracy after the last epoch."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the accuracy after the last epoch."""
        self.before = state_dict["before"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the epoch's first batch."""
        if batch_idx == 0:
            self._batch = batch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attack it; stop on a fall."""
        assert isinstance(pl_module, RobustTraining)
        if self._batch is None:  # resumed at the end of an epoch
            return
        robust = self._robust(pl_module, self._batch).float()
        counts = torch.stack([robust.sum(), torch.full_like(robust.sum(), len(robust))])
        total = trainer.strategy.reduce(counts, reduce_op="sum")
        now = float(total[0] / total[1])
        pl_module.log("guard_robust", now)
        if self.before is not None and self.before - now > self.drop:
            self.reason = (
                f"robust accuracy on the first batch fell from {self.before:.0%} to {now:.0%} in epoch "
                f"{trainer.current_epoch + 1}: training stops, and that epoch is not kept"
            )
            trainer.should_stop = True
        self.before = now

    def _robust(self, module: RobustTraining, batch: Batch) -> Tensor:
        context = module.context(batch, 0)
        attack = PGD(norm=module.attack.norm, box=module.box, steps=self.steps, keep="first_flip")
        with module.own_generators("guard", 0, context.x.device):
            return module.robust_to(attack, context.x, context.y, context.noise.fold("guard"))


def check_guard(guard: OverfittingGuard | None, module: RobustTraining) -> None:
    """Refuse a guard where there is no norm ball to attack in (`InputError`)."""
    if guard is None:
        return
    if not module.radius.eval_eps():
        raise InputError(f"guard with radius={type(module.radius).__name__}: without a radius nothing is robust")
    if not within_norm(module.attack):
        raise InputError(f"guard with attack={type(module.attack).__name__}: its radius is not that of a norm")
