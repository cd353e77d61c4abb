"""Memory is bounded by what is under way: inputs are read when they are needed, and freed after it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from wideberth import losses, margins
from wideberth.attacks import PGD, Stage
from wideberth.checks import InputError
from wideberth.evaluation import evaluate
from wideberth.evaluation.protocol import Protocol
from wideberth.evaluation.samples import read_samples

SHAPE = (3, 7, 5)
ROWS, BATCH = 400, 8
SUITE = {
    "PGD": PGD(steps=3, keep="worst", loss=losses.margin_loss),
    "PGD targeted": Stage(PGD(steps=2, targets=2, restarts=2, loss=losses.margin_loss), parallel_restarts=2),
}


class Made(Dataset[Any]):
    """Rows made from their index."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(row)
        return torch.rand(SHAPE, generator=generator), row % 4


class Counting(nn.Module):
    """A network that counts, now and then, the rows of inputs' shape that are alive anywhere in the process."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(105, 4))
        self.calls = self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 25 == 0:
            alive = {}
            for thing in gc.get_objects():
                if type(thing) is Tensor and thing.shape[1:] == SHAPE:
                    alive[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // (4 * 105)
            self.most = max(self.most, sum(alive.values()))
        logits: Tensor = self.layers(x)
        return logits


@pytest.mark.parametrize("evidence", [True, False])
def test_an_evaluation_holds_a_few_batches_however_many_samples_there_are(evidence: bool) -> None:
    model = Counting()
    found = evaluate(model, Made(), eps=0.05, suite=SUITE, batch_size=BATCH, examined=False, evidence=evidence)
    assert model.calls > 2 * ROWS / BATCH
    assert 0 < found.robust_accuracy < found.clean_accuracy
    assert BATCH <= model.most <= 20 * BATCH < ROWS / 2


def test_margins_hold_one_batch() -> None:
    model = Counting()
    table = margins.table(model, Made(), "linf", batch_size=BATCH)
    assert table["index"].tolist() == list(range(ROWS))
    assert model.most <= 4 * BATCH
    x, y = (torch.stack([Made()[row][0] for row in range(20)]), torch.arange(20) % 4)
    whole = margins.measure(model, x, y, "linf")[0]
    assert table["effective_margin"][:20].tolist() == pytest.approx(whole.tolist(), rel=1e-5)
    part = margins.table(model, (x, y), "linf", positions=[7, 3], batch_size=1)
    assert part["effective_margin"].tolist() == pytest.approx(whole[[7, 3]].tolist(), rel=1e-5)
    assert part["index"].tolist() == [7, 3]


def test_of_many_classes_only_the_targets_are_kept() -> None:
    """Not the logits (N, K): of 1,000 classes, the label's margin, the prediction and the likeliest others."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(105, 1000))
    protocol = Protocol("linf", (0.0, 1.0), "standard", 0, 16, margin=False, radii=True, evidence=True)
    samples = read_samples(
        model, Made(), torch.arange(40), torch.full((40,), 0.1), protocol, next(model.parameters()).device
    )
    kept = [value for value in vars(samples).values() if isinstance(value, Tensor)]
    assert max(value.untyped_storage().nbytes() for value in kept) <= 40 * 9 * 8
    logits = model(torch.stack([Made()[row][0] for row in range(40)]))
    assert torch.equal(samples.ranked_classes, losses.likeliest(logits, samples.y)[:, :9])


class Augmented(Made):
    """Another input each time."""

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(row)
        return (x + 0.01 * torch.rand(())).clamp(0, 1), y


def test_data_that_change_while_they_are_read_are_refused() -> None:
    with pytest.raises(InputError, match=r"data: sample \d+ is not what it was when it was first read"):
        evaluate(Counting(), Augmented(), eps=0.05, suite=SUITE, batch_size=BATCH, rows=32)
