"""`train`: from a model and data to a run directory."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import nn

from wideberth import checks
from wideberth.attacks import PGD, Attack
from wideberth.checks import InputError
from wideberth.configuration import describe
from wideberth.data import Augmentation, Data, Split, loader
from wideberth.modes import Mode, lent
from wideberth.randomness import own_generators
from wideberth.runs import Run, write_atomically
from wideberth.training.averaging import Averaging
from wideberth.training.directory import Keep, claim, export, kept_epoch, last_checkpoint, same_experiment
from wideberth.training.module import MakeOptimizer, MakeScheduler, RobustTraining, sgd
from wideberth.training.objectives import Objective
from wideberth.training.perturbation import AWP, check_perturbation
from wideberth.training.radii import Radius
from wideberth.training.recorder import KeepLast, Recorder
from wideberth.training.regularizers import Regularizer
from wideberth.training.stopping import OverfittingGuard, check_guard
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
    judge: Attack | None = None,
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
        attack: crafts the training points (default: 10-step PGD in linf).
        radius: how far each input may be moved (default: not at all, standard training).
        objective: what the model pays (default: cross-entropy at the adversarial points).
        weighting: how much each sample counts (default: the same).
        regularizers: what the function's shape pays.
        augment: batched augmentation on the device.
        optimizer: makes the optimizer from the parameters (default: SGD 0.1, momentum 0.9, weight decay 5e-4).
        scheduler: makes the learning-rate schedule from the optimizer.
        scheduler_interval: whether it steps every "epoch" or every "step".
        epochs: passes over the training rows.
        batch_size: rows a step, over all devices together.
        attack_mode: the mode of the model under attack.
        perturbation: of the weights, at which each step's gradient is taken (default: none).
        averaging: of the weights over training; the average is judged and exported (default: none).
        judge: attacks the held-out rows after each epoch (default: 10-step PGD on the margin).
        keep: which weights are exported: those of the "last" epoch, or of the "best" on the held-out rows.
        patience: stop when held-out accuracy, robust if there is a radius, has not risen for so many epochs.
        guard: stops when robustness breaks down, and keeps the epoch before.
        seed: of everything random in training; a run is a function of it.
        workers: processes that load data.
        probe: how many rows the effective margin is measured on after each epoch (0: none).
        channels_last: memory format of images and convolutions; often faster.
        progress: show a progress bar (or, without a terminal, a line per epoch).
        resume: continue the run in `out` from its last checkpoint.
        overwrite: replace a finished run in `out`.
        trainer: any further options of `lightning.Trainer` (devices, precision, gradient_clip_val, logger, ...).
        config: what to record as config.yaml (default: what can be told from the arguments).

    Returns:
        The run.

    Raises:
        InputError: for arguments that cannot be used or combined, and when `out` holds a finished run.
        Diverged: when the loss is no longer finite; the last good checkpoint is kept.
    """
    checks.at_least("epochs", epochs, 1)
    checks.at_least("batch_size", batch_size, 1)
    checks.at_least("workers", workers, 0)
    checks.at_least("probe", probe, 0)
    if patience is not None:
        checks.at_least("patience", patience, 1)
    checks.choice("keep", keep, get_args(Keep))
    if averaging is not None and averaging.begins >= epochs:
        kind = type(averaging).__name__
        raise InputError(f"averaging={kind}(start={averaging.begins}) with epochs={epochs}: would never begin")
    arguments = {name: value for name, value in locals().items() if name not in ("config", "resume", "overwrite")}
    out = Path(out)
    data.prepare()
    split, held_out = data.train(), data.validation()
    if held_out is None and (keep == "best" or patience is not None):
        what = f"patience={patience}" if patience is not None else f'keep="{keep}"'
        raise InputError(f"{what}: no rows are held out to tell one epoch from another; see `validation` of the data")
    attack = PGD(box=data.box) if attack is None else attack
    check_model(model, split, data)
    check_box(attack, data)
    policies = (radius, objective, weighting, regularizers, augment, optimizer, scheduler, scheduler_interval)
    module = RobustTraining(model, split.source_size, attack, *policies, attack_mode, seed, perturbation, judge)
    module.rows = split.rows
    check_guard(guard, module)
    keeper = KeepLast(out, patience, guard)
    terminal = progress and sys.stderr.isatty()
    recorder = Recorder(out, _probe(held_out or split, probe), echo=progress and not terminal)
    callbacks: list[Callback] = [each for each in (averaging, guard, recorder, keeper) if each is not None]
    with quiet():
        engine = _engine(callbacks, epochs, terminal, trainer or {})
    check_perturbation(perturbation, model, engine.precision)
    # Last of what may refuse: from here on, `overwrite` has taken its toll.
    claim(out, resume=resume, overwrite=overwrite)
    chosen = {name: getattr(module, name) for name in ("attack", "radius", "objective", "weighting", "judge")}
    record = {name: describe(value) for name, value in (arguments | chosen).items()} if config is None else config
    if resume:
        same_experiment(out, record)
    checkpoint, done = last_checkpoint(out, module, epochs) if resume else (None, 0)
    write_atomically(
        out / "config.yaml", lambda file: file.write_text(yaml.safe_dump(record, sort_keys=False)) and None
    )
    if channels_last:
        module.model.to(memory_format=torch.channels_last)
    with quiet(), interruptible():
        engine.fit(
            module,
            # The first iterator is made before the epoch is announced: workers would read ahead in the wrong one.
            loader(split, batch_size, shuffle=True, seed=seed, workers=workers, epoch=done),
            None if held_out is None else loader(held_out, batch_size, shuffle=False, workers=workers),
            ckpt_path=checkpoint,
            weights_only=True,
        )
    if Run(out).checkpoint is not None:  # some processes may be on machines that do not see the run directory
        said = {"epoch": kept_epoch(out, module, keep), "keep": keep, "ended": keeper.ended}
        if engine.is_global_zero:
            export(out, module, split, said)
    if engine.is_global_zero and keeper.ended is not None:
        print(keeper.ended, file=sys.stderr)
    return Run(out)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice to itself (workers, loggers, devices): what a run does is in its records."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C be a `KeyboardInterrupt`: Lightning exits instead, and ignores the signal from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise stop.__context__ from None


def check_model(model: nn.Module, split: Split, data: Data) -> None:
    """Refuse a model whose output does not fit the data's classes (`InputError`)."""
    x, y, _ = split.__getitems__([0])
    try:
        with lent(model), torch.no_grad(), own_generators(None):
            logits = model(x)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model: does not take inputs of shape {tuple(data.shape)}: {reason}") from None
    checks.valid_logits(logits, len(y))
    if logits.shape[1] != data.classes:
        raise InputError(f"model: returns {logits.shape[1]} logits, the data has {data.classes} classes")


def check_box(attack: Attack, data: Data) -> None:
    """Refuse an attack whose box is not the data's (`InputError`)."""
    if tuple(attack.box) != tuple(data.box):
        raise InputError(f"attack.box={tuple(attack.box)}: the data lies in {tuple(data.box)}; they must be the same")


def _probe(split: Split, size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not size:
        return None
    x, y, _ = split.__getitems__(list(range(min(size, len(split)))))
    return x, y


def _engine(callbacks: list[Callback], epochs: int, terminal: bool, options: dict[str, Any]) -> L.Trainer:
    if terminal:
        callbacks = [*callbacks, RichProgressBar()]
    defaults: dict[str, Any] = {
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": True,
        "enable_model_summary": False,
        "enable_progress_bar": terminal,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the sampler is keyed, and shares itself out among the ranks
        "log_every_n_steps": 1,
    }
    given = dict(options)
    callbacks = [*callbacks, *(given.pop("callbacks", None) or [])]
    try:
        return L.Trainer(**(defaults | given), callbacks=callbacks)
    except (TypeError, ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).removeprefix("Trainer.__init__() ").split())
        raise InputError(f"trainer: {reason}; see lightning.Trainer") from None
