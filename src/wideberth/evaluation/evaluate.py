"""`evaluate`: run a line-up of attacks, verify what they found, and keep a record of every sample."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Dataset

from wideberth import checks, geometry, losses, margins
from wideberth.attacks import Attack
from wideberth.attacks import suite as named_suite
from wideberth.checks import Box, InputError, Norm
from wideberth.configuration import describe
from wideberth.data import Data, Split
from wideberth.evaluation.record import Evaluation
from wideberth.evaluation.verify import judging, verify
from wideberth.randomness import fold

Samples: TypeAlias = Data | Split | Dataset[Any] | tuple[Tensor, Tensor]


def evaluate(
    model: nn.Module,
    data: Samples,
    *,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    suite: str | Mapping[str, Attack] = "pgd",
    box: Box | None = None,
    rows: int | None = None,
    batch_size: int = 256,
    margin: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Clean accuracy and verified robust accuracy of a model within a radius.

    Attacks run in the order of the suite, each on the samples that are still unbroken; a sample counts as broken only
    if its adversarial point, evaluated again, lies in ball and box and is misclassified.

    Args:
        model: maps (B, ...) in the box to logits (B, K); run in eval mode where its parameters are, given back as it
            was.
        data: a `Data` (its test split), a split, any data set of (x, y) or (x, y, index), or tensors (x, y).
        norm: "linf", "l2" or "l1".
        eps: the radius, in units of the input.
        suite: name of a line-up, or attacks by name.
        box: what inputs lie in (default: the data's own, else (0, 1)).
        rows: only the first so many samples.
        batch_size: samples at a time.
        margin: also measure effective margins (one backward per class).
        seed: of the attacks' randomness.
        progress: show a progress bar with the accuracies so far.

    Returns:
        The record; `robust_accuracy` is an upper bound on the true one, as for every attack.

    Raises:
        InputError: for arguments, data or a model that cannot be used.
    """
    checks.norm_name(norm)
    checks.valid_eps(eps)
    checks.at_least("batch_size", batch_size, 1)
    if rows is not None:
        checks.at_least("rows", rows, 1)
    box = (data.box if isinstance(data, Data) else (0.0, 1.0)) if box is None else box
    line_up = named_suite(suite, norm, box) if isinstance(suite, str) else dict(suite)
    if not line_up:
        raise InputError("suite: holds no attack, and nothing would count as broken")
    for name, attack in line_up.items():
        if attack.norm != norm or tuple(attack.box) != tuple(box):
            raise InputError(
                f"suite: {name} attacks in {attack.norm} and box {tuple(attack.box)}, the evaluation is in {norm} and "
                f"box {tuple(box)}"
            )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    began, spent, tables = time.monotonic(), dict.fromkeys(line_up, 0.0), []
    source = data.test() if isinstance(data, Data) else data
    total = min(_length(source), rows or _length(source))
    with _progress(progress) as bar:
        task = bar.add_task("evaluating", total=total)
        for x, y, index in _batches(source, total, batch_size):
            x, y, index = x.to(device), y.to(device), index.to(device)
            table = _judge(model, x, y, index, line_up, norm, eps, box, seed, spent)
            if margin:
                value, weight, _ = margins.measure(model, x, y, norm)
                table["effective_margin"], table["effective_weight_norm"] = value.cpu().numpy(), weight.cpu().numpy()
            tables.append(table)
            seen = pd.concat(tables)
            found = f"clean {seen.clean_correct.mean():.1%}, robust at most {seen.robust.mean():.1%}"
            bar.update(task, advance=len(table), description=found)
    samples = pd.concat(tables, ignore_index=True)
    protocol = {
        "data": describe(data) if isinstance(data, Data) else type(data).__name__,
        "split": "test" if isinstance(data, Data) else "given",
        "norm": norm,
        "eps": float(eps),
        "box": list(box),
        "suite": suite if isinstance(suite, str) else "custom",
        "seed": seed,
        "attacks": _stages(samples, line_up, spent),
        "seconds": time.monotonic() - began,
        "device": str(device),
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "wideberth": _version()},
    }
    return Evaluation(samples, protocol)


def _judge(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    line_up: Mapping[str, Attack],
    norm: Norm,
    eps: float,
    box: Box,
    seed: int,
    spent: dict[str, float],
) -> pd.DataFrame:
    """The table of one batch; adds the seconds of each attack to `spent`."""
    checks.valid_inputs(x, box)
    with judging(model, x):
        logits = model(x)
    checks.valid_logits(logits, len(x))
    checks.valid_labels(y, len(x), logits.shape[1])
    clean_margin, predicted = losses.logit_margin(logits, y), losses.predictions(logits)
    correct = ~losses.misclassified(logits, y)
    robust, adversarial = correct.clone(), predicted.clone()
    distance = torch.where(correct, float("nan"), 0.0)
    evaluations, winner = torch.ones_like(y), ["" if held else "clean" for held in correct.tolist()]
    for name, attack in line_up.items():
        left = robust.nonzero().squeeze(1)
        if not len(left):
            break
        began = time.monotonic()
        found = attack(model, x[left], y[left], eps=eps, index=index[left], seed=fold(seed, name))
        broken = verify(model, x[left], y[left], found.x, eps, norm, box)
        evaluations[left] += found.evaluations
        won = left[broken]
        robust[won] = False
        if len(won):
            distance[won] = geometry.norm(found.x[broken].double() - x[won].double(), norm).to(distance.dtype)
            with judging(model, x):
                adversarial[won] = losses.predictions(model(found.x[broken]))
        for row in won.tolist():
            winner[row] = name
        spent[name] += time.monotonic() - began
    columns = {
        "index": index,
        "label": y,
        "clean_prediction": predicted,
        "adversarial_prediction": adversarial,
        "clean_correct": correct,
        "robust": robust,
        "logit_margin": clean_margin,
        "distance": distance,
        "evaluations": evaluations,
    }
    return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()} | {"attack": winner})


def _stages(samples: pd.DataFrame, line_up: Mapping[str, Attack], spent: Mapping[str, float]) -> list[dict[str, Any]]:
    """The robust accuracy that was left after each attack, and what it took."""
    left, stages = float(samples["clean_correct"].mean()), []
    for name, attack in line_up.items():
        left -= float((samples["attack"] == name).mean())
        stage = {"name": name, "robust_accuracy": left, "seconds": spent[name], "settings": describe(attack)}
        stages.append(stage)
    return stages


def _length(source: Any) -> int:
    if not isinstance(source, tuple):
        return len(source)
    if len(source) != 2 or len(source[0]) != len(source[1]):
        raise InputError(f"data: tensors of lengths {[len(part) for part in source]}: must be (x, y), one label each")
    return len(source[0])


def _batches(source: Any, total: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if total == 0:
        raise InputError("data: holds no samples")
    for begin in range(0, total, batch_size):
        places = list(range(begin, min(begin + batch_size, total)))
        if isinstance(source, tuple):
            yield source[0][begin : places[-1] + 1], source[1][begin : places[-1] + 1], torch.tensor(places)
        elif isinstance(source, Split):
            yield source.__getitems__(places)
        else:
            rows = [source[place] for place in places]
            x, y = torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])
            yield x, y, torch.tensor([int(row[2]) if len(row) > 2 else i for i, row in zip(places, rows, strict=True)])


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)


def _version() -> str:
    from importlib.metadata import version

    return version("wideberth")
