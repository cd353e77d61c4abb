"""What a training step costs, as ratios to its own floor, side by side, and to PGD-AT in the same round.

PreActResNet-18 on 3x32x32, batch 32, 10 attack steps. A method's floor is what stands on its card in docs/methods.md:
so many forwards F, input gradients with frozen weights G and updates U (a forward and full backward), and the
optimizer's step O: nothing less computes the same. Ours are timed inside Lightning's own loop, from batch start to
batch end, so they also pay for radii, noise, projection and logging.

The floor is run on a twin of the network right before and right after the step it is compared with, so that a machine
that drifts drifts for both. "authors' IAAT" is a plain restatement of the three-attack step of the released code:
everything in train mode, `backward` also inside the attacks. Freed memory is kept, as under the command line
(`wideberth.memory`); `--give-back` leaves it to glibc.

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
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wideberth as wb
from wideberth import memory
from wideberth.training.module import RobustTraining
from wideberth.training.perturbation import AWP
from wideberth.training.policies import Optimization, Policies

EPS, STEPS, BATCH = 8 / 255, 10, 32


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """What everyone trains with: small steps, so that numbers stay ordinary on a batch that is seen again and again."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Passes:
    """What a step cannot do without, beside the optimizer's step.

    Attributes:
        forwards: F, in the mode of the attack.
        gradients: F + G, a forward and its input gradient.
        updates: U, a forward and full backward.
        backwards: G, where the forward is one of those counted above.
        networks: how many the optimizer steps.
    """

    forwards: int = 0
    gradients: int = 0
    updates: int = 0
    backwards: int = 0
    networks: int = 1


class Floor:
    """The passes by themselves, on a twin of the network that nobody else trains."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = deepcopy(model).eval(), x, y
        self.optimizer = sgd(self.model.parameters())
        self.model.requires_grad_(False)

    def seconds(self, passes: Passes) -> float:
        """How long they take together."""
        free = [self.forward() for _ in range(passes.backwards)]
        began = time.perf_counter()
        for point, loss in free:
            torch.autograd.grad(loss, point)
        for _ in range(passes.gradients):
            point, loss = self.forward()
            torch.autograd.grad(loss, point)
        with torch.no_grad():
            for _ in range(passes.forwards):
                self.model(self.x)
        self.model.train().requires_grad_(True)
        self.optimizer.zero_grad()
        for _ in range(passes.updates):
            F.cross_entropy(self.model(self.x), self.y).backward()
        for _ in range(passes.networks):
            self.optimizer.step()
        self.model.eval().requires_grad_(False)
        return time.perf_counter() - began

    def forward(self) -> tuple[Tensor, Tensor]:
        """F with a graph to the input, and nothing else."""
        point = self.x.detach().requires_grad_()
        return point, F.cross_entropy(self.model(point), self.y, reduction="sum")


class AuthorsIAAT:
    """The three-attack step of the released IAAT code, restated from its description."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        self.model, self.memory = model, torch.full((samples,), EPS)
        self.optimizer = sgd(model.parameters())

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
    """Seconds of the last batch, from start to end, and of what is run before it: the first pays for warming up."""

    def __init__(self, before: Callable[[], float]) -> None:
        self.before = before

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, place: int) -> None:
        """Start."""
        if place + 1 == trainer.num_training_batches:
            self.floor = self.before()
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.began


Timed = Callable[[Callable[[], float]], tuple[float, float]]
"""Given what to time beside it, the seconds of a step and the mean of those just before and after it."""


def ours(model: nn.Module, batches: Any, samples: int, **policies: Any) -> Timed:
    """One step of our loop, inside Lightning."""
    policies.setdefault("attack", wb.attacks.PGD(steps=STEPS, step_size=2 / 255))
    module = RobustTraining(model, samples, Policies(**policies), Optimization(sgd))

    def step(beside: Callable[[], float]) -> tuple[float, float]:
        clock = Clock(beside)
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
        return clock.seconds, (clock.floor + beside()) / 2

    return step


def plain(run: Callable[[], None]) -> Timed:
    """One call."""

    def step(beside: Callable[[], float]) -> tuple[float, float]:
        before, began = beside(), time.perf_counter()
        run()
        taken = time.perf_counter() - began
        return taken, (before + beside()) / 2

    return step


def variants(model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> dict[str, tuple[Timed, Passes]]:
    """What is timed, and its card's passes: the backward through a gradient of a ReLU net is put in units as there."""
    batches = torch.utils.data.DataLoader([(x, y, index)] * 2, batch_size=None)  # type: ignore[arg-type]
    radii, regularizers, objectives = wb.radii, wb.regularizers, wb.objectives
    scaled = wb.attacks.PGD(steps=STEPS, step_size=wb.attacks.ScaledStep(2, floor=2 / 255))
    authors = AuthorsIAAT(model, BATCH)

    def trained(**policies: Any) -> Timed:
        return ours(model, batches, BATCH, **policies)

    def penalised(regularizer: Any, **policies: Any) -> Timed:
        return trained(regularizers=[regularizer], **policies)

    ahead = radii.InstanceAdaptive(EPS, "lookahead", warmup=0)
    at, soft = {"radius": radii.Fixed(EPS)}, wb.attacks.PGD(steps=STEPS, loss=wb.losses.soft_margin_loss)
    teacher = objectives.LBGAT(wb.models.PreActResNet18())
    margin = {"attack": soft, "radius": radii.ShortestSuccessful(), "objective": objectives.MaxMargin()}
    return {
        "PGD-AT": (trained(**at), Passes(0, STEPS, 1)),
        "standard": (trained(), Passes(0, 0, 1)),
        "IAAT simple": (trained(radius=radii.InstanceAdaptive(EPS, warmup=0)), Passes(1, STEPS, 1)),
        "TRADES": (trained(**at, objective=objectives.TRADES()), Passes(1, STEPS, 2)),
        "MART": (trained(**at, objective=objectives.MART()), Passes(0, STEPS, 2)),
        "ALP": (trained(**at, objective=objectives.ALP()), Passes(0, STEPS, 2)),
        "LBGAT": (trained(**at, objective=teacher), Passes(1, STEPS, 2, networks=2)),
        "MAIL-AT": (trained(**at, weighting=wb.weightings.MAIL(start=0)), Passes(0, STEPS, 1)),
        "GAIRAT": (trained(**at, weighting=wb.weightings.GAIRAT(start=0)), Passes(0, STEPS, 1)),
        "MMA": (trained(**margin), Passes(1 + 10, STEPS, 2)),
        "AT + AWP": (trained(**at, perturbation=AWP()), Passes(0, STEPS, 2)),
        "FGSM-RS": (trained(**at, attack=wb.attacks.FGSM(start="uniform")), Passes(0, 1, 1)),
        "N-FGSM": (trained(**at, attack=wb.attacks.NFGSM()), Passes(0, 1, 1)),
        "AT + EMR softmax": (penalised(regularizers.EffectiveMargin(1e-4, "softmax"), **at), Passes(1, STEPS, 2)),
        "AT + EMR projection": (penalised(regularizers.EffectiveMargin(1e-4), **at), Passes(1, STEPS, 2)),
        "AT + Jacobian": (penalised(regularizers.Jacobian(2e-4), **at), Passes(1, STEPS, 2)),
        "AT + weights": (penalised(regularizers.WeightNorm(1e-4), **at), Passes(0, STEPS, 1)),
        "gradient double": (penalised(regularizers.InputGradient(1e-4)), Passes(0, 0, 1 + 2)),
        "gradient finite": (penalised(regularizers.InputGradient(1e-4, "finite")), Passes(0, 0, 1 + 2, 1)),
        "LLR": (penalised(regularizers.LocalLinearity(1e-4, EPS, steps=STEPS)), Passes(0, STEPS, 1 + 3)),
        "GradAlign": (penalised(regularizers.GradientAlignment(1e-4)), Passes(0, 1, 1 + 2)),
        "CURE": (penalised(regularizers.Curvature(1e-4)), Passes(0, 0, 1 + 4)),
        "IAAT lookahead": (trained(radius=ahead, attack=scaled), Passes(3, 3 * STEPS, 1)),
        "authors' IAAT": (plain(lambda: authors(x, y, index)), Passes(3, 3 * STEPS, 1)),
    }


def main() -> None:
    """Time all variants in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="only variants whose name contains this (and PGD-AT)")
    parser.add_argument("--give-back", action="store_true", help="leave freed memory to glibc, as a script does")
    options = parser.parse_args()
    kept = not options.give_back and memory.keep()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = wb.models.PreActResNet18()
    x, y, index = torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,)), torch.arange(BATCH)
    every = variants(model, x, y, index)
    cpu = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {cpu}")
    print("freed memory is kept" if kept else "what becomes of freed memory is left to the C library and its variables")
    print(f"PreActResNet-18, 3x32x32, batch {BATCH}, {STEPS} steps, medians of {options.rounds} rounds", flush=True)
    floor = Floor(model, x, y)
    taken: dict[str, list[float]] = {name: [] for name in every if options.only in name or name == "PGD-AT"}
    over: dict[str, list[float]] = {name: [] for name in taken}
    for round_ in range(options.rounds):
        for name in taken:
            step, passes = every[name]
            seconds, least = step(lambda passes=passes: floor.seconds(passes))  # type: ignore[misc]
            taken[name].append(seconds)
            over[name].append(seconds / least)
            print(f"  round {round_}: {name:<22}{seconds:>8.2f} s, {seconds / least:.3f} of its floor", flush=True)
    print(f"{'variant':<22}{'seconds':>9}{'/ own floor':>13}{'lowest':>9}{'highest':>9}{'/ PGD-AT':>10}")
    # Ratios are taken side by side and their median quoted: what slows the machine down slows both sides of it.
    for name, values in taken.items():
        to_at = statistics.median(v / a for v, a in zip(values, taken["PGD-AT"], strict=True))
        own, low, high = statistics.median(over[name]), min(over[name]), max(over[name])
        print(f"{name:<22}{statistics.median(values):>9.2f}{own:>13.3f}{low:>9.3f}{high:>9.3f}{to_at:>10.3f}")


if __name__ == "__main__":
    main()
