"""Hypothesis draws the same examples in every run."""

from hypothesis import settings

settings.register_profile("wideberth", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("wideberth")
