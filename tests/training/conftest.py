"""Tiny tensors gain nothing from threads, and lose much where processes share the cores."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker of the tests that start processes of their own."""
    config.addinivalue_line("markers", "slow: starts processes of its own; leave out with -m 'not slow'")
