"""Which epoch a run keeps, and when it stops: the validation attack, the best checkpoint, patience, the guard."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_tools import adam, fit, halves, mlp, tensors

import wideberth as wb
from wideberth.training.radii import Fixed, Zero
from wideberth.training.stopping import OverfittingGuard


def exploding(optimizer: torch.optim.Optimizer, after: int = 3) -> Any:
    """A learning rate that undoes what was learned."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < after else -3e3)


def run_of(out: Path, model: nn.Module | None = None, **options: Any) -> wb.Run:
    given: dict[str, Any] = {"radius": Fixed(0.02), "optimizer": adam, "scheduler": exploding, "epochs": 5}
    return fit(mlp() if model is None else model, tensors(60, validation=20), out, **(given | options))


# ---- the validation attack -------------------------------------------------------------------------------------------


class Harmless(wb.attacks.Attack[wb.attacks.AttackState]):
    """Finds nothing, and reports success."""

    num_steps = 1

    def init(self, inputs: Any) -> wb.attacks.AttackState:
        return wb.attacks.AttackState.initial(inputs, inputs.x)

    def update(self, model: nn.Module, inputs: Any, state: wb.attacks.AttackState) -> wb.attacks.AttackState:
        return replace(state, adversarial=torch.ones_like(state.adversarial))


class Outside(Harmless):
    """Returns points outside the ball."""

    def init(self, inputs: Any) -> wb.attacks.AttackState:
        return wb.attacks.AttackState.initial(inputs, (inputs.x < 0.5).float())


def line() -> wb.data.Tensors:
    x = torch.linspace(0.01, 0.99, 40)[:, None]
    return wb.data.Tensors(x, (x[:, 0] < 0.5).long(), x, (x[:, 0] < 0.5).long(), validation=30)


def validated(out: Path, **options: Any) -> tuple[float, float]:
    """Held-out clean and robust accuracy of a model with known distances that stands still."""
    still = partial(torch.optim.SGD, lr=0.0)
    run = fit(halves().float(), line(), out, radius=Fixed(0.2), optimizer=still, epochs=1, **options)
    assert run.metrics is not None
    return run.metrics["validation_clean"].item(), run.metrics["validation_robust"].item()


def test_the_validation_attack_is_stronger_than_the_training_attack(tmp_path: Path) -> None:
    clean, robust = validated(tmp_path / "default", attack=Harmless())
    assert clean == 1
    rows = line().validation()
    assert rows is not None
    distance = (rows.tensors()[0][:, 0] - 0.5).abs()
    assert robust == pytest.approx((distance > 0.2).float().mean().item())


def test_one_step_from_beyond_the_ball_is_validated_within_it(tmp_path: Path) -> None:
    assert validated(tmp_path / "run", attack=wb.attacks.NFGSM()) == validated(tmp_path / "plain")


@pytest.mark.parametrize("attack", [Harmless(), Outside()])
def test_points_of_the_validation_attack_are_verified(tmp_path: Path, attack: Any) -> None:
    assert validated(tmp_path / "run", validation_attack=attack) == (1, 1)


def test_a_validation_attack_of_ones_own(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", validation_attack=wb.attacks.FGSM(), epochs=1, scheduler=None)
    assert run.config["validation_attack"]["class_path"] == "wideberth.attacks.FGSM"
    default = run_of(tmp_path / "default", epochs=1, scheduler=None).config["validation_attack"]
    assert default["class_path"] == "wideberth.attacks.PGD"
    assert (default["init_args"]["steps"], default["init_args"]["loss"]) == (10, "wideberth.losses.margin_loss")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_in_half_precision_a_point_on_the_sphere_is_inside(tmp_path: Path, norm: Any) -> None:
    attack = wb.attacks.PGD(norm=norm, steps=2)
    radius = Fixed({"linf": 0.3, "l2": 0.5, "l1": 0.8}[norm])
    options = {"attack": attack, "radius": radius, "scheduler": None, "epochs": 3}
    scores = [
        run_of(tmp_path / precision, **options, trainer={"precision": precision}).metrics["validation_robust"].iloc[-1]  # type: ignore[index]
        for precision in ("32-true", "bf16-true")
    ]
    assert scores[1] <= scores[0] + 0.15


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_exported(tmp_path: Path) -> None:
    model = mlp()
    run = run_of(tmp_path / "run", model, keep="best")
    assert run.metrics is not None
    best = int(run.metrics["validation_robust"].idxmax())
    assert best < 3
    assert run.export == {"epoch": best, "keep": "best", "ended": None}
    kept, last = (wb.load_model(str(run.path / "checkpoints" / f"{name}.ckpt")) for name in ("best", "last"))
    x, y, _ = tensors(60, validation=20).test().tensors()
    assert torch.equal(wb.load_model(str(run.path))(x), kept(x))
    assert torch.equal(model.eval()(x), kept(x))
    assert not torch.equal(last(x), kept(x))
    held_out = tensors(60, validation=20).validation()
    assert held_out is not None
    x, y, _ = held_out.tensors()
    assert run.metrics["validation_clean"].iloc[best] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    before = (run.path / "model.safetensors").read_bytes()
    again = run_of(tmp_path / "run", keep="best", resume=True)
    assert (again.path / "model.safetensors").read_bytes() == before
    assert again.export == run.export


def test_radii_are_those_of_the_epoch_that_is_kept(tmp_path: Path) -> None:
    radius = wb.radii.InstanceAdaptive(0.02, gamma=0.001, warmup=0)
    run = run_of(tmp_path / "run", radius=radius, keep="best")
    assert run.export is not None
    assert run.metrics is not None
    assert run.samples is not None
    assert run.export["epoch"] < 4
    assert run.samples["radius"].mean() == pytest.approx(run.metrics["radius_mean"][run.export["epoch"]], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "best"}, 'keep="best": no rows are held out'),
        ({"patience": 2}, "patience=2: no rows are held out"),
        ({"patience": 0}, "patience=0: must be at least 1"),
        ({"keep": "worst"}, "keep='worst': accepted are last, best"),
        ({"guard": OverfittingGuard(), "radius": Zero()}, "guard with radius=Zero"),
        (
            {"validation_attack": wb.attacks.PGD(norm="l2")},
            "validation_attack.norm='l2' with attack.norm='linf': must be the same",
        ),
        (
            {"validation_attack": wb.attacks.NFGSM()},
            "validation_attack=NFGSM with attack=PGD: must keep to the same radius",
        ),
        ({"validation_attack": wb.attacks.PGD(box=(0.0, 2.0))}, "validation_attack.box="),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        fit(mlp(), tensors(), tmp_path / "run", **({"radius": Fixed(0.1)} | options))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


# ---- patience -------------------------------------------------------------------------------------------------------


def test_patience(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path / "run", patience=2, epochs=20, keep="best")
    assert run.metrics is not None
    scores = run.metrics["validation_robust"]
    best = int(scores.idxmax())
    assert len(scores) == best + 3 < 20
    assert run.export is not None
    assert run.export["epoch"] == best
    assert run.export["ended"] == f"stopped after epoch {best + 3}: held-out accuracy has not risen for 2 epochs"
    assert caplog.messages == [run.export["ended"]]
    before = (run.path / "model.safetensors").read_bytes()
    again = run_of(tmp_path / "run", patience=2, epochs=20, keep="best", resume=True)
    assert again.metrics is not None
    assert again.metrics.equals(run.metrics)
    assert (again.path / "model.safetensors").read_bytes() == before
    assert again.export == run.export


def test_a_resumed_run_is_no_more_patient(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", patience=2, epochs=20)
    assert whole.metrics is not None
    run_of(tmp_path / "run", patience=2, epochs=len(whole.metrics) - 1)
    resumed = run_of(tmp_path / "run", patience=2, epochs=20, resume=True)
    assert resumed.metrics is not None
    assert resumed.metrics.drop(columns="seconds").equals(whole.metrics.drop(columns="seconds"))
    assert resumed.export == whole.export


# ---- the guard ------------------------------------------------------------------------------------------------------


def test_the_guard_keeps_the_epoch_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The batch is all there is, so that nothing but the weights changes from epoch to epoch."""
    model = mlp()
    options: dict[str, Any] = {"batch_size": 40, "scheduler": partial(exploding, after=12)}
    options["optimizer"] = partial(torch.optim.Adam, lr=0.05)
    run = run_of(tmp_path / "run", model, guard=OverfittingGuard(0.2, steps=3), epochs=20, **options)
    assert run.metrics is not None
    last = len(run.metrics) - 1
    assert 12 <= last < 19
    robust = run.metrics["guard_robust"]
    assert robust[last - 1] - robust[last] > 0.2
    assert (robust.diff()[1:last] > -0.2).all()
    assert run.export is not None
    assert run.export["epoch"] == last - 1
    assert run.export["ended"].endswith(f"in epoch {last + 1}: training stops, and that epoch is not kept")
    assert caplog.messages == [run.export["ended"]]
    straight = mlp()
    run_of(tmp_path / "straight", straight, epochs=last, **options)
    assert all(map(torch.equal, model.state_dict().values(), straight.state_dict().values()))
    assert all(map(torch.equal, wb.load_model(str(run.path)).state_dict().values(), straight.state_dict().values()))
    # Going on from there is the same epoch again, with the same end.
    again = run_of(tmp_path / "run", guard=OverfittingGuard(0.2, steps=3), epochs=20, resume=True, **options)
    assert again.metrics is not None
    assert again.metrics.drop(columns="seconds").equals(run.metrics.drop(columns="seconds"))
    assert again.export == run.export


def test_the_guard_leaves_a_sound_run_alone(tmp_path: Path) -> None:
    models = mlp(batch_norm=True), mlp(batch_norm=True)
    for name, model, guard in (("with", models[0], OverfittingGuard()), ("without", models[1], None)):
        run = run_of(tmp_path / name, model, scheduler=None, guard=guard, epochs=3, batch_size=40)
        assert run.export == {"epoch": 2, "keep": "last", "ended": None}
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


@pytest.mark.parametrize(("options", "message"), [({"drop": 1.5}, "drop=1.5"), ({"steps": 0}, "steps=0")])
def test_guards_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(wb.InputError, match=message):
        OverfittingGuard(**options)
