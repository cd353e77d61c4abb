"""`wideberth train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, get_type_hints

import torch
import yaml
from jsonargparse import Namespace

from wideberth.commands.parsing import Parser, own_modules, prepared, trusted
from wideberth.runs import Run
from wideberth.schema import upgraded_configuration
from wideberth.training.catalogue import MODULES
from wideberth.training.train import train
from wideberth.trust import check_configuration

PASSING = ("config", "resume", "overwrite", "trust")
"""Options that say what to do this time, and are no part of the configuration of a run."""

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
    made.add_argument("--trust", action="store_true", help="let files name any class, and run its code")
    made.add_function_arguments(train, skip=set(PASSING), as_positional=False)
    return made


def parse(words: Sequence[str]) -> tuple[Parser, Namespace]:
    """The parser and what it makes of the words; configuration files are checked before anything they name is imported.

    Raises:
        NotTrusted: a file names what is not ours, and the words do not say `--trust`.
        InputError: for anything else that cannot be used.
    """
    made = parser()
    if not trusted(words):
        made.check = lambda held, file: check_configuration(held, get_type_hints(train), file)
    own_modules(words)
    config = made.parse_args(prepared(words))
    if made.files < sum(word.partition("=")[0] == "--config" for word in words):
        raise RuntimeError("a configuration file was read without being checked: jsonargparse has changed")
    return made, config


def train_from(words: Sequence[str]) -> Run:
    """Train by command-line words; the same path for a person, a recipe and the quickstart."""
    made, config = parse(words)
    torch.manual_seed(config.seed)  # the weights are drawn when the model is made
    ready = made.instantiate(config)
    arguments: dict[str, Any] = {
        name: ready[name] for name in vars(ready) if "." not in name and name not in ("config", "trust")
    }
    record = yaml.safe_load(made.dump(config, skip_none=False))
    for passing in PASSING:
        record.pop(passing, None)
    return train(**arguments, config=upgraded_configuration(record, "--config"))


def main(words: Sequence[str]) -> None:
    """Parse, train, and say what to do next."""
    run = train_from(words)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the other processes of a distributed run keep quiet
        print(f"finished: {run.path}\nnext: wideberth evaluate {run.path} --norm NORM --eps EPS")
