"""The marker of the tests that start processes of their own."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Name it."""
    config.addinivalue_line("markers", "slow: starts processes of its own; leave out with -m 'not slow'")
