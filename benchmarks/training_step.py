"""What a training step costs, as ratios to its floor, side by side in one run.

PreActResNet-18 on 3x32x32, batch 32, 10 attack steps. The floor of a PGD-AT step is 10 x (forward + input gradient
with frozen weights) and 1 x (forward + backward): nothing less computes the same. Ours are timed inside Lightning's own
loop, from batch start to batch end, so they also pay for radii, noise, projection, logging and the optimizer.
"/ own" is the ratio to a variant's own floor: the forwards F, input gradients G and updates U on its card in
docs/methods.md, each at what it took by itself in the same round.
"authors' IAAT" is a plain restatement of the three-attack step of the released code: everything in train mode,
`backward` also inside the attacks. Variants take turns, round by round, so that a drifting machine drifts for all.

    uv run python benchmarks/training_step.py
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wideberth as wb
from wideberth.training.module import RobustTraining
from wideberth.training.perturbation import AWP

EPS, STEPS, BATCH = 8 / 255, 10, 32


@dataclass(frozen=True)
class Passes:
    """What a step cannot do without.

    Attributes:
        forwards: F.
        gradients: F + G, a forward and its input gradient.
        updates: U, a forward and full backward.
    """

    forwards: int = 0
    gradients: int = 0
    updates: int = 0

    def seconds(self, forward: float, gradient: float, update: float) -> float:
        """What they take together, at so many seconds each."""
        return self.forwards * forward + self.gradients * gradient + self.updates * update


def one_forward(model: nn.Module, x: Tensor) -> None:
    """F, in eval mode."""
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


def one_update(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """U."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def frozen_attack(model: nn.Module, x: Tensor, y: Tensor, steps: int = STEPS) -> None:
    """The floor of an attack: its forwards and input gradients, and nothing else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    for _ in range(steps):
        point = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()


def floor_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The floor of a PGD-AT step."""
    frozen_attack(model, x, y)
    one_update(model, x, y)


class AuthorsIAAT:
    """The three-attack step of the released IAAT code, restated from its description."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        self.model, self.memory = model, torch.full((samples,), EPS)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def attack(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """PGD-10 with a radius per sample, by `backward`, in train mode."""
        column = eps.view(-1, 1, 1, 1)
        stride = torch.clamp_min(column / (0.5 * STEPS), 2 / 255)
        delta = (torch.rand_like(x) * 2 - 1) * column
        for _ in range(STEPS):
            delta = delta.detach().requires_grad_()
            F.cross_entropy(self.model(x + delta), y).backward()
            assert delta.grad is not None
            moved = (delta + stride * delta.grad.sign()).detach()
            delta = (x + torch.minimum(torch.maximum(moved, -column), column)).clamp(0, 1) - x
        return (x + delta).detach()

    @torch.no_grad()
    def holds(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether the model is right at x."""
        return self.model(x).argmax(1) == y

    def __call__(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """One step: two attacks that look, one that trains."""
        gamma, beta, before = 1.9 / 255, 0.1, self.memory[index]
        right = self.holds(x, y)
        now = self.holds(self.attack(x, y, before), y)
        further = self.holds(self.attack(x, y, before + gamma), y)
        target = torch.where(further, before + gamma, torch.where(now, before, before - gamma))
        eps = beta * (target * right).clamp_min(0) + (1 - beta) * before
        self.memory[index] = eps
        worst = self.attack(x, y, eps)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(worst), y).backward()
        self.optimizer.step()


class Clock(L.Callback):
    """Seconds of each batch, from start to end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.began)


def ours(model: nn.Module, batches: Any, samples: int, **policies: Any) -> Callable[[], float]:
    """One timed step of our loop, inside Lightning."""
    policies.setdefault("attack", wb.attacks.PGD(steps=STEPS, step_size=2 / 255))
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
    module = RobustTraining(model, samples, optimizer=optimizer, **policies)

    def step() -> float:
        clock = Clock()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
            use_distributed_sampler=False,
        )
        trainer.fit(module, batches)
        return clock.seconds[-1]  # the first batch of a fit also pays for warming up

    return step


def timed(run: Callable[[], None]) -> Callable[[], float]:
    """Seconds of a call."""

    def step() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return step


def main() -> None:
    """Time all variants in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="only variants whose name contains this (and floor, units, PGD-AT)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = wb.models.PreActResNet18()
    x, y, index = torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,)), torch.arange(BATCH)
    batches = torch.utils.data.DataLoader([(x, y, index)] * 2, batch_size=None)
    adaptive, fixed, regularizers, objectives = (
        wb.radii.InstanceAdaptive,
        wb.radii.Fixed,
        wb.regularizers,
        wb.objectives,
    )
    scaled = wb.attacks.PGD(steps=STEPS, step_size=wb.attacks.ScaledStep(2, floor=2 / 255))
    authors = AuthorsIAAT(model, BATCH)

    def penalised(regularizer: Any, **policies: Any) -> Callable[[], float]:
        return ours(model, batches, BATCH, regularizers=[regularizer], **policies)

    # Learning rate and weights are such that the numbers stay ordinary while the same batch is seen again and again.
    variants: dict[str, Callable[[], float]] = {
        "floor": timed(lambda: floor_step(model, x, y)),
        "F": timed(lambda: one_forward(model, x)),
        "F + G": timed(lambda: frozen_attack(model, x, y, steps=1)),
        "U": timed(lambda: one_update(model, x, y)),
        "standard": ours(model, batches, BATCH),
        "PGD-AT": ours(model, batches, BATCH, radius=fixed(EPS)),
        "IAAT simple": ours(model, batches, BATCH, radius=adaptive(EPS, warmup=0)),
        "TRADES": ours(model, batches, BATCH, radius=fixed(EPS), objective=objectives.TRADES()),
        "MART": ours(model, batches, BATCH, radius=fixed(EPS), objective=objectives.MART()),
        "ALP": ours(model, batches, BATCH, radius=fixed(EPS), objective=objectives.ALP()),
        "LBGAT": ours(model, batches, BATCH, radius=fixed(EPS), objective=objectives.LBGAT(wb.models.PreActResNet18())),
        "MAIL-AT": ours(model, batches, BATCH, radius=fixed(EPS), weighting=wb.weightings.MAIL(start=0)),
        "GAIRAT": ours(model, batches, BATCH, radius=fixed(EPS), weighting=wb.weightings.GAIRAT(start=0)),
        "MMA": ours(
            model,
            batches,
            BATCH,
            attack=wb.attacks.PGD(steps=STEPS, loss=wb.losses.soft_margin_loss),
            radius=wb.radii.ShortestSuccessful(),
            objective=objectives.MaxMargin(),
        ),
        "AT + AWP": ours(model, batches, BATCH, radius=fixed(EPS), perturbation=AWP()),
        "FGSM-RS": ours(model, batches, BATCH, radius=fixed(EPS), attack=wb.attacks.FGSM(start="uniform")),
        "N-FGSM": ours(model, batches, BATCH, radius=fixed(EPS), attack=wb.attacks.NFGSM()),
        "AT + EMR softmax": penalised(regularizers.EffectiveMargin(1e-4, "softmax"), radius=fixed(EPS)),
        "AT + EMR projection": penalised(regularizers.EffectiveMargin(1e-4, "projection"), radius=fixed(EPS)),
        "AT + Jacobian": penalised(regularizers.Jacobian(2e-4), radius=fixed(EPS)),
        "AT + weights": penalised(regularizers.WeightNorm(1e-4), radius=fixed(EPS)),
        "gradient double": penalised(regularizers.InputGradient(1e-4)),
        "gradient finite": penalised(regularizers.InputGradient(1e-4, "finite")),
        "LLR": penalised(regularizers.LocalLinearity(1e-4, EPS, steps=STEPS)),
        "GradAlign": penalised(regularizers.GradientAlignment(1e-4)),
        "CURE": penalised(regularizers.Curvature(1e-4)),
        "IAAT lookahead": ours(model, batches, BATCH, radius=adaptive(EPS, "lookahead", warmup=0), attack=scaled),
        "authors' IAAT": timed(lambda: authors(x, y, index)),
    }
    # The backward through a gradient of a ReLU net is put in units as on the cards: G as F + G less F.
    counts: dict[str, Passes] = {
        "standard": Passes(updates=1),
        "PGD-AT": Passes(0, STEPS, 1),
        "IAAT simple": Passes(1, STEPS, 1),
        "TRADES": Passes(1, STEPS, 2),
        "MART": Passes(0, STEPS, 2),
        "ALP": Passes(0, STEPS, 2),
        "LBGAT": Passes(1, STEPS, 2),
        "MAIL-AT": Passes(0, STEPS, 1),
        "GAIRAT": Passes(0, STEPS, 1),
        "MMA": Passes(1 + 10, STEPS, 2),
        "AT + AWP": Passes(0, STEPS, 2),
        "FGSM-RS": Passes(0, 1, 1),
        "N-FGSM": Passes(0, 1, 1),
        "AT + EMR softmax": Passes(1, STEPS, 2),
        "AT + EMR projection": Passes(1, STEPS, 2),
        "AT + Jacobian": Passes(1, STEPS, 2),
        "AT + weights": Passes(0, STEPS, 1),
        "gradient double": Passes(updates=1 + 2),
        "gradient finite": Passes(-1, 1, 1 + 2),
        "LLR": Passes(0, STEPS, 1 + 3),
        "GradAlign": Passes(0, 1, 1 + 2),
        "CURE": Passes(updates=1 + 4),
        "IAAT lookahead": Passes(3, 3 * STEPS, 1),
    }
    units = ("F", "F + G", "U")
    always = ("floor", *units, "PGD-AT")
    chosen = {name: run for name, run in variants.items() if options.only in name or name in always}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for round_ in range(options.rounds + 1):
        for name, run in chosen.items():
            taken = run()
            if round_:  # the first round warms up
                seconds[name].append(taken)
    cpu = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {cpu}")
    print(f"PreActResNet-18, 3x32x32, batch {BATCH}, {STEPS} steps, medians of {options.rounds} rounds")
    print(f"{'variant':<22}{'seconds':>9}{'/ floor':>9}{'/ PGD-AT':>10}{'/ own':>8}")
    # Ratios are taken within a round and their median quoted: what slows a round down slows both sides of it.
    for name, values in seconds.items():
        to_floor = statistics.median(v / f for v, f in zip(values, seconds["floor"], strict=True))
        to_at = statistics.median(v / a for v, a in zip(values, seconds["PGD-AT"], strict=True))
        own = ""
        if name in counts:
            each = zip(values, *(seconds[unit] for unit in units), strict=True)
            own = f"{statistics.median(taken / counts[name].seconds(*unit) for taken, *unit in each):.3f}"
        print(f"{name:<22}{statistics.median(values):>9.2f}{to_floor:>9.3f}{to_at:>10.3f}{own:>8}")


if __name__ == "__main__":
    main()
