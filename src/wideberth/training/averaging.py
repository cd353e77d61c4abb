"""Averaging of the weights: one set is trained, and the average over training is validated and exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from wideberth import checks
from wideberth.training.module import RobustTraining


class Averaging(L.Callback, ABC):
    """Keeps the average of the model's weights; a new one is one subclass with `share` and `due`.

    While batches are trained on, the model holds the trained weights. From the last batch of an epoch to the first of
    the next (and whenever it is validated) it holds the average, so that held-out scores, checkpoints and the exported
    weights are all the average's. The trained weights, with which a resumed run continues, are in the checkpoint too.
    Buffers of the model (batch-norm statistics) are averaged as weights are, integers are copied; what policies
    remember about the samples is not part of the model and is not averaged.
    """

    begins = 0
    """The first epoch (0-based) that is averaged."""

    def __init__(self) -> None:
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] | None = None  # put aside while the model holds the average
        self._step = 0

    @abstractmethod
    def share(self, updates: int) -> float:
        """The share of the weights now in the new average, after so many updates."""

    @abstractmethod
    def due(self, epoch: int, *, stepped: bool, last: bool) -> bool:
        """Whether to update after a batch; `stepped`: the optimizer did, `last`: the epoch ends with it."""

    def refresh(self, trainer: L.Trainer, module: RobustTraining) -> None:
        """Complete a new average at the end of an epoch, while the model holds it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset what an earlier run left."""
        self.updates, self.average, self.trained, self._step = 0, {}, None, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the weights as they are, or go on with a resumed run's average."""
        state = tensors(pl_module)
        if not self.average:
            # In float32 at least: a small share of a weight is lost in half precision.
            self.average = {name: value.to(_wide(value), copy=True) for name, value in state.items()}
        self.average = {name: value.to(state[name].device) for name, value in self.average.items()}
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the trained weights back into the model."""
        if self.trained is not None:
            _fill(pl_module, self.trained)
            self.trained = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average; after an epoch's last batch, put it in place."""
        assert isinstance(pl_module, RobustTraining)
        stepped, last = trainer.global_step != self._step, trainer.is_last_batch
        self._step = trainer.global_step
        if due := self.due(trainer.current_epoch, stepped=stepped, last=last):
            self._update(pl_module)
        if last:
            self._put_in_place(pl_module)
            if due:
                self.refresh(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in place, if the epoch was ended before its last batch (`max_steps`)."""
        self._put_in_place(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in place, if validation comes before the end of an epoch."""
        if trainer.training or trainer.validating:
            with torch.inference_mode(False):
                self._put_in_place(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The average in its own precision, and the trained weights where the model holds the average."""
        return {"updates": self.updates, "average": self.average, "trained": self.trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.updates, self.average = state_dict["updates"], state_dict["average"]
        self.trained = state_dict["trained"]

    def _update(self, module: L.LightningModule) -> None:
        share = self.share(self.updates)
        self.updates += 1
        for name, value in tensors(module).items():
            if value.is_floating_point():
                self.average[name].lerp_(value.to(self.average[name].dtype), share)
            else:
                self.average[name].copy_(value)

    def _put_in_place(self, module: L.LightningModule) -> None:
        if self.trained is None and self.updates:
            self.trained = {name: value.clone() for name, value in tensors(module).items()}
            _fill(module, self.average)


class EMA(Averaging):
    """Exponential moving average of the weights over the steps (Gowal et al. 2020).

    After step t, counted from 0, the average keeps the share d = min(decay, (1 + t) / (10 + t)) of itself.

    Args:
        decay: of the average, in [0, 1): 0.995 in the paper.

    What we do differently: nothing in the average; batch-norm statistics are averaged at the same rate.
    """

    def __init__(self, decay: float = 0.995) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise checks.InputError(f"decay={decay}: must be in [0, 1); at 1 the average would never move")
        self.decay = decay

    def share(self, updates: int) -> float:
        """1 - d."""
        return 1 - min(self.decay, (1 + updates) / (10 + updates))

    def due(self, epoch: int, *, stepped: bool, last: bool) -> bool:
        """After every step of the optimizer."""
        return stepped


class SWA(Averaging):
    """Stochastic weight averaging: the plain mean of the weights at the ends of epochs (Izmailov et al. 2018).

    On top of adversarial training, from the first drop of the learning rate on, Chen et al. 2021.

    Args:
        start: the first epoch (0-based) whose end counts.

    Batch-norm statistics are those of the average itself: after each update one pass over the training inputs, clean
    and augmented, in train mode. Adversarial inputs would cost another attack on everything, after every epoch.

    What we do differently: statistics are refreshed after every epoch, and not once at the end, because the average is
    validated on held-out data and may be exported.
    """

    def __init__(self, start: int) -> None:
        super().__init__()
        checks.at_least("start", start, 0)
        self.start = self.begins = start

    def share(self, updates: int) -> float:
        """1 / (n + 1)."""
        return 1 / (updates + 1)

    def due(self, epoch: int, *, stepped: bool, last: bool) -> bool:
        """At the ends of epochs, from `start` on."""
        return last and epoch >= self.start

    def refresh(self, trainer: L.Trainer, module: RobustTraining) -> None:
        """Recompute the statistics of every batch norm in train mode: plain means over one epoch's batches."""
        norms = [
            m for m in module.model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
        ]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        try:
            for place, batch in enumerate(trainer.train_dataloader or ()):
                if place >= trainer.num_training_batches:
                    break
                batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                generators = module.own_generators("statistics", place, module.device)
                with torch.no_grad(), trainer.precision_plugin.forward_context(), generators:
                    module.model(module.context(batch, place).x)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        state = tensors(module)
        for name in dict(module.model.named_buffers()).keys() & self.average.keys():
            self.average[name].copy_(state[name])


def tensors(module: L.LightningModule) -> dict[str, Tensor]:
    """The tensors that are averaged, by name: weights and buffers of the model, without the policies' state."""
    assert isinstance(module, RobustTraining)
    return {name: value for name, value in module.model.state_dict().items() if isinstance(value, Tensor)}


def _fill(module: L.LightningModule, values: dict[str, Tensor]) -> None:
    for name, value in tensors(module).items():
        value.copy_(values[name])


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
