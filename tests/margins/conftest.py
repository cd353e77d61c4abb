"""Tiny tensors gain nothing from threads, and lose much where processes share the cores."""

import torch

torch.set_num_threads(1)
