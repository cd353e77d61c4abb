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
    """The loss became NaN or infinite; no checkpoint was written after that step, earlier ones are kept."""


@dataclass(frozen=True)
class StepResult:
    """The results of one training step on a batch.

    Attributes:
        terms: the losses and logits that the objective computed.
        weights: (B,) the weight of each sample in the mean loss.
        penalty: (), the sum over the regularizers of weight times mean value.
        loss: (), the weighted mean loss of the samples plus the penalty, with graph.
    """

    terms: LossTerms
    weights: Tensor
    penalty: Tensor
    loss: Tensor


class RobustTraining(L.LightningModule):
    """A `LightningModule` that trains with any combination of radius, attack, objective, weighting and regularizers.

    Args:
        model: maps inputs (B, *shape) in the box to logits (B, K).
        samples: the number of rows of the data set. The indices in the batches are below it.
        policies: the training points and the loss (default: standard training).
        optimization: the optimizer and the learning-rate schedule (default: SGD with learning rate 0.1, momentum 0.9
            and weight decay 5e-4).
        seed: the seed of all randomness of the loop, including layers that draw from the global generators, such as
            dropout.

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
        # The rows of the data set that are trained on; a training job excludes the rows that are held out.
        self.rows = torch.arange(samples)
        # The samples that this rank has trained on since the ranks last exchanged their sample states.
        self.register_buffer("visited", torch.zeros(samples, dtype=torch.bool), persistent=False)
        self.visited: Tensor
        not_broadcast = ["visited"]
        for name, policy in self.named_modules():
            if isinstance(policy, SampleState):
                policy.allocate(samples)
                not_broadcast += [f"{name}.{state}" for state in policy.sample_states]
        # DDP would overwrite these buffers with those of rank 0 before every forward. `_synchronise` combines them
        # after each epoch instead.
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(self, not_broadcast)
        self._first_bad_step: Tensor | None = None

    @property
    def box(self) -> Box:
        """The box (low, high) of the attack; it contains all inputs and adversarial points."""
        return self.attack.box

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of inputs (B, ...)."""
        logits: Tensor = self.model(x)
        return logits

    # ---- training steps -------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute radii, adversarial points, losses, weights and penalties of a batch; return the loss, ()."""
        with self.own_generators("step", batch_idx, batch[0].device):
            context = self.context(batch, batch_idx)
            eps = self.radius.propose(context)
            points = self.perturb(context, eps)
            with self.perturbed_weights(context, points) as unperturbed_terms:
                result = self.compute(context, points)
                if unperturbed_terms is not None:
                    # The gradient must be computed at the perturbed weights, before they are restored. Radii and logs
                    # use the losses and logits of the weights before the perturbation.
                    result = replace(result, loss=self.take_gradient(result.loss), terms=unperturbed_terms)
            self.observe(context, result.terms)
        self._watch(result.loss)
        self._log(context, points, result)
        return self.row_weight(context) * result.loss if self.trainer.world_size > 1 else result.loss

    def context(self, batch: Batch, batch_idx: int) -> BatchContext:
        """Augment a batch, and return the `BatchContext` that the policies receive."""
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
        """Attack the batch within `eps` (B,), and return the points to train on.

        They are the clean inputs if the objective uses no adversarial points or the radius policy is `Zero`.
        """
        if not self.objective.adversarial or isinstance(self.radius, Zero):
            return TrainingPoints(context.x)
        return self.radius.adjust(context, context.attack(eps))

    def compute(self, context: BatchContext, points: TrainingPoints) -> StepResult:
        """Compute penalty, losses and weights of the batch, and the total loss."""
        penalty = self.penalty(context, points)  # first, so that its graph is freed before the objective builds its own
        terms, weights, loss = self.weighted_loss(context, points)
        return StepResult(terms, weights, penalty, loss + penalty)

    def weighted_loss(self, context: BatchContext, points: TrainingPoints) -> tuple[LossTerms, Tensor, Tensor]:
        """Compute the loss of the batch without penalties.

        Returns:
            The objective's terms, the weights of the samples (B,), and the mean over the samples of the weighted loss
            (plus the term that no weighting changes, if the objective has one), ().
        """
        terms = self.objective.compute(context, points)
        weights = self.weighting.compute(context, points, terms)
        return terms, weights, terms.total(weights).mean()

    def penalty(self, context: BatchContext, points: TrainingPoints) -> Tensor:
        """Return the sum over the regularizers of weight times mean value, ()."""
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
        """Perturb the weights of the model inside the `with` block, and restore them after it.

        Yields:
            The objective's terms at the weights before the perturbation, without graph; None if the weights are not
            perturbed, because there is no perturbation or it has not begun yet.
        """
        if self.perturbation is None or context.epoch < self.perturbation.warmup:
            yield None
            return
        with without_trace(self, context.x.device):
            terms, _, loss = self.weighted_loss(context, points)
            ascent = self.perturbation.ascent(context.model, loss)
        if self.trainer.world_size > 1:
            # All ranks must perturb the weights alike: along the gradient of the whole batch, as one process would.
            weight = self.row_weight(context)
            ascent = [self.trainer.strategy.reduce(weight * gradient, reduce_op="mean") for gradient in ascent]
        unperturbed_terms = terms.detached()
        del terms, loss  # frees their graph
        with self.perturbation.moved(context.model, ascent):
            yield unperturbed_terms

    def observe(self, context: BatchContext, terms: LossTerms) -> None:
        """Pass the logits at the adversarial points to the radius policy, and mark the samples as visited.

        Raises:
            InputError: if the radius policy needs these logits and the objective did not compute them.
        """
        if self.radius.needs_adversary and terms.adversarial_logits is None:
            name = type(self.objective).__name__
            raise InputError(f"objective={name}: it returned no adversarial logits, which the radius policy needs")
        if terms.adversarial_logits is not None:
            self.radius.observe(context, terms.adversarial_logits)
        self.visited[context.index] = True

    def take_gradient(self, loss: Tensor) -> Tensor:
        """Compute the gradient of `loss`, (), in all trained parameters now, and free its graph.

        Returns:
            A tensor, (), with the value of `loss`. Its backward adds the gradient that was computed here.
        """
        with torch.autocast(loss.device.type, enabled=False):
            return with_gradient_taken(loss, self.parameters())

    def row_weight(self, context: BatchContext) -> Tensor:
        """Return the number of rows on this rank divided by the mean number of rows per rank, ().

        DDP averages the gradients of the ranks with equal weights. With this factor the result is the mean over all
        rows of the batch, even if the ranks have different numbers of rows.
        """
        rows = torch.tensor(float(len(context.y)), device=context.x.device)
        return rows * self.trainer.world_size / self._total(rows)

    def own_generators(self, purpose: str, batch_idx: int, device: torch.device) -> AbstractContextManager[None]:
        """Seed the global generators for the layers of the model that draw from them, keyed by epoch, step and rank.

        A resumed run repeats the draws of the run before it. The caller's generators are restored afterwards.
        """
        seed = fold(self.seed, purpose, self.current_epoch, batch_idx, self.trainer.global_rank)
        return own_generators(seed, device)

    # ---- validation, checkpoints, ranks and logs --------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the clean accuracy, and the accuracy under the validation attack at the policy's `eval_eps`."""
        x, y, index = batch
        # Lightning validates in inference mode, in which input gradients cannot be computed.
        generators = self.own_generators("validation step", batch_idx, x.device)
        with torch.inference_mode(False), lent(self.model), generators:
            x, y = x.clone(), y.clone()
            with torch.no_grad():
                clean = ~losses.misclassified(self.model(x), y)
            robust = None
            if self.radius.eval_eps():  # at radius 0, robust accuracy is not logged
                noise = Noise(index.clone(), fold(self.seed, "validation"))
                robust = self.robust_to(self.validation_attack, x, y, noise)
        values = {"validation_clean": clean.float().mean()}
        if robust is not None:
            values["validation_robust"] = (clean & robust).float().mean()
        self.log_dict(values, prog_bar=True, **_epoch_mean(len(y)))

    def robust_to(self, attack: Attack, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Attack each sample at the policy's `eval_eps`; return on which samples the attack fails, (B,) bool."""
        eps = torch.full((len(y),), self.radius.eval_eps(), device=x.device)
        with lent(self.model):
            found = perturb_batch(attack, self.model, AttackInputs(x, y, eps, noise), check_success=False).x
        if attack.norm_bounded:
            # A point counts only if it is in the ball, in the box and misclassified.
            return ~verify(self.model, x, y, found, eps, attack.norm, attack.box)
        # The attack has no norm ball to check: a point counts if it is misclassified.
        with verification_mode(self.model, x):
            return ~losses.misclassified(self.model(found), y)

    def configure_optimizers(self) -> Any:
        """Create the optimizer and the schedule, for the parameters of the model and of the objective."""
        how = self.optimization
        optimizer = how.optimizer(self.parameters())
        if how.scheduler is None:
            return optimizer
        schedule = {"scheduler": how.scheduler(optimizer), "interval": how.scheduler_interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the schema version into the checkpoint."""
        checkpoint[schema.KEY] = schema.VERSION

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise `InputError` if a newer version wrote the checkpoint."""
        schema.check_version(checkpoint, "the checkpoint")

    def on_fit_start(self) -> None:
        """Set model and objective to train mode, unless some of their modules are in train mode already.

        Raises:
            InputError: if the weights cannot be perturbed in the trainer's precision.
        """
        check_perturbation(self.perturbation, self.model, self.trainer.precision)
        for part in (self.model, self.objective):
            # `load_model` returns models in eval mode. If some module is in train mode, the caller has chosen eval mode
            # for the others on purpose.
            if isinstance(part, nn.Module) and not any(module.training for module in part.modules()):
                part.train()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Exchange the sample states between the ranks after the last batch of an epoch."""
        if self.trainer.is_last_batch:
            self._synchronise()

    def on_train_epoch_end(self) -> None:
        """Raise `Diverged` if a loss of the epoch was not finite, before a checkpoint is written."""
        self._synchronise()  # again, because `max_steps` may end an epoch before its last batch
        self.refuse_bad_steps()

    def _synchronise(self) -> None:
        """Copy the sample states that each rank has changed to all ranks, and reset `visited`."""
        if self.trainer.world_size > 1:
            for policy in self.modules():
                if isinstance(policy, SampleState):
                    policy.synchronise(self.visited, self._total)
        self.visited.zero_()

    def _total(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over the ranks; `value` is not changed."""
        total = self.trainer.strategy.reduce(value.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _watch(self, loss: Tensor) -> None:
        """Remember the first step whose loss was not finite, and raise `Diverged` if there is one.

        The step is kept on the device. On a GPU it is read only every 50 steps, since that is a host synchronisation.
        """
        step = torch.full((), self.global_step, device=loss.device)
        bad = torch.where(torch.isfinite(loss.detach()), -1, step)
        known = bad if self._first_bad_step is None else self._first_bad_step
        self._first_bad_step = torch.where(known >= 0, known, bad)
        if loss.device.type == "cpu" or self.global_step % 50 == 49:
            self.refuse_bad_steps()

    def refuse_bad_steps(self) -> None:
        """Raise `Diverged` if the loss of a step was not finite."""
        if self._first_bad_step is not None and int(self._first_bad_step) >= 0:
            raise Diverged(
                f"The loss is not finite at step {int(self._first_bad_step)} (epoch {self.current_epoch}). Training "
                "stopped; no checkpoint was written after this step. Try a smaller learning rate or gradient_clip_val"
            )

    def _log(self, context: BatchContext, points: TrainingPoints, result: StepResult) -> None:
        """Log loss, penalty, mean weight and training accuracies of a batch."""
        values = {"loss": result.loss.detach(), "penalty": result.penalty.detach()}
        if not isinstance(self.weighting, Uniform):
            values["weight_mean"] = result.weights.detach().float().mean()
        # Without an attack, the training points are the clean inputs, and so their accuracy is the clean accuracy.
        adversarial = "accuracy_clean" if points.found is None else "accuracy_adversarial"
        terms = result.terms
        for name, logits in ((adversarial, terms.adversarial_logits), ("accuracy_clean", terms.clean_logits)):
            if logits is not None:
                values[name] = 1 - losses.misclassified(logits.detach(), context.y).float().mean()
        self.log_dict(values, **_epoch_mean(len(context.y)))
        self.log("loss_now", values["loss"], prog_bar=True, on_step=True, on_epoch=False)


def _epoch_mean(rows: int) -> dict[str, Any]:
    """Return the options of `log_dict` that log the mean over all rows of an epoch on all ranks."""
    # `batch_size` is a float, because Lightning averages it over the ranks and would round an integer mean down.
    return {"on_step": False, "on_epoch": True, "batch_size": float(rows), "sync_dist": True}
