"""Runs side by side, whose results are kept as they come in: an interrupted benchmark continues where it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import pandas as pd

UNLIKE = ("out", "data", "seeds", "jobs", "only", "cost")
"""Options that do not change what a run is."""


def results(
    run: Callable[[str, int, argparse.Namespace], dict[str, Any]],
    order: Iterable[tuple[str, int]],
    options: argparse.Namespace,
    **settings: Any,
) -> pd.DataFrame:
    """One row per run, those of earlier calls in OUT/results.jsonl included, names in the order of `order`.

    Args:
        run: (name, seed, options) -> its figures; a function of a module, since processes of their own call it.
        order: names and seeds, what matters most first.
        options: with `out`, `jobs` and `only`; runs whose other options were not these are left out.
        settings: constants that a run depends on, too.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    ledger = options.out / "results.jsonl"
    settings |= {key: value for key, value in vars(options).items() if key not in UNLIKE}
    known = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.is_file() else []
    known = [entry for entry in known if entry["settings"] == settings]
    done = {(entry["name"], entry["seed"]) for entry in known}
    order = list(order)
    todo = [entry for entry in order if options.only in entry[0] and entry not in done]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(run, *entry, options): entry for entry in todo}
        for future in as_completed(pending):
            name, seed = pending[future]
            found = {"name": name, "seed": seed} | future.result() | {"settings": settings, "torch": version("torch")}
            known.append(found)
            with ledger.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
    if not known:
        raise SystemExit(f"--only {options.only!r}: is in none of {sorted({name for name, _ in order})}")
    places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in order))}
    return pd.DataFrame(known).sort_values(by="name", key=lambda column: column.map(places), kind="stable")
