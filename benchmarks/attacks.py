"""What crafting costs: PGD-40, ours and four peers, as ratios to the floor and to ours, side by side in one run.

linf 8/255, step 2/255, uniform start; PreActResNet-18 on 3x32x32, batch 32, or `--model small`: the ConvNet, batch 128.
The floor is 40 x (forward + input gradient with frozen weights), and of arithmetic only what PGD cannot do without: a
uniform draw and a clamp at the start; per step a sign, an addition and a clamp between two bounds, all in place, the
bounds computed once. It keeps no loss, no success and no other point than the last. Freezing is part of its time.

Everyone gets the same model as users have it, in eval mode with parameters that want gradients (with `--frozen`:
parameters that want none, which spares a peer the weight gradients it would compute), the same batch, labels that are
the model's own predictions, and no left-over `.grad`. Variants take turns, round by round, so that a drifting machine
drifts for all, and each round in another order, since each finds memory as the one before has left it. "ours" is
`check_success=False`: points, and nothing known of them, like the floor, torchattacks and adv-lib; "ours, checked" is
the default call, with one forward more, like foolbox. ART takes and returns numpy, as it does for its users, and checks
clean and adversarial points. Columns tell whether equal work was done: forwards (of the whole batch),
success, mean loss, and largest step from x. adv-lib returns the last point that succeeded, and x itself where none did.

    uv run --config-file <(echo 'extra-build-dependencies.visdom = ["setuptools<81"]') --with foolbox \\
        --with torchattacks --with adversarial-robustness-toolbox --with adv-lib python benchmarks/attacks.py

The config file (bash or zsh makes it) lets visdom build, which adv-lib cannot be imported without. A peer that cannot
be imported is skipped; plain `uv run python benchmarks/attacks.py` measures ours against the floor.

Freed memory is kept, as under the command line (`wideberth.memory`), for everyone; `--give-back` leaves it to glibc.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wideberth as wb
from wideberth import memory

EPS, STEP_SIZE, CLASSES = 8 / 255, 2 / 255, 10

Perturb = Callable[[Tensor, Tensor], Tensor]


def floor(model: nn.Module, steps: int) -> Perturb:
    """Nothing less computes the same."""

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        wanted = [p for p in model.parameters() if p.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
        low, high = (x - EPS).clamp_(min=0), (x + EPS).clamp_(max=1)
        point = torch.empty_like(x).uniform_(-EPS, EPS).add_(x).clamp_(low, high)
        for _ in range(steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
            point = point.detach().add_(gradient.sign_(), alpha=STEP_SIZE).clamp_(low, high)
        for parameter in wanted:
            parameter.requires_grad_(True)
        return point

    return perturb


def ours(model: nn.Module, steps: int, check_success: bool = False) -> Perturb:
    """This library's."""
    attack = wb.attacks.PGD(steps=steps, step_size=STEP_SIZE)
    return lambda x, y: attack(model, x, y, eps=EPS, check_success=check_success).x


def foolbox(model: nn.Module, steps: int) -> Perturb:
    """Gives points and their success."""
    import foolbox as fb

    bounded = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = fb.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps, random_start=True)
    return lambda x, y: attack(bounded, x, y, epsilons=EPS)[1]


def torchattacks(model: nn.Module, steps: int) -> Perturb:
    """Gives points."""
    import torchattacks as ta

    return ta.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=True)


def art(model: nn.Module, steps: int) -> Perturb:
    """Gives points, in numpy, and logs their success."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=STEP_SIZE, max_iter=steps, num_random_init=1, batch_size=1024, verbose=False
    )
    return lambda x, y: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def adv_lib(model: nn.Module, steps: int) -> Perturb:
    """Gives points, and follows success at every step."""
    from adv_lib.attacks import pgd_linf

    return lambda x, y: pgd_linf(model, x, y, EPS, steps=steps, absolute_step_size=STEP_SIZE)


PEERS: dict[str, Callable[[nn.Module, int], Perturb]] = {
    "adv-lib": adv_lib,
    "torchattacks": torchattacks,
    "foolbox": foolbox,
    "adversarial-robustness-toolbox": art,
}


def report(model: nn.Module, perturb: Perturb, x: Tensor, y: Tensor) -> str:
    """Perturb once, uncounted in time: forwards spent, success, mean loss and largest step of what comes back."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = perturb(x, y)
    hook.remove()
    with torch.no_grad():
        logits = model.eval()(found)
    success = (logits.argmax(1) != y).float().mean()
    loss, reach = F.cross_entropy(logits, y), 255 * (found - x).abs().max()
    return f"{sum(seen) / len(x):>10.2f}{success:>9.3f}{loss:>9.3f}{reach:>9.3f}"


def main() -> None:
    """Time all variants in turn and print medians, ratios and what was achieved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("preact", "small"), default="preact")
    parser.add_argument("--batch", type=int, help="32, or 128 with the small model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch's own choice if not given")
    parser.add_argument("--frozen", action="store_true", help="hand out a model whose parameters want no gradients")
    parser.add_argument("--give-back", action="store_true", help="leave freed memory to glibc, as a script does")
    options = parser.parse_args()
    kept = not options.give_back and memory.keep()
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    small = options.model == "small"
    model = wb.models.ConvNet((3, 32, 32), CLASSES) if small else wb.models.PreActResNet18(classes=CLASSES)
    model.requires_grad_(not options.frozen).eval()
    x = torch.rand(options.batch or (128 if small else 32), 3, 32, 32)
    with torch.no_grad():
        y = model(x).argmax(1)

    cpu = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {cpu}")
    print("freed memory is kept" if kept else "what becomes of freed memory is left to the C library and its variables")
    weights = "frozen" if options.frozen else "wanting gradients"
    print(f"{type(model).__name__}, weights {weights}, 3x32x32, batch {len(x)}, PGD-{options.steps} linf 8/255")
    crafts: dict[str, Perturb] = {
        "floor": floor(model, options.steps),
        "ours": ours(model, options.steps),
        "ours, checked": ours(model, options.steps, check_success=True),
    }
    for name, build in PEERS.items():
        try:
            crafts[f"{name} {version(name)}"] = build(model, options.steps)
        except Exception as why:  # whatever breaks the import of a peer
            print(f"{name} skipped: {type(why).__name__}: {why}")

    reports = {name: report(model, perturb, x, y) for name, perturb in crafts.items()}  # this also warms up
    seconds: dict[str, list[float]] = {name: [] for name in crafts}
    order = random.Random(0)
    for _ in range(options.rounds):
        for name in order.sample(list(crafts), len(crafts)):
            model.eval().zero_grad()
            began = time.perf_counter()
            crafts[name](x, y)
            seconds[name].append(time.perf_counter() - began)

    def ratio(name: str, base: str) -> float:
        # Taken within a round, and their median quoted: what slows a round down slows both sides of it.
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))

    head = f"{'variant':<38}{'seconds':>9}{'/ floor':>9}{'/ ours':>9}"
    print(f"medians of {options.rounds} rounds\n{head}{'forwards':>10}{'success':>9}{'loss':>9}{'x 255':>9}")
    for name, taken in seconds.items():
        times = f"{statistics.median(taken):>9.3f}{ratio(name, 'floor'):>9.3f}{ratio(name, 'ours'):>9.3f}"
        print(f"{name:<38}{times}{reports[name]}")
    print(f"target: ours at most 1.05 of the floor; {'met' if ratio('ours', 'floor') <= 1.05 else 'missed'}")
    if peers := [name for name in crafts if name.split()[0] in PEERS]:
        print(f"target: faster than every peer; than {sum(ratio(name, 'ours') > 1 for name in peers)} of {len(peers)}")


if __name__ == "__main__":
    main()
