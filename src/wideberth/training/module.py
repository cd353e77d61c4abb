"""The training loop: radius, attack, objective, weighting, regularizers, step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wideberth import losses, schema
from wideberth.attacks import Attack, AttackInputs, perturb_batch
from wideberth.checks import Box, InputError
from wideberth.modes import lent
from wideberth.randomness import Noise, fold, own_generators
from wideberth.training.batch import BatchContext, TrainingPoints
from wideberth.training.early_gradient import with_gradient_taken
from wideberth.training.objectives import LossTerms
from wideberth.training.perturbation import check_perturbation, without_trace
from wideberth.training.policies import Optimization, Policies, default_validation_attack
from wideberth.training.radii import Zero
from wideberth.training.sample_state import SampleState
from wideberth.training.weightings import Uniform
from wideberth.verification import verification_mode, verify

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""x (B, ...), y (B,) int64 labels, index (B,) int64."""


class Diverged(InputError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class StepResult:
    """What a training step computed.

    Attributes:
        terms: the objective's losses and logits.
        weights: (B,) of the samples.
        penalty: (), the weighted sum of the regularizers' means.
        loss: (), the mean over the samples plus the penalty, with graph.
    """

    terms: LossTerms
    weights: Tensor
    penalty: Tensor
    loss: Tensor


class RobustTraining(L.LightningModule):
    """Any combination of radius, attack, objective, weighting and regularizers, as one `LightningModule`.

    Args:
        model: maps (B, *shape) in the box to logits (B, K).
        samples: how many rows the data set has that the training indices point into.
        policies: what is trained on, and what is minimised there (default: standard training).
        optimization: how the weights are updated (default: SGD 0.1, momentum 0.9, weight decay 5e-4).
        seed: of all randomness of the loop, also of layers that draw from the global generators, such as dropout.

    Raises:
        InputError: for policies that do not fit the model.
        Diverged: from the training step, when the loss is no longer finite.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int,
        policies: Policies | None = None,
        optimization: Optimization | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        chosen = Policies() if policies is None else policies
        self.model, self.attack, self.radius = model, chosen.attack, chosen.radius
        self.objective, self.weighting = chosen.objective, chosen.weighting
        self.regularizers, self.augment = list(chosen.regularizers), chosen.augment
        self.perturbation, self.attack_mode, self.seed = chosen.perturbation, chosen.attack_mode, seed
        self.validation_attack = chosen.validation_attack or default_validation_attack(chosen.attack)
        self.optimization = Optimization() if optimization is None else optimization
        check_perturbation(self.perturbation, model)
        self.rows = torch.arange(samples)
        self.register_buffer("visited", torch.zeros(samples, dtype=torch.bool), persistent=False)
        self.visited: Tensor
        own = ["visited"]
        for name, policy in self.named_modules():
            if isinstance(policy, SampleState):
                policy.allocate(samples)
                own += [f"{name}.{state}" for state in policy.sample_states]
        # DDP would replace these by rank 0's before every forward; `_synchronise` combines them after an epoch.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, own)  # type: ignore[no-untyped-call]
        self._first_bad_step: Tensor | None = None

    @property
    def box(self) -> Box:
        """The box that inputs and adversarial points lie in: the attack's."""
        return self.attack.box

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.model(x)
        return logits

    # ---- the loop -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute radii, attack, losses, weights and penalties of a batch; returns the loss, ()."""
        with self.own_generators("step", batch_idx, batch[0].device):
            context = self.context(batch, batch_idx)
            eps = self.radius.propose(context)
            points = self.perturb(context, eps)
            with self.perturbed_weights(context, points) as terms_before:
                result = self.compute(context, points)
                if terms_before is not None:  # the gradient is taken here, before the weights are put back
                    result = replace(result, loss=self.take_gradient(result.loss), terms=terms_before)
            self.observe(context, result.terms)
        self._watch(result.loss)
        self._log(context, points, result)
        return self.share_of_rows(context) * result.loss if self.trainer.world_size > 1 else result.loss

    def context(self, batch: Batch, batch_idx: int) -> BatchContext:
        """The batch as the policies see it, with its augmentation and random streams."""
        x, y, index = batch
        epoch = self.current_epoch
        if self.augment is not None:
            x = self.augment(x, index, seed=fold(self.seed, "augment"), epoch=epoch)
        batches = self.trainer.num_training_batches
        return BatchContext(
            self.model,
            x,
            y,
            index,
            epoch=epoch,
            progress=epoch + (batch_idx / batches if batches not in (0, float("inf")) else 0.0),
            noise=Noise(index, fold(self.seed, "training"), draw=epoch),
            training_attack=self.attack,
            attack_mode=self.attack_mode,
            make_attack_loss=self.objective.attack_loss,
        )

    def perturb(self, context: BatchContext, eps: Tensor) -> TrainingPoints:
        """The points to train on: the clean inputs where the objective or the radius policy needs no attack."""
        if not self.objective.adversarial or isinstance(self.radius, Zero):
            return TrainingPoints(context.x)
        return self.radius.adjust(context, context.attack(eps))

    def compute(self, context: BatchContext, points: TrainingPoints) -> StepResult:
        """The penalties, losses and weights of the batch, and the loss that they add up to."""
        penalty = self.penalty(context, points)  # first: its graph is freed before the objective builds its own
        terms, weights, loss = self.weighted_loss(context, points)
        return StepResult(terms, weights, penalty, loss + penalty)

    def weighted_loss(self, context: BatchContext, points: TrainingPoints) -> tuple[LossTerms, Tensor, Tensor]:
        """The objective's terms, the samples' weights (B,), and the mean of their product, ()."""
        terms = self.objective.compute(context, points)
        weights = self.weighting.compute(context, points, terms)
        return terms, weights, terms.total(weights).mean()

    def penalty(self, context: BatchContext, points: TrainingPoints) -> Tensor:
        """The weighted sum of the regularizers' means, ()."""
        total = torch.zeros((), device=context.x.device)
        for position, regularizer in enumerate(self.regularizers):
            weight = regularizer.weight_at(context.progress)
            if weight:
                x = context.x if regularizer.where == "clean" else points.x
                values = regularizer(context.model, x, context.y, context.noise.fold("regularizer", position))
                total = total + self.take_gradient(weight * values.mean())
        return total

    @contextmanager
    def perturbed_weights(self, context: BatchContext, points: TrainingPoints) -> Iterator[LossTerms | None]:
        """Move the weights as the perturbation says; gives the terms (without graph) of the weights before the move.

        Gives None where the weights are not moved.
        """
        if self.perturbation is None or context.epoch < self.perturbation.warmup:
            yield None
            return
        with without_trace(self, context.x.device):
            terms, _, loss = self.weighted_loss(context, points)
            ascent = self.perturbation.ascent(context.model, loss)
        if self.trainer.world_size > 1:  # the gradient of the whole batch, as in one process
            share = self.share_of_rows(context)
            ascent = [self.trainer.strategy.reduce(share * gradient, reduce_op="mean") for gradient in ascent]
        before = terms.detached()
        del terms, loss  # and the graph with them
        with self.perturbation.moved(context.model, ascent):
            yield before

    def observe(self, context: BatchContext, terms: LossTerms) -> None:
        """Let the radius policy learn from the logits at the adversarial points."""
        if self.radius.needs_adversary and terms.adversarial_logits is None:
            name = type(self.objective).__name__
            raise InputError(f"objective={name}: gave no adversarial logits, from which the radii are to be learned")
        if terms.adversarial_logits is not None:
            self.radius.observe(context, terms.adversarial_logits)
        self.visited[context.index] = True

    def take_gradient(self, loss: Tensor) -> Tensor:
        """The loss, (), with its gradient in all trained parameters computed now."""
        with torch.autocast(loss.device.type, enabled=False):
            return with_gradient_taken(loss, self.parameters())

    def share_of_rows(self, context: BatchContext) -> Tensor:
        """This rank's number of rows over the mean number of all ranks, ().

        DDP takes the plain mean of the ranks' gradients; with this factor it is the mean over all rows of the batch,
        also where a batch does not divide evenly.
        """
        rows = torch.tensor(float(len(context.y)), device=context.x.device)
        return rows * self.trainer.world_size / self._total(rows)

    def own_generators(self, purpose: str, batch_idx: int, device: torch.device) -> AbstractContextManager[None]:
        """Seed the global generators for the layers of the model that draw from them, keyed by epoch, step and rank.

        A resumed run repeats the draws of the run before it. The caller's generators are restored afterwards.
        """
        seed = fold(self.seed, purpose, self.current_epoch, batch_idx, self.trainer.global_rank)
        return own_generators(seed, device)

    # ---- around it ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log clean accuracy, and accuracy under the validation attack at the policy's `eval_eps`."""
        x, y, index = batch
        # Lightning validates in inference mode, where no input gradient can be taken.
        generators = self.own_generators("validation step", batch_idx, x.device)
        with torch.inference_mode(False), lent(self.model), generators:
            x, y = x.clone(), y.clone()
            with torch.no_grad():
                clean = ~losses.misclassified(self.model(x), y)
            robust = None
            if self.radius.eval_eps():  # without a radius no accuracy is called robust
                noise = Noise(index.clone(), fold(self.seed, "validation"))
                robust = self.robust_to(self.validation_attack, x, y, noise)
        values = {"validation_clean": clean.float().mean()}
        if robust is not None:
            values["validation_robust"] = (clean & robust).float().mean()
        self.log_dict(values, prog_bar=True, **_epoch_mean(len(y)))

    def robust_to(self, attack: Attack, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Whether `attack` fails on each sample at the policy's `eval_eps`, (B,) bool; its points are verified."""
        eps = torch.full((len(y),), self.radius.eval_eps(), device=x.device)
        with lent(self.model):
            found = perturb_batch(attack, self.model, AttackInputs(x, y, eps, noise), check_success=False).x
        if attack.norm_bounded:
            return ~verify(self.model, x, y, found, eps, attack.norm, attack.box)
        with verification_mode(self.model, x):
            return ~losses.misclassified(self.model(found), y)

    def configure_optimizers(self) -> Any:
        """Make optimizer and schedule; parameters that an objective trains beside the model are included."""
        how = self.optimization
        optimizer = how.optimizer(self.parameters())
        if how.scheduler is None:
            return optimizer
        schedule = {"scheduler": how.scheduler(optimizer), "interval": how.scheduler_interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which version wrote the checkpoint."""
        checkpoint[schema.KEY] = schema.VERSION

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of a newer version (`InputError`)."""
        schema.check_version(checkpoint, "the checkpoint")

    def on_fit_start(self) -> None:
        """Refuse a precision in which the weights cannot be perturbed (`InputError`); set the train mode."""
        check_perturbation(self.perturbation, self.model, self.trainer.precision)
        for part in (self.model, self.objective):
            # `load_model` gives models in eval mode. If any module is in train mode, the others are frozen on purpose.
            if isinstance(part, nn.Module) and not any(module.training for module in part.modules()):
                part.train()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an epoch's last batch, combine what the ranks learned about the samples."""
        if self.trainer.is_last_batch:
            self._synchronise()

    def on_train_epoch_end(self) -> None:
        """Stop on a loss that was not finite, before a checkpoint is written."""
        self._synchronise()  # once more, for an epoch that was ended before its last batch (`max_steps`)
        self.refuse_bad_steps()

    def _synchronise(self) -> None:
        """Give every rank the sample states that the others changed in this epoch, for every policy that has some."""
        if self.trainer.world_size > 1:
            for policy in self.modules():
                if isinstance(policy, SampleState):
                    policy.synchronise(self.visited, self._total)
        self.visited.zero_()

    def _total(self, value: Tensor) -> Tensor:
        """The sum over the ranks; `value` is not changed."""
        total = self.trainer.strategy.reduce(value.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _watch(self, loss: Tensor) -> None:
        """Remember, on the device, the first step whose loss was not finite; read it on the host now and then."""
        step = torch.full((), self.global_step, device=loss.device)
        bad = torch.where(torch.isfinite(loss.detach()), -1, step)
        known = bad if self._first_bad_step is None else self._first_bad_step
        self._first_bad_step = torch.where(known >= 0, known, bad)
        if loss.device.type == "cpu" or self.global_step % 50 == 49:
            self.refuse_bad_steps()

    def refuse_bad_steps(self) -> None:
        """Raise `Diverged` where the loss of a step was not finite."""
        if self._first_bad_step is not None and int(self._first_bad_step) >= 0:
            raise Diverged(
                f"the loss is not finite at step {int(self._first_bad_step)} (epoch {self.current_epoch}): stopped; "
                "the last good checkpoint is kept. Try a smaller learning rate or gradient_clip_val"
            )

    def _log(self, context: BatchContext, points: TrainingPoints, result: StepResult) -> None:
        values = {"loss": result.loss.detach(), "penalty": result.penalty.detach()}
        if not isinstance(self.weighting, Uniform):
            values["weight_mean"] = result.weights.detach().float().mean()
        # Without an attack, the logits at the points of training are those at the clean inputs.
        adversarial = "accuracy_clean" if points.found is None else "accuracy_adversarial"
        terms = result.terms
        for name, logits in ((adversarial, terms.adversarial_logits), ("accuracy_clean", terms.clean_logits)):
            if logits is not None:
                values[name] = 1 - losses.misclassified(logits.detach(), context.y).float().mean()
        self.log_dict(values, **_epoch_mean(len(context.y)))
        self.log("loss_now", values["loss"], prog_bar=True, on_step=True, on_epoch=False)


def _epoch_mean(rows: int) -> dict[str, Any]:
    """Options of `log_dict` for a mean over all rows of an epoch and all ranks."""
    # A float: Lightning rounds the mean of the ranks' numbers of rows down to an integer.
    return {"on_step": False, "on_epoch": True, "batch_size": float(rows), "sync_dist": True}
