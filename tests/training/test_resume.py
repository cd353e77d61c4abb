"""A run that was stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from training_tools import adam, fit, mlp, seeded, tensors

import wideberth as wb
from wideberth.training.radii import InstanceAdaptive
from wideberth.training.regularizers import EffectiveMargin


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def network() -> nn.Module:
    """Everything that has a state: batch norm, dropout, convolutions."""
    made: nn.Module = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(36, 3),
        )
    )
    return made


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    weights: dict[str, Tensor]
    samples: pd.DataFrame
    metrics: pd.DataFrame
    radii: pd.DataFrame
    optimizer: dict[str, Any] = field(repr=False)

    def differences(self, other: Outcome) -> list[str]:
        """What is not the same, by name."""
        weights = [f"weights {name}" for name, w in self.weights.items() if not torch.equal(w, other.weights[name])]
        tables = [n for n in ("samples", "metrics", "radii") if not getattr(self, n).equals(getattr(other, n))]
        states = [
            f"optimizer {key} of {number}"
            for number, state in self.optimizer.items()
            for key, value in state.items()
            if not torch.equal(torch.as_tensor(value), torch.as_tensor(other.optimizer[number][key]))
        ]
        return weights + tables + states


def run_of(out: Path, rule: str = "simple", epochs: int = 4, **options: Any) -> Outcome:
    model = network()
    validation = options.pop("validation", 2)
    given: dict[str, Any] = {
        "radius": InstanceAdaptive(0.1, rule, gamma=0.02, warmup=1, misclassified="decay"),  # type: ignore[arg-type]
        "regularizers": [EffectiveMargin(wb.schedules.Ramp(0.02, 3))],
        "augment": wb.data.CropFlip(1),
        "optimizer": adam,
        "scheduler": halving,
    }
    run = fit(model, tensors(10, (1, 6, 6), validation=validation), out, epochs=epochs, **(given | options))
    samples, metrics, radii = run.samples, run.metrics, run.radii
    assert samples is not None
    assert metrics is not None
    assert radii is not None
    assert run.checkpoint is not None
    saved = torch.load(run.checkpoint, weights_only=True)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = saved["optimizer_states"][0]["state"]
    return Outcome(weights, samples, metrics.drop(columns="seconds"), radii, state)


@pytest.fixture(scope="module", params=["simple", "lookahead"])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Outcome]:
    """Four epochs without a pause."""
    return request.param, run_of(tmp_path_factory.mktemp("straight") / "run", request.param)


def test_two_and_two_are_four(straight: tuple[str, Outcome], tmp_path: Path) -> None:
    rule, whole = straight
    half = run_of(tmp_path / "run", rule, epochs=2)
    resumed = run_of(tmp_path / "run", rule, resume=True)
    assert whole.differences(resumed) == []
    assert resumed.metrics["epoch"].tolist() == [0, 1, 2, 3]
    assert resumed.radii["epoch"].unique().tolist() == [0, 1, 2, 3]
    # The comparison can fail: two epochs are not four, though their records agree as far as they go.
    assert len(half.differences(resumed)) > len(half.weights)
    assert half.metrics.equals(resumed.metrics[:2])
    assert half.samples["radius"].nunique() > 1


@pytest.mark.parametrize("epochs", [1, 3])
def test_anywhere(straight: tuple[str, Outcome], tmp_path: Path, epochs: int) -> None:
    rule, whole = straight
    run_of(tmp_path / "run", rule, epochs=epochs)
    assert whole.differences(run_of(tmp_path / "run", rule, resume=True)) == []


def test_without_a_held_out_split(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", epochs=3, validation=0)
    run_of(tmp_path / "run", epochs=1, validation=0)
    resumed = run_of(tmp_path / "run", epochs=3, validation=0, resume=True)
    assert "validation_robust" not in whole.metrics
    assert whole.differences(resumed) == []


@pytest.mark.parametrize(
    "made",
    [
        lambda: {"perturbation": wb.perturbation.AWP(0.05, warmup=1)},
        lambda: {"averaging": wb.averaging.EMA(0.9)},
        lambda: {"averaging": wb.averaging.SWA(1), "keep": "best"},
        lambda: {"guard": wb.stopping.OverfittingGuard(1.0), "perturbation": wb.perturbation.AWP()},
    ],
)
@pytest.mark.parametrize("epochs", [2, 3])
def test_around_the_step(tmp_path: Path, made: Callable[[], dict[str, Any]], epochs: int) -> None:
    whole = run_of(tmp_path / "whole", **made())
    run_of(tmp_path / "run", epochs=epochs, **made())
    assert whole.differences(run_of(tmp_path / "run", resume=True, **made())) == []
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
        for name in ("whole", "run")
    ]
    for kind in ("EMA", "SWA"):
        if kind in states[0]:
            for part in ("average", "trained"):
                assert all(map(torch.equal, states[0][kind][part].values(), states[1][kind][part].values()))
    assert whole.differences(run_of(tmp_path / "plain")) != [] or "guard" in made()


class Interrupt(L.Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.when = (epoch, batch)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == self.when:
            raise KeyboardInterrupt


def test_ctrl_c_leaves_a_run_that_goes_on(straight: tuple[str, Outcome], tmp_path: Path) -> None:
    rule, whole = straight
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path / "run", rule, trainer={"callbacks": [Interrupt(2, 1)]})
    assert signal.getsignal(signal.SIGINT) == before  # the next Ctrl-C counts too
    run = wb.Run(tmp_path / "run")
    assert not run.finished
    assert run.checkpoint is not None
    assert run.metrics is not None
    assert run.metrics["epoch"].tolist() == [0, 1]
    resumed = run_of(tmp_path / "run", rule, resume=True)
    assert whole.differences(resumed) == []
    assert wb.Run(tmp_path / "run").finished


class Broken(nn.Module):
    """A model that fails at a forward."""

    def __init__(self, inner: nn.Module, forwards: int, error: BaseException) -> None:
        super().__init__()
        self.inner, self.left, self.error = inner, forwards, error

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory"), SystemExit(3)])
def test_what_the_model_raises_comes_out(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        fit(Broken(mlp(), 8, error), tensors(), tmp_path / "run", attack=wb.attacks.FGSM())
    assert str(raised.value) == str(error)


def test_ctrl_c_in_the_first_epoch_leaves_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(mlp(), tensors(), tmp_path / "run", trainer={"callbacks": [Interrupt(0, 1)]})
    with pytest.raises(wb.InputError, match=r"holds no checkpoints/last.ckpt to resume from"):
        fit(mlp(), tensors(), tmp_path / "run", resume=True)
    assert fit(mlp(), tensors(), tmp_path / "run").finished


def test_the_order_does_not_depend_on_who_loads(tmp_path: Path) -> None:
    here = run_of(tmp_path / "here", epochs=2, workers=0)
    there = run_of(tmp_path / "there", epochs=1, workers=1)
    assert here.differences(there) != []
    assert here.differences(run_of(tmp_path / "there", epochs=2, workers=1, resume=True)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"model": mlp(width=9)}, r"model.init_args.hidden was \[8\], and is now \[9\]"),
        (lambda: {"model": mlp(batch_norm=True)}, "model.init_args.batch_norm was False, and is now True"),
        (lambda: {"radius": InstanceAdaptive(0.1)}, "radius.class_path was .*Zero, and is now .*InstanceAdaptive"),
        (lambda: {"epochs": 1}, "epochs=1: 2 are done"),
    ],
)
def test_resuming_something_else_is_refused(tmp_path: Path, change: Callable[[], dict[str, Any]], message: str) -> None:
    fit(mlp(), tensors(), tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    options = {"model": mlp(), "epochs": 3} | change()
    with pytest.raises(wb.InputError, match=message) as refusal:
        fit(data=tensors(), out=tmp_path / "run", resume=True, **options)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run_of(tmp_path / "run", epochs=2)
    model = network()
    first = wb.Run(tmp_path / "run")
    before = (first.samples, (first.path / "model.safetensors").read_bytes(), (first.path / "metrics.csv").read_bytes())
    assert run_of(tmp_path / "run", epochs=2, resume=True).samples.equals(before[0])
    assert (first.path / "model.safetensors").read_bytes() == before[1]
    assert (first.path / "metrics.csv").read_bytes() == before[2]
    assert model.training
