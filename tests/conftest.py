"""What holds for all tests: one thread each, and random numbers that do not hang on what ran before."""

from __future__ import annotations

import pytest
import torch

# Tiny tensors gain nothing from threads, and lose much where processes share the cores.
torch.set_num_threads(1)
torch.manual_seed(0)  # for what is built when tests are collected


@pytest.fixture(autouse=True, scope="module")
def _seeded_for_fixtures() -> None:
    """For what a module's tests share."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The global generator is what torch draws initial weights from; no result may hang on the order of the tests."""
    torch.manual_seed(0)
