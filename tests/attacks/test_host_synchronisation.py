"""A training attack never waits for the device: shown on the meta device, whose tensors have shapes but no values.

Whatever needs a value on the host (`item`, `bool`, `nonzero`, a mask that decides a shape) has none there, and raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_conformance import TABLE, Row
from torch import nn

from wideberth.attacks import PGD, Attack, AttackInputs, ProjectedState, Query, apgd, perturb_batch, square_windows
from wideberth.randomness import Noise

META = torch.device("meta")


@pytest.fixture(autouse=True)
def forget_plans() -> Iterator[None]:
    """Plans are cached by device; these have no values."""
    yield
    apgd._plan.cache_clear()
    square_windows.plan.cache_clear()


def perturb(attack: Attack) -> None:
    """As the training loop does: one restart, nothing checked."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(META)
    x = torch.rand(5, 1, 2, 3, device=META)
    y, eps = torch.zeros(5, dtype=torch.int64, device=META), torch.full((5,), 0.1, device=META)
    inputs = AttackInputs(x, y, eps, Noise(torch.arange(5, device=META), 1))
    found = perturb_batch(replace(attack, restarts=1, targets=0), model, inputs, check_success=False)
    assert (found.x.shape, found.x.device, found.steps_survived.device) == (x.shape, META, META)


@pytest.mark.parametrize("row", [row for row in TABLE if not row.attack.ends_early], ids=lambda row: row.name)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_attack_waits_for_the_device(row: Row, norm: Any) -> None:
    if norm not in row.norms:
        pytest.skip("not defined in this norm")
    perturb(replace(row.attack, norm=norm))


@pytest.mark.parametrize("look", ["item", "bool", "nonzero", "mask"])
def test_an_attack_that_waits_is_found(look: str) -> None:
    class Looking(PGD):
        def move(self, inputs: AttackInputs, state: ProjectedState, query: Query) -> ProjectedState:
            success = inputs.goal_reached(query.logits)
            if look == "item":
                query.loss.sum().item()
            elif look == "bool":
                bool(success.any())
            elif look == "nonzero":
                success.nonzero()
            else:
                state.point[success]
            return super().move(inputs, state, query)

    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        perturb(Looking())
