"""AWP: the gradient of the weights around, the weights themselves exactly where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import adam, batch_of, fit, mlp, module_of, seeded, tensors

import wideberth as wb
from wideberth.training.perturbation import AWP, check_perturbation, layers, rescaled
from wideberth.training.radii import Fixed, InstanceAdaptive
from wideberth.training.regularizers import EffectiveMargin


def test_the_move_has_the_length_of_the_weights() -> None:
    assert rescaled(torch.tensor([[0.0, 0.001]]), torch.tensor([[3.0, 4.0]])).tolist() == [[0.0, 5.0]]
    for nowhere in ([0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        assert rescaled(torch.tensor([nowhere]), torch.tensor([[3.0, 4.0]])).tolist() == [[0.0, 0.0]]
    half = rescaled(torch.full((300, 300), 300.0, dtype=torch.float16), torch.ones(300, 300, dtype=torch.float16))
    assert torch.equal(half, torch.ones_like(half))  # whose norm overflows in half precision


def network() -> nn.Module:
    made: nn.Module = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.4),
            nn.Linear(144, 3),
        )
    )
    return made


def test_what_moves() -> None:
    model = network()
    assert [tuple(weight.shape) for weight in layers(model)] == [(4, 1, 3, 3), (3, 144)]
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with AWP(0.1).moved(model, [torch.ones(3, 144)]):
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert changed == ["5.weight"]
        moved = model[5].weight - before["5.weight"]
        assert moved.norm().item() == pytest.approx(0.1 * before["5.weight"].norm().item(), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def by_hand(model: nn.Module, x: Tensor, y: Tensor, eps: float, gamma: float) -> list[Tensor]:
    """One step of AWP with plain SGD on a copy without batch norm, written out: attack, climb, gradient, step."""
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    point = (x + eps * slope.sign()).clamp(0, 1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ascent = torch.autograd.grad(F.cross_entropy(model(point), y), parameters)
    moved = {
        name: p + gamma * p.norm() / g.norm() * g if name.endswith("weight") else p
        for name, p, g in zip(names, (p.detach() for p in parameters), ascent, strict=True)
    }
    for value in moved.values():
        value.requires_grad_()
    loss = F.cross_entropy(torch.func.functional_call(model, moved, (point,)), y)
    gradients = torch.autograd.grad(loss, list(moved.values()))
    return [p.detach() - 0.1 * g for p, g in zip(parameters, gradients, strict=True)]


def test_one_step_is_the_one_written_by_hand(tmp_path: Path) -> None:
    data, trained, gamma = tensors(), mlp(), 0.3
    options = {"attack": wb.attacks.FGSM(), "radius": Fixed(0.07), "epochs": 1, "batch_size": 12}
    fit(trained, data, tmp_path / "run", perturbation=AWP(gamma), **options)
    x, y, _ = data.train().tensors()
    expected, plain = by_hand(mlp(), x, y, 0.07, gamma), by_hand(mlp(), x, y, 0.07, 0.0)
    for ours, theirs, without in zip(trained.parameters(), expected, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)
        assert not torch.allclose(ours, without, atol=1e-4)


class Stop(Exception):
    pass


class Failing(wb.objectives.AdversarialCrossEntropy):
    """Fails at a terms."""

    def __init__(self, at: int) -> None:
        super().__init__()
        object.__setattr__(self, "left", [at])

    def compute(self, batch: Any, points: Any) -> Any:
        self.left[0] -= 1  # type: ignore[attr-defined]
        if self.left[0] < 0:  # type: ignore[attr-defined]
            raise Stop
        return super().compute(batch, points)


@pytest.mark.parametrize("at", [0, 1])
def test_everything_is_put_back_when_a_step_fails(at: int) -> None:
    module = module_of(mlp(batch_norm=True), radius=Fixed(0.1), perturbation=AWP(0.1), objective=Failing(at))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(Stop):
        module.training_step(batch_of(tensors(), [0, 1, 2, 3]), 0)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("model.") for name in changed)


@pytest.mark.parametrize("objective", [wb.objectives.AdversarialCrossEntropy(), wb.objectives.TRADES()])
def test_a_climb_leaves_no_trace(objective: Any) -> None:
    """Buffers and dropout after a step are those of a step without it, and weights move in the optimizer alone."""
    states, draws, modules = [], [], []
    for perturbation in (None, AWP(0.1)):
        torch.manual_seed(3)
        module = module_of(
            network(),
            attack=wb.attacks.PGD(steps=1),
            radius=Fixed(0.1),
            objective=objective,
            perturbation=perturbation,
            regularizers=[EffectiveMargin(0.1)],
        )
        weights = [p.detach().clone() for p in module.model.parameters()]
        loss = module.training_step(batch_of(tensors(12, (1, 6, 6)), [0, 1, 2, 3]), 0)
        assert all(map(torch.equal, weights, (p.detach() for p in module.model.parameters())))
        loss.backward()
        assert all(map(torch.equal, weights, (p.detach() for p in module.model.parameters())))
        states.append({name: b.clone() for name, b in module.model.named_buffers()})
        draws.append(torch.random.get_rng_state())
        modules.append(module)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(states[0]["1.num_batches_tracked"], states[1]["1.num_batches_tracked"])
    assert not torch.equal(states[0]["1.running_mean"], states[1]["1.running_mean"])  # of the moved weights
    assert not torch.equal(modules[0].model[5].weight.grad, modules[1].model[5].weight.grad)


def test_without_a_move_it_is_the_step_without_it(tmp_path: Path) -> None:
    """With gamma 0 the climb runs and goes nowhere; also before `warmup`."""
    models = []
    for name, perturbation in (("none", None), ("zero", AWP(0.0)), ("later", AWP(0.5, warmup=2))):
        models.append(mlp(batch_norm=True))
        options = {"radius": InstanceAdaptive(0.1, warmup=0), "regularizers": [EffectiveMargin(0.01)]}
        fit(models[-1], tensors(), tmp_path / name, perturbation=perturbation, **options)
    for model in models[1:]:
        assert all(map(torch.equal, models[0].state_dict().values(), model.state_dict().values()))


def test_radii_and_accuracies_are_those_of_the_weights_before() -> None:
    module = module_of(mlp(), radius=InstanceAdaptive(0.1, gamma=0.01, warmup=0), perturbation=AWP(100.0))
    logged: dict[str, Any] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    same = module_of(mlp(), radius=InstanceAdaptive(0.1, gamma=0.01, warmup=0))
    expected: dict[str, Any] = {}
    same.log_dict = lambda values, **_: expected.update(values)  # type: ignore[method-assign]
    for each in (module, same):
        each.training_step(batch_of(tensors(), [0, 1, 2, 3, 4]), 0)
    assert torch.equal(module.radius.radii, same.radius.radii)
    assert logged["accuracy_adversarial"] == expected["accuracy_adversarial"]
    assert logged["loss"] > expected["loss"] + 1


def test_the_teacher_learns_too() -> None:
    """What an objective trains beside the model gets its gradient, and its batch norm sees the batch once."""
    objective = wb.objectives.LBGAT(mlp(width=6, batch_norm=True))
    module = module_of(mlp(), radius=Fixed(0.1), objective=objective, perturbation=AWP(0.1))
    module.training_step(batch_of(tensors(), [0, 1, 2, 3]), 0).backward()
    assert all(p.grad is not None for p in module.parameters())
    norm = next(layer for layer in objective.modules() if isinstance(layer, nn.BatchNorm1d))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precision(tmp_path: Path, precision: str) -> None:
    losses = []
    for gamma in (0.0, 1.0):
        trainer = {"precision": precision}
        run = fit(
            mlp(),
            tensors(),
            tmp_path / str(gamma),
            radius=Fixed(0.1),
            perturbation=AWP(gamma),
            trainer=trainer,
            epochs=1,
        )
        assert run.metrics is not None
        losses.append(run.metrics["loss"].iloc[0])
    assert losses[1] > losses[0] + 0.1


def test_autocasts_copies_of_the_weights_are_not_used_again() -> None:
    losses = []
    for gamma in (0.0, 10.0):
        module = module_of(mlp(), attack=wb.attacks.FGSM(), radius=Fixed(0.1), perturbation=AWP(gamma))
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(module.training_step(batch_of(tensors(), [0, 1, 2, 3]), 0).item())
            torch.clear_autocast_cache()
    assert losses[1] > losses[0] + 0.5


def test_accumulated_batches_climb_by_themselves(tmp_path: Path) -> None:
    data, trained, expected = tensors(), mlp(), mlp()
    options = {"attack": wb.attacks.FGSM(), "radius": Fixed(0.07), "epochs": 1, "batch_size": 6}
    fit(trained, data, tmp_path / "run", perturbation=AWP(0.3), trainer={"accumulate_grad_batches": 2}, **options)
    split = data.train()
    halves = list(wb.data.loader(split, 6, shuffle=True, seed=0))
    steps = [by_hand(mlp(), x, y, 0.07, 0.3) for x, y, _ in halves]
    for ours, *both in zip(trained.parameters(), *steps, strict=True):
        assert torch.allclose(ours, (both[0] + both[1]) / 2, atol=1e-7)
    assert not torch.equal(next(trained.parameters()), next(expected.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation": lambda: AWP(-0.1)}, "gamma=-0.1: must be at least 0"),
        ({"perturbation": lambda: AWP(warmup=-1)}, "warmup=-1: must be at least 0"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        fit(mlp(), tensors(), tmp_path / "run", **(options | {"perturbation": options["perturbation"]()}))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_float16_is_refused() -> None:
    """Lightning makes bfloat16 of it on a CPU."""
    with pytest.raises(wb.InputError, match=r'perturbation=AWP with precision="16-mixed": .*use "bf16-mixed"'):
        check_perturbation(AWP(), mlp(), "16-mixed")
    check_perturbation(None, mlp(), "16-mixed")


def test_a_model_with_nothing_to_move_is_refused() -> None:
    frozen = mlp()
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    with pytest.raises(wb.InputError, match="no trainable weights of more than one dimension"):
        module_of(frozen, perturbation=AWP())


def test_momentum_and_decay_are_the_optimizers_own(tmp_path: Path) -> None:
    """Any optimizer: what it is given is a gradient, and the weights as they are."""
    run = fit(mlp(), tensors(), tmp_path / "run", radius=Fixed(0.1), perturbation=AWP(), optimizer=adam)
    assert run.finished
    assert run.config["perturbation"] == {
        "class_path": "wideberth.training.perturbation.AWP",
        "init_args": {"gamma": 0.01, "warmup": 0},
    }
