"""What a policy remembers about each sample of the data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class SampleState(nn.Module):
    """A policy that remembers values per sample: a base class, or a mixin such as `class Mine(SampleState, Weighting)`.

    Each quantity is declared with `add_sample_state` and is a buffer `(N,)`, addressed by `batch.index`. It is on the
    model's device and in the checkpoint. Under several processes each rank changes the values of the samples that it
    visits; after an epoch all ranks take over the values of the rank that visited the sample (the mean, where several
    did).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fills: dict[str, float] = {}

    def add_sample_state(self, name: str, fill: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        """Declare a quantity, as `torchmetrics.Metric.add_state` does; call it in `__init__`.

        Args:
            name: the attribute that holds the buffer, (0,) until `allocate`.
            fill: the value of every sample at the beginning of training.
            dtype: of the buffer.
        """
        self.register_buffer(name, torch.zeros(0, dtype=dtype))
        self._fills[name] = fill

    def allocate(self, size: int) -> None:
        """Give every declared quantity one value per sample of the data set; called once, before training."""
        for name, fill in self._fills.items():
            before = getattr(self, name)
            setattr(self, name, torch.full((size,), fill, dtype=before.dtype, device=before.device))

    @property
    def sample_states(self) -> dict[str, Tensor]:
        """The declared quantities by name, each (N,)."""
        return {name: getattr(self, name) for name in self._fills}

    def synchronise(self, visited: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Take over the values of the samples that other ranks visited.

        Args:
            visited: (N,) bool, the samples that this rank visited since the last call.
            total: the sum of a tensor over the ranks.
        """
        if not self._fills:
            return
        visits = total(visited.to(torch.float32))
        for values in self.sample_states.values():
            wide = torch.promote_types(values.dtype, torch.float32)
            learned = total(torch.where(visited, values, 0).to(wide)) / visits.clamp_min(1)
            values.copy_(torch.where(visits > 0, learned.to(values.dtype), values))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device, but not to half precision, which would lose the small steps of a radius."""

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.dtype.itemsize < 4 else moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self
