"""A training run from its parts to the run directory: checks, the trainer, the fit, the export."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor, nn

from wideberth import checks
from wideberth.attacks import Attack
from wideberth.checks import InputError
from wideberth.data import Data, Split, loader, read
from wideberth.modes import lent
from wideberth.randomness import own_generators
from wideberth.runs import Run
from wideberth.training.averaging import Averaging
from wideberth.training.checkpoints import Keep
from wideberth.training.directory import FirstEpoch, claim, export, kept_epoch, resumed_from, same_experiment
from wideberth.training.module import RobustTraining
from wideberth.training.perturbation import check_perturbation
from wideberth.training.policies import Optimization, Policies
from wideberth.training.recorder import KeepLast, Recorder
from wideberth.training.stopping import OverfittingGuard, check_guard

log = logging.getLogger("wideberth")


@dataclass(frozen=True)
class Plan:
    """How long a run trains, and which of its weights are exported; see `wideberth.train`.

    Raises:
        InputError: for numbers out of range, and an averaging that would begin after the last epoch.
    """

    epochs: int = 10
    batch_size: int = 128
    seed: int = 0
    averaging: Averaging | None = None
    keep: Keep = "last"
    patience: int | None = None
    guard: OverfittingGuard | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be planned (`InputError`)."""
        checks.at_least("epochs", self.epochs, 1)
        checks.at_least("batch_size", self.batch_size, 1)
        if self.patience is not None:
            checks.at_least("patience", self.patience, 1)
        checks.choice("keep", self.keep, get_args(Keep))
        averaging = self.averaging
        if averaging is not None and averaging.begins >= self.epochs:
            kind = type(averaging).__name__
            raise InputError(f"averaging={kind}(start={averaging.begins}) with epochs={self.epochs}: would never begin")

    def check_validation(self, held_out: Split | None) -> None:
        """Refuse a choice between epochs without held-out rows to choose by (`InputError`)."""
        if held_out is None and (self.keep == "best" or self.patience is not None):
            what = f"patience={self.patience}" if self.patience is not None else f'keep="{self.keep}"'
            raise InputError(
                f"{what}: no rows are held out to tell one epoch from another; see `validation` of the data"
            )


@dataclass(frozen=True)
class Outputs:
    """What a run writes and shows; see `wideberth.train`. `record` is the contents of config.yaml."""

    out: Path
    record: dict[str, Any]
    probe: int = 256
    progress: bool = True
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse a negative number of rows (`InputError`)."""
        checks.at_least("probe", self.probe, 0)


@dataclass(frozen=True)
class Execution:
    """What a run is executed by; see `wideberth.train`. `trainer` are further options of `lightning.Trainer`."""

    workers: int = 0
    channels_last: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a negative number of processes (`InputError`)."""
        checks.at_least("workers", self.workers, 0)


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """One run of `wideberth.train`."""

    model: nn.Module
    data: Data
    policies: Policies
    optimization: Optimization
    plan: Plan
    outputs: Outputs
    execution: Execution

    def run(self) -> Run:
        """Check everything, train, and export.

        Raises:
            InputError: for parts that do not fit together, when the run directory holds a run, and on `resume` for a
                file of it that cannot be read.
            Diverged: when the loss is no longer finite.
        """
        plan, out = self.plan, self.outputs.out
        self.data.prepare()
        split, held_out = self.data.train(), self.data.validation()
        plan.check_validation(held_out)
        check_model(self.model, split, self.data)
        check_box(self.policies.attack, self.data)
        module = RobustTraining(self.model, split.source_size, self.policies, self.optimization, plan.seed)
        module.rows = split.rows
        check_guard(plan.guard, module)
        first = FirstEpoch(out, self.outputs.record, resumed=self.outputs.resume)
        keeper = KeepLast(out, plan.patience, plan.guard, first.saved)
        trainer = self._trainer(first, keeper, _probe(held_out or split, self.outputs.probe))
        check_perturbation(self.policies.perturbation, self.model, trainer.precision)
        done, note = self._claim_directory(module, keeper)
        if note is not None and trainer.is_global_zero:
            log.warning(note)
        checkpoint = str(keeper.newest) if self.outputs.resume else None
        self._fit(trainer, module, split, held_out, (checkpoint, done))
        # Some processes may be on machines that do not see the run directory.
        if (self.outputs.resume or first.over) and Run(out).checkpoint is not None:
            summary = {"epoch": kept_epoch(keeper, module, plan.keep), "keep": plan.keep, "ended": keeper.ended}
            if trainer.is_global_zero:
                first.write_config()
                keeper.complete()
                export(out, module, split, summary)
        if trainer.is_global_zero and keeper.ended is not None:
            log.warning(keeper.ended)
        return Run(out)

    def _trainer(self, first: FirstEpoch, keeper: KeepLast, probe: tuple[Tensor, Tensor] | None) -> L.Trainer:
        plan, progress = self.plan, self.outputs.progress
        terminal = progress and sys.stderr.isatty()
        recorder = Recorder(self.outputs.out, probe, echo=progress and not terminal)
        policies = [callback for callback in (plan.averaging, plan.guard) if callback is not None]
        callbacks: list[Callback] = [*policies, first, recorder, keeper]
        if terminal:
            callbacks.append(RichProgressBar())
        with quiet():
            return _lightning_trainer(callbacks, plan.epochs, terminal, self.execution.trainer)

    def _claim_directory(self, module: RobustTraining, keeper: KeepLast) -> tuple[int, str | None]:
        """Check the run directory, changing nothing, and load what is resumed; epochs done, and a note on that."""
        outputs, out = self.outputs, self.outputs.out
        claim(out, resume=outputs.resume, overwrite=outputs.overwrite)
        if not outputs.resume:
            return 0, None
        same_experiment(out, outputs.record)
        saved, note = resumed_from(out, module, self.plan.epochs, self.plan.keep)
        keeper.newest = saved.file
        return saved.epoch + 1, note

    def _fit(
        self,
        trainer: L.Trainer,
        module: RobustTraining,
        split: Split,
        held_out: Split | None,
        resumed: tuple[str | None, int],
    ) -> None:
        plan, workers = self.plan, self.execution.workers
        checkpoint, done = resumed
        if self.execution.channels_last:
            module.model.to(memory_format=torch.channels_last)
        with quiet(), interruptible():
            trainer.fit(
                module,
                # The first iterator is made before the epoch is announced: workers would read ahead in the wrong one.
                loader(split, plan.batch_size, shuffle=True, seed=plan.seed, workers=workers, epoch=done),
                None if held_out is None else loader(held_out, plan.batch_size, shuffle=False, workers=workers),
                ckpt_path=checkpoint,
                weights_only=True,
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's advice (workers, loggers, devices); warnings of the user's own code are shown."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C a `KeyboardInterrupt`: Lightning exits instead, and ignores the signal from then on."""
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
    x, y, _ = read(split, [0])
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


def _probe(split: Split, size: int) -> tuple[Tensor, Tensor] | None:
    if not size:
        return None
    x, y, _ = read(split, range(min(size, len(split))))
    return x, y


def _lightning_trainer(callbacks: list[Callback], epochs: int, terminal: bool, options: dict[str, Any]) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": True,
        "enable_model_summary": False,
        "enable_progress_bar": terminal,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the sampler is keyed, and divides itself among the ranks
        "log_every_n_steps": 1,
    }
    given = dict(options)
    callbacks = [*callbacks, *(given.pop("callbacks", None) or [])]
    try:
        return L.Trainer(**(defaults | given), callbacks=callbacks)
    except (TypeError, ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).removeprefix("Trainer.__init__() ").split())
        raise InputError(f"trainer: {reason}; see lightning.Trainer") from None
