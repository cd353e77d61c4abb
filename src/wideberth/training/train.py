"""`train`: from a model and data to a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from wideberth.attacks import PGD, Attack
from wideberth.configuration import describe
from wideberth.data import Augmentation, Data
from wideberth.modes import Mode
from wideberth.runs import Run
from wideberth.training.averaging import Averaging
from wideberth.training.checkpoints import Keep
from wideberth.training.job import Execution, Outputs, Plan, TrainingJob
from wideberth.training.objectives import Objective
from wideberth.training.perturbation import AWP
from wideberth.training.policies import MakeOptimizer, MakeScheduler, Optimization, Policies, sgd
from wideberth.training.radii import Radius
from wideberth.training.regularizers import Regularizer
from wideberth.training.stopping import OverfittingGuard
from wideberth.training.weightings import Weighting


def train(
    model: nn.Module,
    data: Data,
    out: str | Path = "runs/train",
    *,
    attack: Attack | None = None,
    radius: Radius | None = None,
    objective: Objective | None = None,
    weighting: Weighting | None = None,
    regularizers: Sequence[Regularizer] = (),
    augment: Augmentation | None = None,
    optimizer: MakeOptimizer = sgd,
    scheduler: MakeScheduler | None = None,
    scheduler_interval: Literal["epoch", "step"] = "epoch",
    epochs: int = 10,
    batch_size: int = 128,
    attack_mode: Mode = "eval",
    perturbation: AWP | None = None,
    averaging: Averaging | None = None,
    validation_attack: Attack | None = None,
    keep: Keep = "last",
    patience: int | None = None,
    guard: OverfittingGuard | None = None,
    seed: int = 0,
    workers: int = 0,
    probe: int = 256,
    channels_last: bool = False,
    progress: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    trainer: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Run:
    """Train a model and leave a run directory with everything needed to trust, repeat or continue it.

    Args:
        model: maps (B, *shape) in the box to logits (B, K); trained in place.
        data: the data set, with its held-out split if there is one.
        out: the run directory.
        attack: perturbs the training points (default: 10-step PGD in linf).
        radius: how far each input may be moved (default: not at all, standard training).
        objective: the losses of a batch (default: cross-entropy at the adversarial points).
        weighting: how much each sample counts (default: all the same).
        regularizers: penalties on the shape of the function that the model computes.
        augment: batched augmentation on the device.
        optimizer: makes the optimizer from the parameters (default: SGD 0.1, momentum 0.9, weight decay 5e-4).
        scheduler: makes the learning-rate schedule from the optimizer.
        scheduler_interval: whether it steps every "epoch" or every "step".
        epochs: passes over the training rows.
        batch_size: rows a step, over all devices together.
        attack_mode: the mode of the model during the attack.
        perturbation: of the weights, at which each step's gradient is taken (default: none).
        averaging: of the weights over training; the average is validated and exported (default: none).
        validation_attack: attacks the held-out rows after each epoch (default: 10-step PGD on the margin).
        keep: which weights are exported: those of the "last" epoch, or of the "best" on the held-out rows.
        patience: stop when held-out accuracy, robust if there is a radius, has not risen for so many epochs.
        guard: stops when robust accuracy collapses, and keeps the epoch before.
        seed: of everything random in training.
        workers: processes that load data.
        probe: how many rows the effective margin is measured on after each epoch (0: none).
        channels_last: memory format of images and convolutions; often faster.
        progress: show a progress bar (or, without a terminal, a line per epoch).
        resume: continue the run in `out` from its last checkpoint.
        overwrite: replace the run in `out`, when the first epoch of the new one has ended.
        trainer: any further options of `lightning.Trainer` (devices, precision, gradient_clip_val, logger, ...).
        config: the contents of config.yaml (default: derived from the arguments).

    Returns:
        The run.

    Raises:
        InputError: for arguments that cannot be used or combined, when `out` holds a run, and on `resume` for a file
            of it that cannot be read.
        Diverged: when the loss is no longer finite; the last good checkpoint is kept.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("config", "resume", "overwrite")}
    given = {"radius": radius, "objective": objective, "weighting": weighting, "validation_attack": validation_attack}
    policies = Policies(
        attack=PGD(box=data.box) if attack is None else attack,
        regularizers=regularizers,
        augment=augment,
        perturbation=perturbation,
        attack_mode=attack_mode,
        **{name: policy for name, policy in given.items() if policy is not None},  # type: ignore[arg-type]
    )
    chosen = {name: getattr(policies, name) for name in ("attack", *given)}
    record = {name: describe(value) for name, value in (arguments | chosen).items()} if config is None else config
    job = TrainingJob(
        model,
        data,
        policies,
        Optimization(optimizer, scheduler, scheduler_interval),
        Plan(epochs, batch_size, seed, averaging=averaging, keep=keep, patience=patience, guard=guard),
        Outputs(Path(out), record, probe=probe, progress=progress, resume=resume, overwrite=overwrite),
        Execution(workers, channels_last, trainer or {}),
    )
    return job.run()
