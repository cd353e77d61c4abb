"""What holds for all tests: one thread each, and the same random numbers whatever ran before."""

from __future__ import annotations

import pytest
import torch

# Tiny tensors gain nothing from threads, and lose much where processes share the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The global generator is what torch draws initial weights from; no result may hang on the order of the tests."""
    torch.manual_seed(0)
