"""Early-stopped PGD on models where every iterate is known in advance."""

from __future__ import annotations

import pytest
import torch
from attack_oracles import linear
from torch import Tensor, nn

from wideberth.attacks import PGD
from wideberth.attacks.early_stopped import EarlyStoppedPGD
from wideberth.checks import InputError

WIDE = (-10.0, 10.0)


def line(*bounds: float) -> nn.Module:
    """Of one feature v, logits (0, 1 inside the intervals between `bounds` and -1 outside, v - 100)."""

    class Line(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside = (x[:, :1] > x.new_tensor(bounds)).sum(1) % 2 == 1
            wrong = torch.where(inside, 1.0, -1.0).to(x.dtype)
            return torch.stack([torch.zeros_like(wrong), wrong, x[:, 0] - 100], dim=1)

    return Line()


def ahead(logits: Tensor, y: Tensor) -> Tensor:
    """A loss whose gradient always says: further."""
    del y
    return logits[:, 2]


def found(attack: EarlyStoppedPGD, bounds: tuple[float, ...], start: Tensor, eps: float = 5.0) -> Tensor:
    return attack(line(*bounds), start[:, None], torch.zeros(len(start), dtype=torch.int64), eps=eps).x[:, 0]


@pytest.mark.parametrize("tau", [0, 1, 2, 3])
def test_each_row_stops_tau_steps_after_its_own_first_mistake(tau: int) -> None:
    """Steps of 1, mistakes beyond 2.75: a start at -1.5 errs after 5 steps, one at 3.5 at once."""
    start = torch.arange(-5, 5, dtype=torch.float64) - 0.5
    attack = EarlyStoppedPGD(box=WIDE, steps=6, step_size=1.0, start="none", loss=ahead, tau=tau)
    first = (3.5 - start).clamp_min(0)
    taken = (first + tau).clamp_max(6)
    torch.testing.assert_close(found(attack, (2.75,), start, eps=20.0), start + taken)


def test_steps_from_the_right_side_are_not_counted() -> None:
    """Wrong at 2, right at 3 and 4, wrong at 5: one step from 2, free ones from 3 and 4, and a stop at 5."""
    attack = EarlyStoppedPGD(box=WIDE, steps=9, step_size=1.0, start="none", loss=ahead, tau=1)
    assert found(attack, (1.5, 2.5, 4.5), torch.zeros(1, dtype=torch.float64), eps=20.0).item() == 5


def test_with_patience_for_all_steps_it_is_pgd() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((8, 6), (3, 6)))
    model, y = linear(weight), torch.arange(8) % 3
    for norm, eps in (("linf", 0.1), ("l2", 0.3), ("l1", 0.8)):
        patient = EarlyStoppedPGD(norm=norm, steps=5, tau=5)(model, x, y, eps=eps)
        plain = PGD(norm=norm, steps=5)(model, x, y, eps=eps)
        assert torch.equal(patient.x, plain.x)
        assert torch.equal(patient.success, plain.success)
        friendly = EarlyStoppedPGD(norm=norm, steps=5)(model, x, y, eps=eps)
        assert not torch.equal(friendly.x, plain.x)
        assert torch.equal(friendly.success, plain.success)


def test_what_it_finds_is_friendlier_than_what_pgd_finds_and_as_wrong() -> None:
    """On two classes of a linear model every step of PGD raises the loss, so stopping keeps it lower."""
    weight = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.5, 1.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    model, x = linear(weight), torch.rand(30, 3, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)

    def margins(attack: PGD) -> Tensor:
        logits = model(attack(model, x, y, eps=0.3).x)
        return logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]

    options = {"steps": 10, "step_size": 0.03, "start": "none", "box": WIDE}
    hard, soft = margins(PGD(**options)), margins(EarlyStoppedPGD(**options))
    assert (hard < 0).sum() > 5
    assert torch.equal(soft <= 0, hard <= 0)
    step = 0.03 * (weight[0] - weight[1]).abs().sum()
    clean = model(x).gather(1, y[:, None])[:, 0] - model(x).gather(1, 1 - y[:, None])[:, 0]
    steps = (clean / step).ceil().clamp(max=10)
    torch.testing.assert_close(soft, clean - steps * step)


def test_noise_is_added_to_every_step_and_has_the_size_asked_for() -> None:
    """A model without gradient: all that moves the rows is noise, a sum of nine draws."""
    model = linear(torch.zeros(2, 400, dtype=torch.float64), torch.tensor([1.0, 0.0]))
    x, y = torch.zeros(20, 400, dtype=torch.float64), torch.zeros(20, dtype=torch.int64)
    attack = EarlyStoppedPGD(box=WIDE, steps=9, start="none", omega=0.01)
    moved = attack(model, x, y, eps=1.0).x
    torch.testing.assert_close(moved.std().item(), 0.03, rtol=0.03, atol=0)
    assert moved.mean().abs() < 0.001
    assert moved.unique().numel() == moved.numel()


def test_refuses_to_keep_another_point_than_where_it_stopped() -> None:
    with pytest.raises(InputError, match="keep='worst'"):
        EarlyStoppedPGD(keep="worst")
    with pytest.raises(InputError, match="tau=-1"):
        EarlyStoppedPGD(tau=-1)
