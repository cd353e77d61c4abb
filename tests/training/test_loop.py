"""The loop: every legal combination trains, what it pays is what the formula says, and nothing else is moved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from examples import examples
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import batch_of, fit, halves, mlp, module_of, plain_sgd, seeded, tensors

import wideberth as wb
from wideberth.training.catalogue import exported
from wideberth.training.objectives import (
    ALP,
    LBGAT,
    MART,
    TRADES,
    AdversarialCrossEntropy,
    CleanCrossEntropy,
    MaxMargin,
    Objective,
)
from wideberth.training.radii import ClassWise, Fixed, InstanceAdaptive, Radius, ShortestSuccessful, Zero
from wideberth.training.regularizers import EffectiveMargin, InputGradient, Regularizer

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "CleanCrossEntropy": CleanCrossEntropy,
    "AdversarialCrossEntropy": AdversarialCrossEntropy,
    "TRADES": TRADES,
    "TRADES attack": lambda: TRADES(2.0, inner="attack"),
    "MART": MART,
    "ALP": ALP,
    "LBGAT": lambda: LBGAT(mlp(width=6, batch_norm=True)),
    "LBGAT divergence": lambda: LBGAT(mlp(width=6, batch_norm=True), beta=2.0),
    "MaxMargin": MaxMargin,
}
RADII: dict[str, Callable[[], Radius]] = {
    "Zero": Zero,
    "Fixed": lambda: Fixed(0.1),
    "InstanceAdaptive": lambda: InstanceAdaptive(0.1, warmup=0),
    "ClassWise": lambda: ClassWise([0.1, 0.05, 0.2]),
    "ShortestSuccessful": lambda: ShortestSuccessful(0.3, 0.05),
    "InstanceAdaptive lookahead": lambda: InstanceAdaptive(0.1, "lookahead", warmup=0, misclassified="decay"),
}
REGULARIZERS: dict[str, Callable[[], list[Regularizer]]] = {
    "none": list,
    **{name: lambda make=make: [make()] for name, make in examples("regularizers").items()},  # type: ignore[misc]
    "EffectiveMargin exact": lambda: [EffectiveMargin(0.1, "exact")],
    "EffectiveMargin softmax": lambda: [EffectiveMargin(0.1, "softmax")],
    "InputGradient finite": lambda: [InputGradient(0.1, "finite")],
    "both": lambda: [InputGradient(0.1), EffectiveMargin(0.1, draws=2)],
}
# Every two of them together, and TRADES on learned radii with everything.
COMBINATIONS = [
    (objective, radius, regularizer)
    for objective, radius, regularizer in product(OBJECTIVES, RADII, REGULARIZERS)
    if regularizer == "none"
    or (objective, radius) == ("TRADES", "InstanceAdaptive")
    or radius == "Fixed"
    or objective == "AdversarialCrossEntropy"
]


def legal(objective: str, radius: str) -> bool:
    return radius == "Zero" or objective != "CleanCrossEntropy"


def test_every_policy_has_a_row() -> None:
    for option, table in (("objective", OBJECTIVES), ("radius", RADII)):
        assert exported(option).keys() <= table.keys()


@pytest.mark.parametrize(
    ("objective", "radius", "regularizer", "norm"),
    [(*c, norm) for c in COMBINATIONS for norm in ("linf", "l2", "l1") if norm == "linf" or c[2] == "none"],
)
def test_every_combination(objective: str, radius: str, regularizer: str, norm: Any) -> None:
    def make() -> wb.RobustTraining:
        return module_of(
            mlp(batch_norm=True),
            radius=RADII[radius](),
            objective=OBJECTIVES[objective](),
            regularizers=REGULARIZERS[regularizer](),
            attack=wb.attacks.PGD(norm=norm, steps=2),
        )

    if not legal(objective, radius):
        with pytest.raises(wb.InputError, match=f"radius=\\w+ with objective={objective}: ") as refusal:
            make()
        assert "\n" not in str(refusal.value)
        return
    module, data = make(), tensors()
    optimizer = plain_sgd(module.parameters())
    for place, rows in enumerate(([0, 1, 2, 3], [4, 5, 6, 7, 8])):
        loss = module.training_step(batch_of(data, rows), place)
        assert loss.shape == ()
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
        assert all(gradient.abs().max() > 0 for gradient in gradients if gradient is not None)
        optimizer.step()
    assert module.model.training
    assert module.visited.nonzero().flatten().tolist() == list(range(9))


@pytest.mark.parametrize(("objective", "radius", "regularizer"), [c for c in COMBINATIONS if legal(*c[:2])])
def test_a_batch_twice_costs_the_same(objective: str, radius: str, regularizer: str) -> None:
    """Means over samples, everywhere: also in train mode, where the batch's statistics are those of its double."""

    batch = batch_of(tensors(), list(range(6)))
    double = tuple(torch.cat([part, part]) for part in batch)
    losses = []
    for given in (batch, double):
        module = module_of(
            mlp(batch_norm=True),
            radius=RADII[radius](),
            objective=OBJECTIVES[objective](),
            regularizers=REGULARIZERS[regularizer](),
        ).double()
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.momentum = 0  # the running variance is the unbiased one, which a double changes
        losses.append(module.training_step((given[0].double(), *given[1:]), 0))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)


@pytest.mark.parametrize("start", ["none", "gaussian", "uniform"])
@pytest.mark.parametrize("inner", ["kl", "attack"])
@pytest.mark.parametrize("radius", RADII)
def test_an_attack_that_could_not_move_is_refused(start: Any, inner: Any, radius: str) -> None:
    def make() -> wb.RobustTraining:
        attack = wb.attacks.PGD(steps=2, start=start)
        return module_of(mlp(), attack=attack, radius=RADII[radius](), objective=TRADES(inner=inner))

    if start == "none" and inner == "kl" and radius != "Zero":
        with pytest.raises(wb.InputError, match=r'attack.start="none" with objective=TRADES: the gradient of the KL'):
            make()
    else:
        make()


# ---- what is paid ---------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Adversarial training by one step of FGSM, written out."""
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    return F.cross_entropy(model((x + eps * gradient.sign()).clamp(0, 1)), y)


def test_one_step_is_the_one_written_by_hand(tmp_path: Path) -> None:
    data, eps = tensors(), 0.07
    trained, expected = mlp(), mlp()
    run = fit(
        trained,
        data,
        tmp_path / "run",
        attack=wb.attacks.FGSM(),
        radius=Fixed(eps),
        regularizers=[InputGradient(0.3)],
        epochs=1,
        batch_size=12,
    )
    x, y, _ = data.train().tensors()
    point = x.clone().requires_grad_()
    paid = by_hand(expected, x, y, eps)
    # The regularizer looks where the adversary stands.
    (gradient,) = torch.autograd.grad(F.cross_entropy(expected(point), y, reduction="sum"), point)
    point = (x + eps * gradient.sign()).clamp(0, 1).requires_grad_()
    loss_there = F.cross_entropy(expected(point), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss_there, point, create_graph=True)
    penalty = 0.3 * gradient.square().sum(1).mean()
    optimizer = plain_sgd(expected.parameters())
    (paid + penalty).backward()
    optimizer.step()
    for ours, theirs in zip(trained.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)
    assert run.metrics is not None
    row = run.metrics.iloc[0]
    assert row["loss"] == pytest.approx((paid + penalty).item(), rel=1e-5)
    assert row["penalty"] == pytest.approx(penalty.item(), rel=1e-5)


def test_a_scheduled_weight_of_zero_costs_nothing() -> None:
    class Never(Regularizer):
        def compute(self, *_: Any) -> Tensor:
            raise AssertionError("asked at weight 0")

    module = module_of(mlp(), regularizers=[Never(wb.schedules.Ramp(1.0, 3))])
    assert torch.isfinite(module.training_step(batch_of(tensors(), [0, 1]), 0))
    with pytest.raises(AssertionError, match="asked"):
        module.training_step(batch_of(tensors(), [0, 1]), 1)


def test_radius_zero_is_standard_training() -> None:
    batch = batch_of(tensors(), [0, 1, 2])
    losses = [
        module_of(mlp(), objective=objective, radius=radius).training_step(batch, 0).item()
        for objective, radius in (
            (CleanCrossEntropy(), Zero()),
            (AdversarialCrossEntropy(), Zero()),
            (AdversarialCrossEntropy(), Fixed(0.0)),
            (TRADES(), Zero()),
        )
    ]
    assert losses == pytest.approx([F.cross_entropy(mlp()(batch[0]), batch[1]).item()] * 4, rel=1e-6)


# ---- what is left alone ---------------------------------------------------------------------------------------------


def batch_norm_of(module: nn.Module) -> nn.BatchNorm1d:
    return next(layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d))


FORWARDS = dict.fromkeys(OBJECTIVES, 2) | {"CleanCrossEntropy": 1, "AdversarialCrossEntropy": 1, "LBGAT": 1}


@pytest.mark.parametrize("attack", [wb.attacks.FGSM(start="uniform"), wb.attacks.PGD(steps=3)])
@pytest.mark.parametrize(("objective", "radius"), [c for c in product(OBJECTIVES, RADII) if legal(*c)])
def test_batch_norm_sees_the_objectives_forwards_alone(objective: str, radius: str, attack: Any) -> None:
    module = module_of(
        mlp(batch_norm=True),
        attack=attack,
        radius=RADII[radius](),
        objective=OBJECTIVES[objective](),
        regularizers=REGULARIZERS["both"](),
    )
    norm = batch_norm_of(module)
    for steps in (1, 2):
        module.training_step(batch_of(tensors(), [0, 1, 2, 3]), 0)
        assert norm.num_batches_tracked == steps * FORWARDS[objective]


def test_attack_mode_train_is_honoured() -> None:
    module = module_of(mlp(batch_norm=True), attack=wb.attacks.PGD(steps=3), radius=Fixed(0.1), attack_mode="train")
    norm = batch_norm_of(module)
    module.training_step(batch_of(tensors(), [0, 1, 2, 3]), 0)
    assert norm.num_batches_tracked == 3 + 1


def test_a_frozen_batch_norm_stays_frozen() -> None:
    model = mlp(batch_norm=True)
    module = module_of(model, radius=InstanceAdaptive(0.1, "lookahead", warmup=0), regularizers=[EffectiveMargin(0.1)])
    norm = batch_norm_of(module)
    norm.eval()
    module.training_step(batch_of(tensors(), [0, 1, 2, 3]), 0)
    assert not norm.training
    assert norm.num_batches_tracked == 0


def test_a_model_that_comes_in_eval_mode_is_trained_in_train_mode(tmp_path: Path) -> None:
    """As `load_model` gives it; but what alone is in eval mode was frozen on purpose."""
    for frozen in (False, True):
        model = mlp(batch_norm=True)
        norm = batch_norm_of(model)
        norm.eval() if frozen else model.eval()
        fit(model, tensors(), tmp_path / str(frozen), epochs=1, batch_size=4)
        assert norm.num_batches_tracked == (0 if frozen else 3)


def test_a_step_draws_nothing_from_the_global_generator() -> None:
    module = module_of(mlp(), radius=InstanceAdaptive(0.1, "lookahead", warmup=0), regularizers=[EffectiveMargin(0.1)])
    batch = batch_of(tensors(), [0, 1, 2, 3])
    before = torch.random.get_rng_state()
    module.training_step(batch, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- through the trainer --------------------------------------------------------------------------------------------


class Poison(L.Callback):
    """Makes the weights NaN before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            next(pl_module.parameters()).data.fill_(float("nan"))


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    data, out = tensors(), tmp_path / "run"
    with pytest.raises(wb.Diverged, match=r"The loss is not finite at step 4 \(epoch 1\)") as refusal:
        fit(mlp(), data, out, epochs=3, trainer={"callbacks": [Poison(4)]})
    assert "\n" not in str(refusal.value)
    run = wb.Run(out)
    assert not run.finished
    assert run.checkpoint is not None
    saved = torch.load(run.checkpoint, weights_only=True)
    assert saved["epoch"] == 0
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
    after, straight = mlp(), mlp()
    fit(after, data, out, epochs=3, resume=True)
    fit(straight, data, tmp_path / "straight", epochs=3)
    assert all(map(torch.equal, after.state_dict().values(), straight.state_dict().values()))


def test_divergence_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(wb.Diverged, match=r"at step 0 \(epoch 0\)"):
        fit(mlp(), tensors(), tmp_path / "run", trainer={"callbacks": [Poison(0)]})
    run = wb.Run(tmp_path / "run")
    assert run.checkpoint is None
    fit(mlp(), tensors(), tmp_path / "run")  # nothing there to protect


def test_gradient_clipping(tmp_path: Path) -> None:
    start, trained = mlp(), mlp()
    fit(trained, tensors(), tmp_path / "run", epochs=1, batch_size=12, trainer={"gradient_clip_val": 0.01})
    moved = [b.detach() - a.detach() for a, b in zip(start.parameters(), trained.parameters(), strict=True)]
    length = torch.cat([m.flatten() for m in moved]).norm().item()
    assert length == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
@pytest.mark.parametrize("rule", ["simple", "lookahead"])
def test_precision(tmp_path: Path, precision: str, rule: Any) -> None:
    """Whatever the model computes in, a radius keeps its bits: in bfloat16, 0.1 + 0.0001 is 0.1."""
    run = fit(
        mlp(),
        tensors(8),
        tmp_path / "run",
        radius=InstanceAdaptive(0.1, rule, gamma=1e-4, beta=0.5, warmup=0),
        regularizers=[EffectiveMargin(0.01)],
        epochs=1,
        trainer={"precision": precision},
    )
    assert run.metrics is not None
    assert torch.isfinite(torch.tensor(run.metrics["loss"])).all()
    assert run.samples is not None
    moved = (run.samples["radius"] - 0.1).abs()
    size = 1e-4 if rule == "simple" else 0.5e-4
    assert moved.to_numpy() == pytest.approx(size, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devcies": 2}, "trainer: .*unexpected keyword argument 'devcies'.*; see lightning.Trainer"),
        ({"precision": "17"}, "trainer: .*precision"),
        ({"accelerator": "abacus"}, "trainer: .*abacus"),
    ],
)
def test_bad_trainer_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        fit(mlp(), tensors(), tmp_path / "run", trainer=options)
    assert "\n" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_the_module_in_a_trainer_of_ones_own(tmp_path: Path) -> None:
    data = tensors()
    policies = wb.Policies(attack=wb.attacks.PGD(steps=2), radius=InstanceAdaptive(0.1, warmup=0))
    module = wb.RobustTraining(mlp(), 12, policies, wb.Optimization(plain_sgd))
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, wb.data.loader(data.train(), 4, shuffle=True), wb.data.loader(data.test(), 2, shuffle=False))
    assert trainer.global_step == 6
    assert (module.radius.radii != 0.1).any()
    assert 0 <= trainer.callback_metrics["validation_robust"] <= trainer.callback_metrics["validation_clean"] <= 1


def test_a_scheduler_may_step_every_step(tmp_path: Path) -> None:
    def decay(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    for interval, rates, last in (("epoch", [0.1, 0.05], 0.025), ("step", [0.1, 0.1 / 8], 0.1 / 64)):
        run = fit(mlp(), tensors(), tmp_path / interval, scheduler=decay, scheduler_interval=interval)
        assert run.metrics is not None
        assert run.metrics["learning_rate"].tolist() == pytest.approx(rates)  # with which each epoch began
        assert run.checkpoint is not None
        saved = torch.load(run.checkpoint, weights_only=True)
        assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(last)


def test_validation_is_at_the_nominal_radius(tmp_path: Path) -> None:
    """On a model whose distances are known, and that stands still."""
    x = torch.linspace(0.01, 0.99, 40)[:, None]
    y = (x[:, 0] < 0.4).long()  # class 1 is below 1/2: those between 0.4 and 0.5 are misclassified
    data = wb.data.Tensors(x, y, x, y, validation=30)
    held_out = data.validation()
    assert held_out is not None
    inputs, labels, _ = held_out.tensors()
    distance = (inputs[:, 0] - 0.5) * (1 - 2 * labels)
    for name, radius in (
        ("fixed", Fixed(0.2, warmup=5)),
        ("adaptive", InstanceAdaptive(0.2, warmup=5)),
        ("zero", Zero()),
    ):
        run = fit(
            halves().float(),
            data,
            tmp_path / name,
            radius=radius,
            attack=wb.attacks.FGSM(),
            optimizer=partial(torch.optim.SGD, lr=0.0),
            epochs=1,
        )
        assert run.metrics is not None
        robust = (distance > radius.eval_eps()).float().mean().item()
        if name == "zero":  # clean accuracy is not to be called robust
            assert "validation_robust" not in run.metrics
        else:
            assert run.metrics["validation_robust"].tolist() == pytest.approx([robust])
        assert run.metrics["validation_clean"].tolist() == pytest.approx([(distance > 0).float().mean().item()])


def test_a_sample_meets_new_noise_in_every_epoch_and_the_same_in_every_batch() -> None:
    seen: list[Tensor] = []

    class Spy(wb.attacks.PGD):
        def init(self, inputs: Any) -> Any:
            seen.append(inputs.noise.uniform((4,)))
            return super().init(inputs)

    module = module_of(mlp(), attack=Spy(steps=1), radius=Fixed(0.1))
    for epoch, rows in ((0, [3, 1]), (0, [1, 7, 3]), (1, [3, 1])):
        module._trainer.current_epoch = epoch  # type: ignore[union-attr]
        module.training_step(batch_of(tensors(), rows), 0)
    assert torch.equal(seen[0], seen[1][[2, 0]])
    assert (seen[0] != seen[2]).all()


def test_seed_matters(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = mlp()
        fit(model, tensors(), tmp_path / name, radius=Fixed(0.1), seed=seed, epochs=1)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_channels_last_and_images(tmp_path: Path) -> None:
    made = seeded(lambda: wb.models.ConvNet((1, 8, 8), 3, 4, 1))
    run = fit(
        made,
        tensors(8, (1, 8, 8)),
        tmp_path / "run",
        radius=Fixed(0.1),
        channels_last=True,
        augment=wb.data.CropFlip(1),
        regularizers=[EffectiveMargin(0.01)],
    )
    assert run.finished
    assert torch.equal(wb.load_model(str(run.path)).head.weight, made.head.weight)
