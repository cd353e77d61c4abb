"""Every training method on MNIST under one budget: clean accuracy, PGD-40, the `fast` verdict, and what a step costs.

The same small conv net (a method's own head aside), rows, epochs and optimizer for all, and 7 attack steps wherever
there is an attack, at linf 0.3, with the radius growing from 0 over the first epochs wherever it is given. Each method
has its published hyper-parameters where they carry over, what stands in `methods` where not; none was tuned here.

    uv run python benchmarks/methods.py --data FOLDER_WITH_MNIST --out runs/methods

"verdict" is the `fast` suite (see benchmarks/verdict.py for how near it comes to AutoAttack), "grade" what the checks
for false confidence say. Finished runs are kept in OUT/results.jsonl, so an interrupted benchmark continues where it
was. Steps are timed by themselves, in turns and in one process (`--cost`).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from ledger import results

EPS, STEPS, BATCH = 0.3, 7, 128


def methods(epochs: int, warmup: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What makes a method, by name: policies of `wideberth.train`, and the network's `head`; the first is the default.

    Reweighting begins after two thirds of the epochs (MAIL) or half of them (GAIRAT), as in the papers.
    """
    import wideberth as wb
    from wideberth import losses, objectives, radii, regularizers, schedules, weightings
    from wideberth.training.perturbation import AWP

    def fixed() -> dict[str, Any]:
        return {"radius": radii.Fixed(EPS, warmup=warmup)}

    def emr() -> dict[str, Any]:
        return {"regularizers": [regularizers.EffectiveMargin(EMR_WEIGHT)]}

    late, half = 2 * epochs // 3, epochs // 2
    soft = wb.attacks.PGD(steps=STEPS, loss=losses.soft_margin_loss)
    ramp = schedules.Ramp(2.0, warmup) if warmup else 2.0
    hypersphere = objectives.AdversarialCrossEntropy(losses.AdditiveMargin(margin=0.2, scale=15))
    centers = objectives.AdversarialCrossEntropy(losses.center_distance)
    mail_at, mail_trades = weightings.MAIL(10, -0.5, start=late), weightings.MAIL(2, 0, start=late)
    return {
        "standard": lambda: {"objective": objectives.CleanCrossEntropy()},
        "PGD-AT": fixed,
        "TRADES": lambda: fixed() | {"objective": objectives.TRADES(beta=6)},
        "TRADES, beta 1": lambda: fixed() | {"objective": objectives.TRADES(beta=1)},
        "MART": lambda: fixed() | {"objective": objectives.MART(beta=5)},
        "MAIL-AT": lambda: fixed() | {"weighting": mail_at},
        "MAIL-TRADES": lambda: fixed() | {"objective": objectives.TRADES(beta=5), "weighting": mail_trades},
        "GAIRAT": lambda: fixed() | {"weighting": weightings.GAIRAT(start=half)},
        "MMA": lambda: {
            "radius": radii.ShortestSuccessful(0.45, 0.1),
            "objective": objectives.MaxMargin(),
            "attack": soft,
        },
        "IAAT": lambda: {"radius": radii.InstanceAdaptive(EPS, gamma=EPS * 1.9 / 8, warmup=warmup)},
        "IAAT, at most 0.4": lambda: {
            "radius": radii.InstanceAdaptive(EPS, gamma=EPS * 1.9 / 8, warmup=warmup, maximum=0.4)
        },
        "AT + EMR": lambda: fixed() | emr(),
        "AT + EMR, authors": lambda: (
            fixed() | {"regularizers": [regularizers.EffectiveMargin(3 / 128, "softmax", temperature=40)]}
        ),
        "TRADES + EMR": lambda: fixed() | emr() | {"objective": objectives.TRADES(beta=6)},
        "MART + EMR": lambda: fixed() | emr() | {"objective": objectives.MART(beta=5)},
        "MAIL + EMR": lambda: fixed() | emr() | {"weighting": mail_at},
        "AT + AWP": lambda: fixed() | {"perturbation": AWP(0.01, warmup=warmup)},
        "LLR": lambda: {
            "objective": objectives.CleanCrossEntropy(),
            "regularizers": [regularizers.LocalLinearity(ramp, EPS, steps=STEPS)],
        },
        "HE": lambda: fixed() | {"head": "cosine(scale=15)", "objective": hypersphere},
        "MMC": lambda: fixed() | {"head": "mahalanobis(scale=1)", "objective": centers},
        "MMC, no attack": lambda: {
            "head": "mahalanobis(scale=1)",
            "objective": objectives.CleanCrossEntropy(losses.center_distance),
        },
        "MMC, scaled logits": lambda: fixed() | {"head": "mahalanobis", "objective": centers},
    }


EMR_WEIGHT = 0.003


def network(head: str, width: int) -> Any:
    """The small conv net of Wong & Kolter (2018), theirs at width 16, with a method's head.

    Weights start as in He et al. (2015). It has no batch norm: the statistics of clean and perturbed digits differ so
    much that methods which look at both (TRADES) would train a model that is not the one of eval mode.
    """
    from torch import nn

    from wideberth.models import last_layer

    hidden = (nn.Conv2d(1, width, 4, 2, 1), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.Linear(2 * width * 7 * 7, 100))
    for layer in hidden:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    one, two, three = hidden
    layers = (one, nn.ReLU(), two, nn.ReLU(), nn.Flatten(), three, nn.ReLU())
    return nn.Sequential(*layers, last_layer(head, 100, 10))


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and judge one method."""
    import torch

    import wideberth as wb

    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = wb.data.MNIST(root=options.data, train_rows=options.rows, test_rows=options.test_rows)
    policies = {"attack": wb.attacks.PGD(steps=STEPS)} | methods(options.epochs, options.warmup)[name]()
    model = network(policies.pop("head", "linear"), options.width)
    trained = wb.train(
        model,
        data,
        options.out / f"{name.replace(' ', '').replace('+', '-').replace(',', '-')}-{seed}",
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs),
        epochs=options.epochs,
        batch_size=BATCH,
        seed=seed,
        probe=0,
        channels_last=True,
        progress=False,
        overwrite=True,
        **policies,
    )
    forty = {"PGD-40": wb.attacks.PGD(steps=40)}
    pgd = wb.evaluate(model, data, eps=EPS, suite=forty, margin=False, examined=False)
    found = wb.evaluate(model, data, eps=EPS, suite="fast")
    found.save(trained.path)
    raised = [finding["name"] for finding in found.protocol["findings"] if finding["raised"]]
    return {
        "clean": 100 * found.clean_accuracy,
        "pgd": 100 * pgd.robust_accuracy,
        "verdict": 100 * found.robust_accuracy,
        "grade": found.protocol["grade"]["verdict"],
        "raised": raised,
        "margin": float(found.samples["effective_margin"].median()),
    }


def costs(options: argparse.Namespace, rounds: int = 7) -> dict[str, float]:
    """Median seconds of a step over that of PGD-AT in the same round, for each method as it is after the warm-up."""
    import torch

    import wideberth as wb
    from training_step import ours

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    batch = (torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,)), torch.arange(BATCH))
    batches = torch.utils.data.DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    steps = {}
    for name, make in methods(0, 0).items():
        policies = {"attack": wb.attacks.PGD(steps=STEPS)} | make()
        model = network(policies.pop("head", "linear"), options.width).to(memory_format=torch.channels_last)
        steps[name] = ours(model, batches, BATCH, **policies)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            taken, _ = step(lambda: 0.0)
            if round_:  # the first round warms up
                seconds[name].append(taken)
    reference = seconds["PGD-AT"]
    return {
        name: statistics.median(value / other for value, other in zip(values, reference, strict=True))
        for name, values in seconds.items()
    }


def table(found: pd.DataFrame, cost: dict[str, float]) -> pd.DataFrame:
    """One row per method: means over the seeds, and the verdict of each seed."""
    rows = []
    for name, group in found.groupby("name", sort=False):
        raised = sorted({check for checks in group.raised for check in checks})
        rows.append(
            {
                "method": name,
                "clean": f"{group.clean.mean():.1f}",
                "PGD-40": f"{group.pgd.mean():.1f}",
                "verdict": f"{group.verdict.mean():.1f}",
                "by seed": " / ".join(f"{value:.1f}" for value in group.sort_values("seed").verdict),
                "PGD-40 over verdict": f"{(group.pgd - group.verdict).mean():+.1f}",
                "margin": f"{group.margin.mean():.2f}",
                "grade": " / ".join(group.sort_values("seed").grade),
                "step / PGD-AT": f"{cost[str(name)]:.2f}" if cost else "",
                "raised": ", ".join(raised),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of MNIST, as wideberth.data.MNIST takes it")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--only", default="", help="only methods whose name contains this")
    parser.add_argument("--cost", action="store_true", help="also time the steps, on a quiet machine")
    options = parser.parse_args()
    names = methods(options.epochs, options.warmup)
    order = [(name, seed) for seed in range(options.seeds) for name in names]
    found = results(run, order, options, eps=EPS, steps=STEPS)
    error = 100 * (0.25 / options.test_rows) ** 0.5
    print(f"\n{options.rows} rows, {options.epochs} epochs, width {options.width}, PGD-{STEPS} training at {EPS}")
    print(f"standard error of one accuracy: up to {error:.1f} points; torch {version('torch')}")
    with pd.option_context("display.width", 250, "display.max_colwidth", 80):
        print(table(found, costs(options) if options.cost else {}).to_string(index=False))


if __name__ == "__main__":
    main()
