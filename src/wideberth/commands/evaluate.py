"""`wideberth evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from wideberth.attacks import SUITES
from wideberth.checks import InputError, Norm, choice
from wideberth.commands.parsing import call, print_to_terminal
from wideberth.configuration import construct as construct
from wideberth.configuration import import_object
from wideberth.data import Data
from wideberth.evaluation import Evaluation, evaluate, shards
from wideberth.models import load_model
from wideberth.runs import Run


def subject(
    model: str, data: Data | None, weights: str | None, architecture: dict[str, Any] | None
) -> tuple[nn.Module, Data]:
    """The model on the best device at hand, and the data: the given one, or what the run was trained on."""
    folder = Path(model)
    if not folder.exists() and ("/" in model and not model.startswith(("timm/", "torchvision/"))):
        raise InputError(f"MODEL {model!r}: no such run or file")
    if data is None:
        recorded = Run(folder).config.get("data") if folder.is_dir() else None
        if recorded is None:
            raise InputError(f"--data: needed, since MODEL {model!r} is not a run that records its data")
        data = build_data(recorded)
    loaded = load_model(model, weights=weights, architecture=architecture, classes=data.classes)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), data


def build_data(recorded: dict[str, Any]) -> Data:
    """The data set that a run's configuration names."""
    path = str(recorded.get("class_path"))
    made = construct(import_object(path), path, **(recorded.get("init_args") or {}))
    if not isinstance(made, Data):
        raise InputError(f"data: {recorded.get('class_path')} is not a wideberth.data.Data")
    return made


def run(
    model: str,
    data: Data | None = None,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    suite: str = "fast",
    rows: int | None = None,
    batch_size: int = 256,
    margin: bool = True,
    radii: bool = False,
    seed: int = 0,
    out: str | None = None,
    weights: str | None = None,
    architecture: dict[str, Any] | None = None,
    progress: bool = True,
    evidence: bool = True,
) -> None:
    """Measure the accuracy of a model on the test split of a data set, clean and under attack.

    Interrupted, it leaves `evaluation.state` beside the record and goes on from there when called again. Under torchrun
    the processes share the samples.

    Args:
        model: a run directory, a .safetensors file, timm/NAME, torchvision/NAME, or an import path with arguments.
        data: the data set (default: what the run was trained on).
        norm: linf, l2 or l1.
        eps: the radius, e.g. 8/255.
        suite: the line-up of attacks: fast, or the composition of AutoAttack: standard, plus, rand; pgd; radius.
        rows: only the first so many test rows.
        batch_size: samples at a time.
        margin: also measure effective margins.
        radii: also search the smallest radius at which each sample breaks: the curve of robust accuracy against eps.
        seed: of the attacks.
        out: where evaluation.json and evaluation.parquet go (default: the run directory, if MODEL is one).
        weights: a file of weights for a model named by its architecture.
        architecture: class_path and init_args, for a .safetensors file on its own.
        progress: show a progress bar.
        evidence: keep the adversarial points, which `wideberth verify` checks again.
    """
    choice("suite", suite, tuple(SUITES))
    if weights is not None and out is None and Path(model).is_dir():
        raise InputError(
            "--out: needed with --weights, since the verdict in the run directory is about its own weights"
        )
    network, samples = subject(model, data, weights, architecture)
    target = out if out is not None else (model if Path(model).is_dir() else None)
    found = evaluate(
        network,
        samples,
        norm=norm,
        eps=eps,
        suite=suite,
        rows=rows,
        batch_size=batch_size,
        margin=margin,
        radii=radii,
        seed=seed,
        progress=progress,
        evidence=evidence,
        state=None if target is None else Path(target) / "evaluation.state",
    )
    if shards.mine()[0] > 0:
        return  # under torchrun, the first process speaks for all
    found.protocol.update(model=model, weights=weights)
    print_to_terminal(table(found))
    if target is not None:
        print(f"saved: {found.save(target)}/evaluation.json, evaluation.parquet")


def table(found: Evaluation) -> Table:
    """The verdict, for a terminal."""
    told = found.summary()
    view = Table("", "accuracy", "95 % interval", title=f"{told['norm']} eps {told['eps']:.4g}, n = {told['n']}")
    for name, shown in (("clean", "clean"), ("robust", "robust, at most")):
        low, high = told[f"{name}_interval"]
        view.add_row(shown, f"{told[f'{name}_accuracy']:.2%}", f"{low:.1%} to {high:.1%}")
    for stage in told["attacks"]:
        view.add_row(f"after {stage['name']}", f"{stage['robust_accuracy']:.2%}", "")
    if "grade" in told:
        raised = [finding for finding in told["findings"] if finding["raised"]]
        advice = "".join(f"\n{finding['name']}: {finding['why']} {finding['advice']}" for finding in raised)
        view.caption = f"{told['grade']['verdict']}: {told['grade']['reason']}{advice}"
    elif told.get("zero_gradients"):
        view.caption = (
            f"{told['zero_gradients']:.1%} of the inputs have a zero gradient, where attacks see nothing: distrust this"
        )
    return view


def main(words: Sequence[str]) -> None:
    """Parse and evaluate."""
    call("evaluate", run, words)
