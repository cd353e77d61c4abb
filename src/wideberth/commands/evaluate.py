"""`wideberth evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import Tensor, nn

from wideberth.attacks import SUITES
from wideberth.checks import InputError, Norm, choice, one_line
from wideberth.commands.parsing import call, print_to_terminal
from wideberth.commands.threat import threat
from wideberth.configuration import construct, import_object
from wideberth.data import Data, selected_rows
from wideberth.evaluation import Evaluation, evaluate, shards
from wideberth.evaluation.identity import describe_samples, describe_search, record_name
from wideberth.evaluation.protocol import Protocol
from wideberth.evaluation.record import check_free
from wideberth.models import load_model
from wideberth.reports import render_records
from wideberth.reports.records import eps_text
from wideberth.runs import Run
from wideberth.trust import check
from wideberth.yaml_files import load_yaml


def subject(
    model: str, data: Data | None, weights: str | None, architecture: str | None, trust: bool = False
) -> tuple[nn.Module, Data]:
    """The model on the best device at hand, and the data: the given one, or what the run was trained on.

    What the run's configuration and the architecture name is checked before it runs, unless they are trusted.
    """
    folder = Path(model)
    if not folder.exists() and ("/" in model and not model.startswith(("timm/", "torchvision/"))):
        raise InputError(f"MODEL {model!r}: no such run or file")
    if data is None:
        recorded = Run(folder).config.get("data") if folder.is_dir() else None
        if recorded is None:
            raise InputError(f"--data: needed, since MODEL {model!r} is not a run that records its data")
        data = build_data(recorded, trust=trust, where=str(folder / "config.yaml"))
    spec = None if architecture is None else read_architecture(architecture)
    loaded = load_model(model, weights=weights, architecture=spec, classes=data.classes, trust=trust)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), data


def read_architecture(given: str) -> dict[str, Any]:
    """The class_path and init_args that a YAML file holds, as they are or as the `model` of a run, or that are given.

    Read here and not by the parser, which would build what it finds.
    """
    try:
        read = load_yaml(given if "class_path" in given else Path(given).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"--architecture {given!r:.80}: cannot be read: {one_line(error)}") from error
    spec = read.get("model", read) if isinstance(read, dict) else read
    if not isinstance(spec, dict):
        raise InputError(f"--architecture {given!r:.80}: must be a YAML file, or YAML, with class_path and init_args")
    return spec


def build_data(recorded: dict[str, Any], *, trust: bool = False, where: str = "config.yaml") -> Data:
    """The data set that the configuration of a run names, in the file `where`.

    Raises:
        NotTrusted: it names what is no data set of wideberth, and `trust` is False; nothing was imported.
        InputError: it cannot be built.
    """
    if not trust:
        check(recorded, Data, where, "data")
    if not isinstance(recorded, dict):
        raise InputError(f"{where}: data: must be class_path and init_args, is {recorded!r:.80}")
    path = str(recorded.get("class_path"))
    made = construct(import_object(path), path, **(recorded.get("init_args") or {}))
    if not isinstance(made, Data):
        raise InputError(f"data: {recorded.get('class_path')} is not a wideberth.data.Data")
    return made


def run(
    model: str,
    data: Data | None = None,
    norm: Norm | None = None,
    eps: float | str | None = None,
    suite: str = "fast",
    rows: int | None = None,
    batch_size: int = 256,
    margin: bool = True,
    radii: bool = False,
    evidence: bool = True,
    seed: int = 0,
    out: str | None = None,
    weights: str | None = None,
    architecture: str | None = None,
    progress: bool = True,
    overwrite: bool = False,
    list: bool = False,
    trust: bool = False,
) -> None:
    """Measure the accuracy of a model on the test split of a data set, clean and under attack.

    The record goes into a folder of its own, evaluations/NAME, where NAME stands for the protocol. Interrupted, the
    command leaves NAME.state beside it and goes on from there when called again. Under torchrun the processes share the
    samples.

    Args:
        model: a run directory, a .safetensors file, timm/NAME, torchvision/NAME, or an import path with arguments.
        data: the data set (default: what the run was trained on).
        norm: linf, l2 or l1 (default: that of the run's attack, else linf).
        eps: the radius, e.g. 8/255, or FILE.parquet:COLUMN with one for each test sample (default: what the run was
            trained for, else 8/255).
        suite: the line-up of attacks: fast, or the composition of AutoAttack: standard, plus, rand; pgd; radius.
        rows: only so many test rows, those that the data's test_rows takes.
        batch_size: samples at a time.
        margin: also measure effective margins.
        radii: also search the smallest radius at which each sample breaks: the curve of robust accuracy against eps.
        evidence: keep the adversarial points, which `wideberth verify` checks.
        seed: of the attacks.
        out: the directory that gets the folder evaluations (default: the run directory, if MODEL is one).
        weights: a file of weights for a model named by its architecture.
        architecture: a YAML file (or YAML) with class_path and init_args, for a .safetensors file on its own.
        progress: show a progress bar.
        overwrite: replace an evaluation by the same protocol.
        list: print the evaluations that the run (or the directory OUT) holds, and evaluate nothing.
        trust: let the run's config.yaml, and the architecture, name any class and run its code.
    """
    choice("suite", suite, tuple(SUITES))
    if list:
        print_to_terminal(render_records([Run(model if out is None else out)]))
        return
    if weights is not None and out is None and Path(model).is_dir():
        raise InputError("--out: needed with --weights, since the evaluations of a run are of its own weights")
    network, samples = subject(model, data, weights, architecture, trust)
    found = threat(model, norm, eps, samples, rows)
    target = out if out is not None else (model if Path(model).is_dir() else None)
    search: dict[str, Any] = {"norm": found.norm, "suite": suite, "seed": seed, "radii": radii, "evidence": evidence}
    state = None
    if target is not None:
        protocol = Protocol(**search, box=samples.box, batch_size=batch_size, margin=margin)
        name = planned_name(samples, rows, protocol, found.eps)
        state = check_free(target, name, overwrite).with_name(f"{name}.state")
    first = shards.mine()[0] == 0  # under torchrun, the first process speaks for all
    if first:
        print(found.reason)
    options: dict[str, Any] = {
        "rows": rows,
        "batch_size": batch_size,
        "margin": margin,
        "progress": progress,
        "state": state,
    }
    result = evaluate(network, samples, eps=found.eps, **search, **options)
    result.protocol.update(model=model, weights=weights)
    if first:
        print_to_terminal(table(result))
        if target is not None:
            print(f"saved: {result.save(target, overwrite=overwrite)}")
    shards.gathered(None)  # what the other processes keep of their share goes when the record is saved
    result.discard_state()


def planned_name(samples: Data, rows: int | None, protocol: Protocol, eps: float | Tensor) -> str:
    """The name that the record of an evaluation will have, before its search; `eps` is one radius or (N,)."""
    positions, in_words = selected_rows(samples, rows)
    radii = eps[positions] if isinstance(eps, Tensor) else None
    about = describe_samples(samples, in_words) | describe_search(protocol, eps if radii is None else radii)
    return record_name(about, len(positions), radii)


def table(found: Evaluation) -> Table:
    """The result, for a terminal."""
    told = found.summary()
    view = Table("", "accuracy", "95 % interval", title=f"{told['norm']} {eps_text(told)}, n = {told['n']}")
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
            f"{told['zero_gradients']:.1%} of the inputs have a zero gradient, which attacks by gradients cannot use: "
            "do not rely on this robust accuracy"
        )
    return view


def main(words: Sequence[str]) -> None:
    """Parse and evaluate."""
    call("evaluate", run, words)
