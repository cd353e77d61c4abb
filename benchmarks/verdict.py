"""Our verdicts against the original AutoAttack: the same models, the same samples, one run.

The original is a checkout of github.com/fra31/auto-attack that you bring (nothing of it is part of this project):

    uv run python benchmarks/verdict.py --original PATH --runs RUN RUN --rows 500

Each RUN is a run directory of `wideberth train`; norm and radius are those that it was trained with (or `RUN:l1:12`).
For each, the original's `standard` and our suites take turns, `--repeats` times. Shown: the robust accuracy after each
stage, and the median seconds with their ratio to the original's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import wideberth as wb
from wideberth.commands.evaluate import build_data
from wideberth.models import load_model
from wideberth.runs import Run


@dataclass
class Subject:
    """A model and what it is judged on."""

    name: str
    model: torch.nn.Module
    x: torch.Tensor
    y: torch.Tensor
    norm: Any
    eps: float


def subject(words: str, rows: int) -> Subject:
    """The model of a run directory and its first test rows, at RUN:norm:eps or as it was trained."""
    folder, *rest = words.split(":")
    config = Run(folder).config
    data = build_data(config["data"])
    model = load_model(folder, classes=data.classes).eval()
    split = data.test()
    x, y, _ = split.__getitems__(list(range(min(rows, len(split)))))
    norm = rest[0] if rest else (config["attack"] or {}).get("init_args", {}).get("norm", "linf")
    eps = float(rest[1]) if rest else float(config["radius"]["init_args"]["eps"])
    return Subject(words, model, x, y, norm, eps)


class Log:
    """Takes the place of the original's logger, and reads the accuracies off its lines."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def log(self, line: object) -> None:
        """Keep "robust accuracy after NAME: 12.34% ..."."""
        text = str(line)
        if "robust accuracy after" in text:
            name, figure = text.split("robust accuracy after ")[1].split(": ")
            self.stages[name.strip()] = float(figure.split("%")[0])
            self.seconds[name.strip()] = float(figure.split("total time ")[1].split(" ")[0])
        elif "initial accuracy" in text:
            self.stages["clean"] = float(text.split(": ")[1].split("%")[0])


def original(case: Subject, batch_size: int, seed: int) -> tuple[dict[str, float], float]:
    """The original's stages and seconds; targets limited to the classes there are, as its documentation asks."""
    from autoattack import AutoAttack  # the checkout, put on the path by main()

    names = {"linf": "Linf", "l2": "L2", "l1": "L1"}
    attack = AutoAttack(
        case.model, norm=names[case.norm], eps=case.eps, version="standard", seed=seed, device="cpu", verbose=True
    )
    attack.logger = log = Log()
    with torch.no_grad():
        classes = case.model(case.x[:1]).shape[1]
    for part in (attack.apgd_targeted, attack.fab):
        part.n_target_classes = min(part.n_target_classes, classes - 1)
    began = time.monotonic()
    attack.run_standard_evaluation(case.x, case.y, bs=batch_size)
    seconds = time.monotonic() - began
    print(f"    original: seconds until the end of each stage {log.seconds}")
    return log.stages, seconds


def ours(case: Subject, suite: str, batch_size: int, seed: int) -> tuple[dict[str, float], float]:
    """The stages and seconds of one of our suites."""
    began = time.monotonic()
    found = wb.evaluate(
        case.model,
        (case.x, case.y),
        norm=case.norm,
        eps=case.eps,
        suite=suite,
        batch_size=batch_size,
        margin=False,
        seed=seed,
    )
    seconds = time.monotonic() - began
    stages = {"clean": 100 * found.clean_accuracy}
    stages |= {stage["name"]: 100 * stage["robust_accuracy"] for stage in found.protocol["attacks"]}
    spent = {stage["name"]: round(stage["seconds"], 1) for stage in found.protocol["attacks"]}
    print(f"    {suite}: seconds by stage {spent}, evaluations per sample {found.samples.evaluations.mean():.0f}")
    return stages, seconds


def main() -> None:
    """Judge every run by every suite, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="checkout of fra31/auto-attack; without it, ours alone")
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--suites", nargs="+", default=["standard", "fast"])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append results here, as JSON lines")
    options = parser.parse_args()
    if options.original:
        sys.path.insert(0, str(options.original))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}"
    )
    for words in options.runs:
        case = subject(words, options.rows)
        print(f"{words}: {case.norm} eps {case.eps:.4g}, {len(case.y)} samples", flush=True)
        seconds: dict[str, list[float]] = {}
        for seed in range(options.repeats):
            for name in (["original"] if options.original else []) + options.suites:
                if name == "original":
                    stages, spent = original(case, options.batch_size, seed)
                else:
                    stages, spent = ours(case, name, options.batch_size, seed)
                seconds.setdefault(name, []).append(spent)
                told = ", ".join(f"{stage} {value:.1f}" for stage, value in stages.items())
                print(f"  {name:<10} seed {seed}: {told}; {spent:.0f} s", flush=True)
                if options.out:
                    entry = {"run": words, "judge": name, "seed": seed, "stages": stages, "seconds": spent}
                    with options.out.open("a") as file:
                        file.write(json.dumps(entry) + "\n")
        floor = statistics.median(seconds.get("original", [float("nan")]))
        for name, values in seconds.items():
            median = statistics.median(values)
            print(f"  {name:<10} median {median:.0f} s, {median / floor:.3f} of the original's", flush=True)


if __name__ == "__main__":
    main()
