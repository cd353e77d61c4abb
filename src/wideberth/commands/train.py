"""`wideberth train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import yaml

from wideberth.commands.parsing import Parser, prepared
from wideberth.runs import Run
from wideberth.training.catalogue import MODULES
from wideberth.training.train import train

for module in dict.fromkeys(MODULES.values()):
    import_module(module)  # so that their classes can be named without a path


def parser() -> Parser:
    """The options of `wideberth train`: the signature of `wideberth.train`."""
    made = Parser(
        prog="wideberth train", description="Train a model and leave a run directory to trust, repeat or continue."
    )
    made.add_argument("--config", action="config", help="a YAML file, or the name of a shipped recipe")
    made.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    made.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    made.add_function_arguments(train, skip={"config", "resume", "overwrite"}, as_positional=False)
    return made


def train_from(words: Sequence[str]) -> Run:
    """Train by command-line words; the same path for a person, a recipe and the quickstart."""
    made = parser()
    config = made.parse_args(prepared(words))
    torch.manual_seed(config.seed)  # the weights are drawn when the model is made
    ready = made.instantiate(config)
    arguments: dict[str, Any] = {name: ready[name] for name in vars(ready) if "." not in name and name != "config"}
    record = yaml.safe_load(made.dump(config, skip_none=False))
    for passing in ("config", "resume", "overwrite"):
        record.pop(passing, None)
    return train(**arguments, config=record)


def main(words: Sequence[str]) -> None:
    """Parse, train, and say what to do next."""
    run = train_from(words)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the other processes of a distributed run keep quiet
        print(f"finished: {run.path}\nnext: wideberth evaluate {run.path} --norm NORM --eps EPS")
