"""Tiny tensors gain nothing from threads; hypothesis draws the same examples in every run."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("wideberth", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("wideberth")
