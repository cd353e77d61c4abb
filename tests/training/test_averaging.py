"""Averages of the weights: what they are, and that they are what is judged, saved and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from training_tools import fit, mlp, tensors

import wideberth as wb
from wideberth.training.averaging import EMA, SWA, Averaging
from wideberth.training.radii import Fixed, InstanceAdaptive

State = dict[str, Tensor]


class Watch(L.Callback):
    """Takes down the trained weights after every step, those at the ends of epochs, and what is validated."""

    def __init__(self) -> None:
        self.steps: list[State] = []
        self.validated: list[State] = []
        self.began: list[State] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.initial = copied(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, place: int) -> None:
        self.began.append(copied(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        averaging = next((each for each in trainer.callbacks if isinstance(each, Averaging)), None)
        aside = averaging.trained if averaging is not None else None
        trained = copied(pl_module) if aside is None else {name: value.clone() for name, value in aside.items()}
        self.steps.append(trained)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append(copied(pl_module))


def copied(module: Any) -> State:
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def close(one: State, other: State) -> bool:
    return all(torch.allclose(value, other[name], rtol=1e-5, atol=1e-6) for name, value in one.items())


def watched(model: nn.Module, out: Path, **options: Any) -> tuple[wb.Run, Watch]:
    watch = Watch()
    given: dict[str, Any] = {"radius": Fixed(0.05), "epochs": 3}
    trainer = {"callbacks": [watch]} | options.pop("trainer", {})
    return fit(model, tensors(14, validation=2), out, **(given | options), trainer=trainer), watch


def test_ema_is_the_sum_that_it_says(tmp_path: Path) -> None:
    """In closed form: step t enters with 1 - d_t, and loses by every later d; batch-norm statistics as weights do."""
    model = mlp(batch_norm=True)
    run, watch = watched(model, tmp_path / "run", averaging=EMA(0.3))
    assert len(watch.steps) == 9
    decays = [min(0.3, (1 + t) / (10 + t)) for t in range(9)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.3
    parts = [watch.initial, *watch.steps]
    shares = [1.0, *(1 - d for d in decays)]
    expected = {}
    for name, value in watch.initial.items():
        if not value.is_floating_point():
            expected[name] = watch.steps[-1][name]
            continue
        total = torch.zeros_like(value)
        for place, (part, share) in enumerate(zip(parts, shares, strict=True)):
            for d in decays[place:]:
                share *= d
            total += share * part[name]
        expected[name] = total
    assert close(model.state_dict(), expected)
    assert not close(model.state_dict(), watch.steps[-1])
    assert int(model.state_dict()[next(n for n in expected if n.endswith("num_batches_tracked"))]) == 9
    assert run.finished


def test_an_epoch_that_ends_early_exports_the_average(tmp_path: Path) -> None:
    model, averaging = mlp(), EMA(0.9)
    watched(model, tmp_path / "run", averaging=averaging, trainer={"max_steps": 5})
    assert averaging.updates == 5
    assert all(torch.equal(value, averaging.average[name]) for name, value in model.state_dict().items())
    assert averaging.trained is not None
    assert not same(averaging.trained, model.state_dict())


def test_training_does_not_know_of_the_average(tmp_path: Path) -> None:
    """Trained weights, learned radii and what follows from them are those of a run without it."""
    radius = InstanceAdaptive(0.1, gamma=0.02, warmup=0)
    plain, without = watched(mlp(batch_norm=True), tmp_path / "plain", radius=radius)
    assert plain.samples is not None
    for name, averaging in (("ema", EMA()), ("swa", SWA(1))):
        radius = InstanceAdaptive(0.1, gamma=0.02, warmup=0)
        run, watch = watched(mlp(batch_norm=True), tmp_path / name, radius=radius, averaging=averaging)
        assert all(map(same, watch.steps, without.steps))
        assert all(map(same, watch.began, without.began))
        assert run.samples is not None
        assert run.samples.equals(plain.samples)


@pytest.mark.parametrize("averaging", [lambda: EMA(0.9), lambda: SWA(1)])
def test_what_is_validated_is_what_is_saved_and_exported(tmp_path: Path, averaging: Any) -> None:
    model = mlp(batch_norm=True)
    run, watch = watched(model, tmp_path / "run", averaging=averaging(), keep="best")
    assert run.metrics is not None
    assert run.export is not None
    best = run.export["epoch"]
    assert best == int(run.metrics["validation_robust"].idxmax())
    again = wb.load_model(str(run.path))
    assert same(again.state_dict(), watch.validated[best])
    assert same(model.state_dict(), watch.validated[best])
    held_out = tensors(14, validation=2).validation()
    assert held_out is not None
    x, y, _ = held_out.tensors()
    clean = (again.eval()(x).argmax(1) == y).float().mean().item()
    assert run.metrics["validation_clean"].iloc[best] == pytest.approx(clean)
    last = wb.load_model(str(run.path / "checkpoints" / "last.ckpt"))
    assert same(last.state_dict(), watch.validated[-1])


def test_swa_is_the_mean_of_epoch_ends_with_statistics_of_its_own(tmp_path: Path) -> None:
    model = mlp(batch_norm=True)
    seen: list[Tensor] = []

    class Noisy:
        def __call__(self, x: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
            seen.append(index)
            return (x + 0.1 * epoch).clamp(0, 1)

    _, watch = watched(model, tmp_path / "run", averaging=SWA(1), epochs=4, augment=Noisy())
    ends = [watch.steps[place] for place in (5, 8, 11)]
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        assert torch.allclose(model.state_dict()[name], sum(end[name] for end in ends) / 3, atol=1e-6)
    # The statistics of plain forwards in train mode over the last epoch's batches.
    norm = next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d))
    inputs: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    split = tensors(14, validation=2).train()
    batches = list(wb.data.loader(split, 4, shuffle=True, seed=0, epoch=3))
    model.eval()
    for x, _, _ in batches:
        model((x + 0.3).clamp(0, 1))
    hook.remove()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, torch.stack([each.mean(0) for each in inputs]).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, torch.stack([each.var(0) for each in inputs]).mean(0), atol=1e-5)
    assert norm.momentum == 0.1
    assert sum(map(len, seen)) == (4 + 3) * 12  # four epochs, and a pass after each of three


def test_before_swa_begins_a_run_is_as_it_is(tmp_path: Path) -> None:
    one, other = mlp(), mlp()
    watched(one, tmp_path / "one", averaging=SWA(2), epochs=3)
    run, watch = watched(other, tmp_path / "other", averaging=SWA(2), epochs=3)
    assert same(watch.validated[0], watch.steps[2])
    assert same(other.state_dict(), watch.steps[-1])  # the mean of one
    with pytest.raises(wb.InputError, match=r"averaging=SWA\(start=3\) with epochs=3: would never begin"):
        watched(mlp(), tmp_path / "none", averaging=SWA(3), epochs=3)
    assert run.config["averaging"] == {"class_path": "wideberth.training.averaging.SWA", "init_args": {"start": 2}}


def test_an_object_used_again_begins_anew(tmp_path: Path) -> None:
    averaging, models = EMA(), (mlp(), mlp())
    for place, model in enumerate(models):
        watched(model, tmp_path / str(place), averaging=averaging)
    assert same(models[0].state_dict(), models[1].state_dict())


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    averaging = EMA()
    watched(mlp(), tmp_path / "run", averaging=averaging, trainer={"accumulate_grad_batches": 3}, epochs=2)
    assert averaging.updates == 2


def test_validation_within_an_epoch_sees_the_average(tmp_path: Path) -> None:
    _, watch = watched(mlp(), tmp_path / "run", averaging=EMA(0.9), trainer={"val_check_interval": 1}, epochs=1)
    assert len(watch.validated) == 3
    assert not any(map(same, watch.validated, watch.steps))
    _, without = watched(mlp(), tmp_path / "without", trainer={"val_check_interval": 1}, epochs=1)
    assert all(map(same, watch.steps[:2], without.steps[:2]))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("averaging", [lambda: EMA(0.999), lambda: SWA(0)])
def test_precision(tmp_path: Path, precision: str, averaging: Any) -> None:
    made = averaging()
    watched(mlp(batch_norm=True), tmp_path / "run", averaging=made, trainer={"precision": precision})
    wide = {value.dtype for value in made.average.values() if value.is_floating_point()}
    assert wide == {torch.float64 if precision == "64-true" else torch.float32}


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_processes_do_not_matter(tmp_path: Path, workers: int) -> None:
    """SWA reads the training data once more, between epochs, through the same loader."""
    plain, without = watched(mlp(batch_norm=True), tmp_path / "plain")
    _, watch = watched(mlp(batch_norm=True), tmp_path / "run", averaging=SWA(0), workers=workers)
    assert all(map(same, watch.steps, without.steps))
    assert plain.finished


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.0), r"decay=1.0: must be in \[0, 1\)"),
        (lambda: EMA(-0.1), r"decay=-0.1: must be in \[0, 1\)"),
        (lambda: SWA(-1), "start=-1: must be at least 0"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(wb.InputError, match=message):
        make()
