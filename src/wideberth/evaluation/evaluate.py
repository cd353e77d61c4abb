"""`evaluate`: run a line-up of attacks, verify what they found, and keep a record of every sample."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Dataset

from wideberth import checks, losses, margins
from wideberth.attacks import SUITES, Attack, Stage
from wideberth.attacks import suite as named_suite
from wideberth.checks import Box, InputError, Norm
from wideberth.configuration import describe
from wideberth.data import Data, Split
from wideberth.evaluation import shards
from wideberth.evaluation.diagnostics import examine, grade
from wideberth.evaluation.record import Evaluation
from wideberth.evaluation.verdict import Case, Ledger, search
from wideberth.evaluation.verify import judging

Samples: TypeAlias = Data | Split | Dataset[Any] | tuple[Tensor, Tensor]


def evaluate(
    model: nn.Module,
    data: Samples,
    *,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    suite: str | Mapping[str, Attack | Stage] = "fast",
    box: Box | None = None,
    rows: int | None = None,
    batch_size: int = 256,
    margin: bool = True,
    seed: int = 0,
    progress: bool = False,
    radii: bool = False,
    examined: bool = True,
    state: str | Path | None = None,
) -> Evaluation:
    """Clean accuracy and verified robust accuracy of a model within a radius.

    Attacks run in the order of the suite, each on the samples that are still unbroken; a sample counts as broken only
    if its adversarial point, evaluated again, lies in ball and box and is misclassified. Under `torchrun` every process
    judges its share of the samples, and all return the whole.

    Args:
        model: maps (B, ...) in the box to logits (B, K); run in eval mode where its parameters are, given back as it
            was.
        data: a `Data` (its test split), a split, any data set of (x, y) or (x, y, index), or tensors (x, y).
        norm: "linf", "l2" or "l1".
        eps: the radius, in units of the input.
        suite: name of a line-up, or attacks (or `Stage`s) by name. "fast" comes to about the verdict of "standard", the
            composition of AutoAttack, in a small part of its time.
        box: what inputs lie in (default: the data's own, else (0, 1)).
        rows: only the first so many samples.
        batch_size: samples at a time; attacks without gradients may ask about twice as many points.
        margin: also measure effective margins (one backward per class).
        seed: of the attacks' randomness.
        progress: show a progress bar with the accuracies so far.
        radii: also search the smallest radius at which each sample breaks, by the minimum-norm suite "radius", from
            which the whole curve of robust accuracy against eps follows; a sample that this breaks within `eps` counts
            as broken.
        examined: also look for signs of false confidence on up to 64 samples, and grade the verdict (see `examine`).
        state: a file in which to keep what is known, every two minutes and when interrupted; an evaluation that finds
            it there goes on from it. Removed at the end.

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
    checks.valid_box(box)
    if isinstance(suite, str):
        checks.choice("suite", suite, tuple(SUITES))
    else:
        _stages_of(suite, norm, box, 2)  # refused before the model is asked about anything
    began = time.monotonic()
    rank, world = shards.mine()
    source = data.test() if isinstance(data, Data) else data
    total = min(_length(source), rows or _length(source))
    case, measures = _prepare(model, source, total, batch_size, norm, eps, box, seed, margin, rank, world)
    classes = case.logits.shape[1]
    line_up = _stages_of(suite, norm, box, classes)
    with _progress(progress and rank == 0) as bar:
        ledger = _judged(case, line_up, batch_size, bar, state)
        if radii:
            further = _stages_of("radius", norm, box, classes)
            far = _judged(replace(case, eps=math.inf), further, batch_size, bar, state)
            measures["radius"] = ledger.take(far, eps)
            line_up = {**line_up, **{f"{name}, smallest radius": stage for name, stage in further.items()}}
    everything = shards.gathered((_table(case, ledger, list(line_up), measures), ledger.seconds.tolist()))
    samples = pd.concat([table for table, _ in everything]).sort_values("position", kind="stable")
    samples = samples.drop(columns="position").reset_index(drop=True)
    seconds = [max(each) for each in zip(*(spent for _, spent in everything), strict=True)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    line = _stages(samples, line_up, seconds)
    protocol: dict[str, Any] = {
        "data": describe(data) if isinstance(data, Data) else type(data).__name__,
        "split": "test" if isinstance(data, Data) else "given",
        "norm": norm,
        "eps": float(eps),
        "box": list(box),
        "suite": suite if isinstance(suite, str) else "custom",
        "seed": seed,
        "attacks": line,
        "seconds": time.monotonic() - began,
        "processes": world,
        "device": str(device),
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "wideberth": _version()},
    }
    if examined:
        protocol |= _examined(case, samples.iloc[rank::world], line)
    if state is not None:
        for name in (state, _beyond(state)):
            shards.own(Path(name)).unlink(missing_ok=True)
    return Evaluation(samples, protocol)


def _examined(case: Case, samples: pd.DataFrame, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The grade of a verdict and the findings behind it: each process looks at its own samples, the first tells."""
    findings = examine(
        case.model,
        case.x,
        case.y,
        eps=case.eps,
        norm=case.norm,
        box=case.box,
        samples=samples.reset_index(drop=True),
        stages=stages,
        seed=case.seed,
    )
    verdict, reason = grade(findings)
    told = {"grade": {"verdict": verdict, "reason": reason}, "findings": [asdict(finding) for finding in findings]}
    return shards.gathered(told)[0]


def _beyond(state: str | Path) -> Path:
    """Where the search for the smallest radii keeps what it knows."""
    return Path(state).with_suffix(".radii")


def _judged(
    case: Case, line_up: Mapping[str, Stage], batch_size: int, bar: Progress, state: str | Path | None
) -> Ledger:
    """The ledger of a line-up, taken up from its file if there is one."""
    ledger = Ledger.empty(case.x, losses.predictions(case.logits), len(line_up))
    watch = _Watch(bar, case)
    if state is None:
        return search(case, line_up, ledger, batch_size=batch_size, watch=watch)
    about, file = case.about(line_up), shards.own(Path(state if case.bounded else _beyond(state)))
    if file.exists():
        ledger = Ledger.load(file, about)
    found = search(
        case, line_up, ledger, batch_size=batch_size, watch=watch, save=lambda known: known.save(file, about)
    )
    found.save(file, about)  # kept until the record is made: what follows may be interrupted too
    return found


def _stages_of(suite: str | Mapping[str, Attack | Stage], norm: Norm, box: Box, classes: int) -> dict[str, Stage]:
    given = named_suite(suite, norm, box, classes) if isinstance(suite, str) else suite
    line_up = {name: part if isinstance(part, Stage) else Stage(part) for name, part in given.items()}
    if not line_up:
        raise InputError("suite: holds no attack, and nothing would count as broken")
    for name, stage in line_up.items():
        attack = stage.attack
        if not attack.norm_bounded:
            kind = type(attack).__name__
            raise InputError(f"suite: {name}: {kind} knows no ball of a norm, as a verdict does; call it directly")
        if attack.norm != norm or tuple(attack.box) != tuple(box):
            raise InputError(
                f"suite: {name} attacks in {attack.norm} and box {tuple(attack.box)}, the evaluation is in {norm} and "
                f"box {tuple(box)}"
            )
    return line_up


def _prepare(
    model: nn.Module,
    source: Any,
    total: int,
    batch_size: int,
    norm: Norm,
    eps: float,
    box: Box,
    seed: int,
    margin: bool,
    rank: int,
    world: int,
) -> tuple[Case, dict[str, Tensor]]:
    """The samples of this process with their clean logits, and what is measured on clean inputs."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts: dict[str, list[Tensor]] = {}
    for x, y, index in _batches(source, range(rank, total, world), batch_size):
        checks.valid_inputs(x, box)
        x, y = x.to(device), y.to(device)
        with judging(model, x):
            logits = model(x)
        checks.valid_logits(logits, len(x))
        checks.valid_labels(y, len(x), logits.shape[1])
        held = {"x": x, "y": y, "index": index, "logits": logits}
        if margin:
            held["effective_margin"], held["effective_weight_norm"], _ = margins.measure(model, x, y, norm)
        for name, value in held.items():
            parts.setdefault(name, []).append(value.cpu())
    whole = {name: torch.cat(values) for name, values in parts.items()}
    place = torch.arange(rank, total, world)
    case = Case(model, whole["x"], whole["y"], whole["index"], whole["logits"], eps, norm, box, seed)
    measures = {name: whole[name] for name in ("effective_margin", "effective_weight_norm") if name in whole}
    return case, measures | {"position": place}


def _table(case: Case, ledger: Ledger, names: list[str], measures: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row per sample."""
    correct = ~losses.misclassified(case.logits, case.y)
    columns = {
        "index": case.index,
        "label": case.y,
        "clean_prediction": losses.predictions(case.logits),
        "adversarial_prediction": ledger.predicted,
        "clean_correct": correct,
        "robust": correct & ~ledger.broken,
        "logit_margin": losses.logit_margin(case.logits, case.y),
        "distance": torch.where(ledger.broken, ledger.distance, torch.where(correct, float("nan"), 0.0)),
        "closest": torch.where(correct, ledger.closest, float("nan")),
        "evaluations": ledger.evaluations,
        **measures,
    }
    if "radius" in columns:
        columns["radius"] = torch.where(correct, columns["radius"], 0.0)
    table = pd.DataFrame({name: value.numpy() for name, value in columns.items()})
    won = [names[stage] if stage >= 0 else "" for stage in ledger.stage.tolist()]
    table["attack"] = [name if held else "clean" for name, held in zip(won, correct.tolist(), strict=True)]
    for name in ("run", "step"):
        table[name] = pd.array(getattr(ledger, name).tolist(), dtype="Int64")
        table.loc[~ledger.broken.numpy(), name] = pd.NA
    return table


def _stages(samples: pd.DataFrame, line_up: Mapping[str, Stage], seconds: list[float]) -> list[dict[str, Any]]:
    """The robust accuracy that was left after each attack, and what it took."""
    left, told = float(samples["clean_correct"].mean()), []
    for (name, stage), spent in zip(line_up.items(), seconds, strict=True):
        left -= float((samples["clean_correct"] & (samples["attack"] == name)).mean())
        settings = describe(stage.attack)
        told.append({"name": name, "robust_accuracy": left, "seconds": spent, "settings": settings})
        told[-1] |= {
            "margin_threshold": stage.margin_threshold,
            "precision": stage.precision,
            "parallel_restarts": stage.parallel_restarts,
        }
    return told


class _Watch:
    """Shows a stage's progress with the accuracies known so far: a bound that only falls."""

    def __init__(self, bar: Progress, case: Case) -> None:
        self.bar, self.case, self.name, self.shown = bar, case, "", 0.0
        self.clean = float((~losses.misclassified(case.logits, case.y)).double().mean())
        self.task = bar.add_task(f"clean {self.clean:.1%}", total=None)
        self.made = 0

    def __call__(self, ledger: Ledger, name: str, pending: int) -> None:
        """After every round, shown a few times a second."""
        if name != self.name:
            self.name, self.most = name, pending
            self.bar.reset(self.task)
        now = time.monotonic()
        if now - self.shown < 0.2 and pending:
            return
        self.shown = now
        robust = self.clean - float(ledger.broken.double().mean())
        text = f"{name}: clean {self.clean:.1%}, robust at most {robust:.1%}"
        self.most = max(self.most, pending)
        self.bar.update(self.task, total=self.most, completed=self.most - pending, description=text)


def _length(source: Any) -> int:
    if not isinstance(source, tuple):
        return len(source)
    if len(source) != 2 or len(source[0]) != len(source[1]):
        raise InputError(f"data: tensors of lengths {[len(part) for part in source]}: must be (x, y), one label each")
    return len(source[0])


def _batches(source: Any, wanted: range, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if not wanted:
        raise InputError("data: holds no samples" if not wanted.stop else "data: holds fewer samples than processes")
    for begin in range(0, len(wanted), batch_size):
        places = list(wanted[begin : begin + batch_size])
        if isinstance(source, tuple):
            yield source[0][places], source[1][places], torch.tensor(places)
        elif isinstance(source, Split):
            yield source.__getitems__(places)
        else:
            rows = [source[place] for place in places]
            x, y = torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])
            yield x, y, torch.tensor([int(row[2]) if len(row) > 2 else i for i, row in zip(places, rows, strict=True)])


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)


def _version() -> str:
    from importlib.metadata import version

    return version("wideberth")
