"""The training loop: batch, radius, attack, objective, weighting, regularizers, step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeAlias

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wideberth import losses
from wideberth.attacks import PGD, Attack, AttackInputs, perturb_batch
from wideberth.checks import Box, InputError
from wideberth.data.augment import Augmentation
from wideberth.evaluation.verify import judging, verify
from wideberth.modes import Mode, lent
from wideberth.randomness import Noise, fold, own_generators
from wideberth.training.objectives import AdversarialCrossEntropy, LossTerms, Objective
from wideberth.training.perturbation import AWP, check_perturbation, unnoticed
from wideberth.training.radii import Radius, Zero
from wideberth.training.regularizers import Regularizer, settled
from wideberth.training.step import Step
from wideberth.training.weightings import Uniform, Weighting

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler: TypeAlias = Callable[[Optimizer], LRScheduler]


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The field's default: SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class Diverged(InputError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


def check_combination(attack: Attack, radius: Radius, objective: Objective, weighting: Weighting) -> None:
    """Refuse policies that cannot work together (`InputError`, with the reason)."""
    name = type(objective).__name__
    if radius.needs_adversary and not objective.adversarial:
        raise InputError(
            f"radius={type(radius).__name__} with objective={name}: the radii are learned at adversarial points, "
            "which this objective never looks at; use AdversarialCrossEntropy or TRADES"
        )
    if not objective.adversarial and not isinstance(radius, Zero):
        raise InputError(
            f"radius={type(radius).__name__} with objective={name}: this objective trains on clean inputs alone; "
            "use radius Zero, or AdversarialCrossEntropy"
        )
    weigher = type(weighting).__name__
    if (weighting.needs_adversary or weighting.needs_attack) and not objective.adversarial:
        raise InputError(
            f"weighting={weigher} with objective={name}: the weights are read off adversarial points, which this "
            "objective never looks at; use weighting Uniform, or AdversarialCrossEntropy"
        )
    if weighting.needs_attack and isinstance(radius, Zero):
        raise InputError(
            f"weighting={weigher} with radius=Zero: the weights tell how an attack went, and none is made; use "
            "weighting Uniform, or another radius"
        )
    starts_clean = getattr(attack, "start", "uniform") == "none"
    if objective.ascends_divergence and starts_clean and not isinstance(radius, Zero):
        raise InputError(
            f'attack.start="none" with objective={name}: the gradient of the KL term is zero at the clean input, so '
            'the attack would never move; use start="gaussian" or "uniform"'
        )


def within_norm(attack: Attack) -> bool:
    """Whether eps is the radius of a norm ball; N-FGSM's is, though its points leave it."""
    return attack.norm_bounded or isinstance(attack, PGD)


def default_validation_attack(attack: Attack) -> Attack:
    """What judges held-out data unless said otherwise: see `RobustTraining`."""
    if not within_norm(attack):
        return attack
    return PGD(norm=attack.norm, box=attack.box, loss=losses.margin_loss, keep="first_flip")


def check_validation_attack(judge: Attack, attack: Attack) -> None:
    """Refuse a judge for which a radius means something else than for the training attack (`InputError`)."""
    for name in ("norm", "box"):
        its, theirs = getattr(judge, name), getattr(attack, name)
        if its != theirs:
            raise InputError(f"judge.{name}={its!r} with attack.{name}={theirs!r}: must be the same")
    if judge.norm_bounded != within_norm(attack):
        kinds = type(judge).__name__, type(attack).__name__
        raise InputError(
            f"judge={kinds[0]} with attack={kinds[1]}: must keep to the same radius, both a norm's or neither"
        )


class RobustTraining(L.LightningModule):
    """Any combination of radius, attack, objective, weighting and regularizers, as one `LightningModule`.

    Args:
        model: maps (B, *shape) in the box to logits (B, K).
        samples: how many rows the data set has that the training indices point into.
        attack: crafts the adversarial points; its `norm` is that of the radii.
        radius, objective, weighting, regularizers: the policies; see their modules.
        augment: applied to the whole batch on its device, or None.
        optimizer, scheduler: make them from parameters and optimizer; the scheduler steps every
            `scheduler_interval`.
        attack_mode: the mode in which the model is attacked. "eval" leaves batch-norm statistics alone.
        seed: of all randomness of the loop.
        perturbation: of the weights, at which the step's gradient is then taken; None: where they are.
        judge: attacks held-out data, at the nominal radius. None: 10-step PGD on the margin, in the training attack's
            norm, whatever the training attack is: a weak one would not tell on itself. (An attack without a norm ball
            judges itself.)

    Raises:
        InputError: for policies that cannot be combined.
        Diverged: from the training step, when the loss is no longer finite.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int,
        attack: Attack,
        radius: Radius | None = None,
        objective: Objective | None = None,
        weighting: Weighting | None = None,
        regularizers: Sequence[Regularizer] = (),
        augment: Augmentation | None = None,
        optimizer: MakeOptimizer = sgd,
        scheduler: MakeScheduler | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        attack_mode: Mode = "eval",
        seed: int = 0,
        perturbation: AWP | None = None,
        judge: Attack | None = None,
    ) -> None:
        super().__init__()
        self.model, self.attack = model, attack
        self.radius = Zero() if radius is None else radius
        self.objective = AdversarialCrossEntropy() if objective is None else objective
        self.weighting = Uniform() if weighting is None else weighting
        self.regularizers, self.augment = list(regularizers), augment
        self.optimizer, self.scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        self.attack_mode, self.seed, self.perturbation = attack_mode, seed, perturbation
        self.judge = default_validation_attack(attack) if judge is None else judge
        check_combination(attack, self.radius, self.objective, self.weighting)
        check_validation_attack(self.judge, attack)
        check_perturbation(perturbation, model)
        self.radius.allocate(samples)
        self.rows = torch.arange(samples)
        self.register_buffer("visited", torch.zeros(samples, dtype=torch.bool), persistent=False)
        self.visited: Tensor
        # What each rank learns is its own until `_synchronise`; rank 0's would replace it before every forward.
        kept = ["visited", *(f"radius.{name}" for name, _ in self.radius.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, kept)  # type: ignore[no-untyped-call]
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
        """One pass of the flow; returns the loss."""
        with self.own_generators("step", batch_idx, batch[0].device):
            return self._training_step(batch, batch_idx)

    def own_generators(self, purpose: str, batch_idx: int, device: torch.device) -> AbstractContextManager[None]:
        """Generators for the layers of the model that draw, such as dropout: keyed by epoch, step and rank.

        A resumed run draws again what the run before it drew, and the caller's generators are left as they were.
        """
        seed = fold(self.seed, purpose, self.current_epoch, batch_idx, self.trainer.global_rank)
        return own_generators(seed, device)

    def _training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step = self.open(batch, batch_idx)
        step.attack_loss = self.objective.attack_loss(step)
        eps = self.radius.propose(step)
        x_adv = self.perturb(step, eps)
        with self.climbed(step, x_adv) as before:
            penalty = self.penalty(step, x_adv)  # first, since its graph is gone before the objective builds its own
            terms, weights, loss = self.compute(step, x_adv)
            loss = loss + penalty
            if before is not None:  # the gradient is taken here; a later backward finds the weights put back
                loss, terms = self.settle(loss), before
        if self.radius.needs_adversary and terms.adversarial_logits is None:
            name = type(self.objective).__name__
            raise InputError(f"objective={name}: gave no adversarial logits, from which the radii are to be learned")
        if terms.adversarial_logits is not None:
            self.radius.observe(step, terms.adversarial_logits)
        self.visited[step.index] = True
        self._watch(loss)
        self._log(step, terms, weights, loss, penalty, perturbed=step.found is not None)
        return loss

    def open(self, batch: Batch, batch_idx: int) -> Step:
        """The batch with its augmentation, its place in time and its random streams."""
        x, y, index = batch
        epoch = self.current_epoch
        if self.augment is not None:
            x = self.augment(x, index, seed=fold(self.seed, "augment"), epoch=epoch)
        noise = Noise(index, fold(self.seed, "training"), draw=epoch)
        batches = self.trainer.num_training_batches
        progress = epoch + (batch_idx / batches if batches not in (0, float("inf")) else 0.0)
        where = self.attack.norm, self.attack.box
        return Step(self.model, x, y, index, epoch, progress, noise, self.attack_mode, self.attack, *where)

    def perturb(self, step: Step, eps: Tensor) -> Tensor:
        """The worst points found, (B, ...); the inputs themselves where nothing may or need be moved."""
        if not self.objective.adversarial or isinstance(self.radius, Zero):
            return step.x
        step.found = step.attack(eps)
        return self.radius.settle(step, step.found.x)

    def penalty(self, step: Step, x_adv: Tensor) -> Tensor:
        """The weighted sum of the regularizers' means, ()."""
        total = torch.zeros((), device=step.x.device)
        for place, regularizer in enumerate(self.regularizers):
            weight = regularizer.weight_at(step.progress)
            if weight:
                x = step.x if regularizer.where == "clean" else x_adv
                values = regularizer(step.model, x, step.y, step.noise.fold("regularizer", place))
                total = total + self.settle(weight * values.mean())
        return total

    def compute(self, step: Step, x_adv: Tensor) -> tuple[LossTerms, Tensor, Tensor]:
        """What the batch pays, what each sample weighs (B,), and the mean of both together, ()."""
        terms = self.objective.compute(step, x_adv)
        weights = self.weighting.compute(step, terms)
        return terms, weights, terms.total(weights).mean()

    @contextmanager
    def climbed(self, step: Step, x_adv: Tensor) -> Iterator[LossTerms | None]:
        """The weights where the loss is worst nearby, where they are to be perturbed, and what was paid before."""
        if self.perturbation is None or step.epoch < self.perturbation.warmup:
            yield None
            return
        with unnoticed(self, step.x.device):
            terms, _, loss = self.compute(step, x_adv)
            ascent = self.perturbation.ascent(step.model, loss)
        if self.trainer.world_size > 1:  # the whole batch's, as if one process had climbed
            ascent = [self.trainer.strategy.reduce(gradient, reduce_op="mean") for gradient in ascent]
        paid = (terms.losses, terms.clean_logits, terms.adversarial_logits, terms.unweighted)
        before = LossTerms(*(None if value is None else value.detach() for value in paid))  # type: ignore[arg-type]
        del terms, loss, paid  # and the graph with them
        with self.perturbation.moved(step.model, ascent):
            yield before

    def settle(self, loss: Tensor) -> Tensor:
        """The loss, (), with its gradient in everything that is trained taken now."""
        with torch.autocast(loss.device.type, enabled=False):
            return settled(loss, self.parameters())

    # ---- around it ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Clean accuracy, and accuracy under the judge at the policy's nominal radius."""
        x, y, index = batch
        # Lightning validates in inference mode, where no input gradient can be taken.
        generators = self.own_generators("validation step", batch_idx, x.device)
        with torch.inference_mode(False), lent(self.model), generators:
            x, y = x.clone(), y.clone()
            with torch.no_grad():
                clean = ~losses.misclassified(self.model(x), y)
            held = None
            if self.radius.eval_eps():  # without a radius there is nothing to call robust
                held = self.withstood(self.judge, x, y, Noise(index.clone(), fold(self.seed, "validation")))
        options: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": len(y), "sync_dist": True}
        self.log("validation_clean", clean.float().mean(), prog_bar=True, **options)
        if held is not None:
            self.log("validation_robust", (clean & held).float().mean(), prog_bar=True, **options)

    def withstood(self, attack: Attack, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Whether each sample stands `attack` at the nominal radius, (B,) bool; what breaks it is seen again."""
        eps = torch.full((len(y),), self.radius.eval_eps(), device=x.device)
        with lent(self.model):
            found = perturb_batch(attack, self.model, AttackInputs(x, y, eps, noise), check_success=False).x
        if attack.norm_bounded:
            return ~verify(self.model, x, y, found, eps, attack.norm, attack.box)
        with judging(self.model, x):
            return ~losses.misclassified(self.model(found), y)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule, from their factories; what an objective trains beside the model is theirs too."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        schedule = {"scheduler": self.scheduler(optimizer), "interval": self.scheduler_interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        """Refuse a precision that the weights cannot be perturbed in (`InputError`); train what came in eval mode."""
        check_perturbation(self.perturbation, self.model, self.trainer.precision)
        for part in (self.model, self.objective):
            # As `load_model` gives it. Where some module is in train mode, those that are not were frozen on purpose.
            if isinstance(part, nn.Module) and not any(module.training for module in part.modules()):
                part.train()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an epoch's last batch, give every rank the radii that the others moved."""
        if self.trainer.is_last_batch:
            self._synchronise()

    def on_train_epoch_end(self) -> None:
        """Stop on a loss that was not finite, before a checkpoint is written."""
        self._synchronise()  # once more, for an epoch that was ended before its last batch (`max_steps`)
        self._refuse_bad_steps()

    def _synchronise(self) -> None:
        """Each sample is visited by one rank in an epoch: what that rank learned of it holds for all."""
        if self.trainer.world_size > 1 and len(self.radius.radii):
            learned = self.trainer.strategy.reduce(torch.where(self.visited, self.radius.radii, 0), reduce_op="sum")
            visits = self.trainer.strategy.reduce(self.visited.to(torch.float32), reduce_op="sum")
            assert isinstance(learned, Tensor)
            assert isinstance(visits, Tensor)
            self.radius.radii.copy_(torch.where(visits > 0, learned / visits.clamp_min(1), self.radius.radii))
        self.visited.zero_()

    def _watch(self, loss: Tensor) -> None:
        """Remember, on the device, the first step whose loss was not finite; look at it now and then."""
        step = torch.full((), self.global_step, device=loss.device)
        bad = torch.where(torch.isfinite(loss.detach()), -1, step)
        known = bad if self._first_bad_step is None else self._first_bad_step
        self._first_bad_step = torch.where(known >= 0, known, bad)
        if loss.device.type == "cpu" or self.global_step % 50 == 49:
            self._refuse_bad_steps()

    def _refuse_bad_steps(self) -> None:
        if self._first_bad_step is not None and int(self._first_bad_step) >= 0:
            raise Diverged(
                f"the loss is not finite at step {int(self._first_bad_step)} (epoch {self.current_epoch}): stopped; "
                "the last good checkpoint is kept. Try a smaller learning rate or gradient_clip_val"
            )

    def _log(
        self, step: Step, terms: LossTerms, weights: Tensor, loss: Tensor, penalty: Tensor, *, perturbed: bool
    ) -> None:
        values = {"loss": loss.detach(), "penalty": penalty.detach()}
        if not isinstance(self.weighting, Uniform):
            values["weight_mean"] = weights.detach().float().mean()
        # Without a perturbation, the logits at the adversarial points are those at the clean ones.
        adversarial = "accuracy_adversarial" if perturbed else "accuracy_clean"
        for name, logits in ((adversarial, terms.adversarial_logits), ("accuracy_clean", terms.clean_logits)):
            if logits is not None:
                values[name] = 1 - losses.misclassified(logits.detach(), step.y).float().mean()
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(step.y))
        self.log("loss_now", values["loss"], prog_bar=True, on_step=True, on_epoch=False)
