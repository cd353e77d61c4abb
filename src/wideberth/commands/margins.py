"""`wideberth margins`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from wideberth import margins
from wideberth.checks import InputError, Norm
from wideberth.commands.evaluate import subject
from wideberth.commands.parsing import call, print_to_terminal
from wideberth.data import Data, selected_rows
from wideberth.runs import write_atomically


def run(
    model: str,
    data: Data | None = None,
    norm: Norm = "l2",
    rows: int | None = None,
    batch_size: int = 256,
    out: str | None = None,
    weights: str | None = None,
    architecture: str | None = None,
    trust: bool = False,
) -> None:
    """Measure effective margins on the test split: the logit margin over the norm of the effective weight.

    Args:
        model: a run directory, a .safetensors file, timm/NAME, torchvision/NAME, or an import path with arguments.
        data: the data set (default: what the run was trained on).
        norm: the norm that distances are meant in: linf, l2 or l1.
        rows: only so many test rows, those that the data's test_rows takes.
        batch_size: samples at a time.
        out: a .parquet or .csv file for the table, one row per sample (default: margins.parquet in the run).
        weights: a file of weights for a model named by its architecture.
        architecture: a YAML file (or YAML) with class_path and init_args, for a .safetensors file on its own.
        trust: let the run's config.yaml, and the architecture, name any class and run its code.
    """
    if out is not None and Path(out).suffix not in (".csv", ".parquet"):
        raise InputError(f"--out {out}: must end in .parquet or .csv")
    if weights is not None and out is None and Path(model).is_dir():
        raise InputError("--out: needed with --weights, since the table in the run directory is about its own weights")
    network, source = subject(model, data, weights, architecture, trust)
    chosen, _ = selected_rows(source, rows)
    table = margins.table(network, source.test(), norm, chosen, batch_size)
    view = Table(
        "quantile", "logit margin", "effective margin", "effective weight norm", title=f"{norm}, n = {len(chosen)}"
    )
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        values = [table[name].quantile(q) for name in ("logit_margin", "effective_margin", "effective_weight_norm")]
        view.add_row(f"{q:.0%}", *(f"{value:.4g}" for value in values))
    print_to_terminal(view)
    target = Path(out) if out is not None else (Path(model) / "margins.parquet" if Path(model).is_dir() else None)
    if target is not None:
        write = table.to_csv if target.suffix == ".csv" else table.to_parquet
        write_atomically(target, lambda file: write(file, index=False))
        print(f"saved: {target}")


def main(words: Sequence[str]) -> None:
    """Parse and measure."""
    call("margins", run, words)
