"""The keyed order of batches: a function of (seed, epoch), whatever the processes and wherever it starts."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wideberth.checks import InputError
from wideberth.data import KeyedSampler, Tensors, loader


def split(n: int = 20) -> Any:
    return Tensors(torch.rand(n, 2), torch.arange(n) % 2, torch.rand(2, 2), torch.arange(2)).train()


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = KeyedSampler(20, 6, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(1)  # the global generator plays no part
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert sorted(chain(*order(0, 3))) == list(range(20))
    assert [len(batch) for batch in order(0, 3)] == [6, 6, 6, 2]
    assert list(chain(*KeyedSampler(20, 6, shuffle=False))) == list(range(20))
    assert [len(batch) for batch in KeyedSampler(20, 6, shuffle=True, drop_last=True)] == [6, 6, 6]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(8, 60), batch_size=st.integers(4, 30), world=st.integers(1, 4), drop_last=st.booleans())
def test_ranks_share_every_batch(size: int, batch_size: int, world: int, drop_last: bool) -> None:
    batch_size = min(batch_size, size)
    with pytest.MonkeyPatch.context() as patch:
        shares, lengths = [], []
        for rank in range(world):
            as_rank(patch, rank, world)
            sampler = KeyedSampler(size, batch_size, shuffle=True, seed=1, drop_last=drop_last)
            shares.append(list(sampler))
            lengths.append(len(sampler))
    assert lengths == [len(share) for share in shares] == [lengths[0]] * world
    for parts in zip(*shares, strict=True):
        assert min(map(len, parts)) >= 1
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    union = sorted(position for share in shares for batch in share for position in batch)
    if drop_last:
        assert len(set(union)) == len(union) == lengths[0] * batch_size
    else:
        assert union == list(range(size))
    alone = list(KeyedSampler(size, batch_size, shuffle=True, seed=1, drop_last=drop_last))
    for batch in range(size // batch_size - 1):
        assert sorted(chain(*(share[batch] for share in shares))) == sorted(alone[batch])


def test_too_few_samples_for_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(InputError, match="batch_size=3 for 20 samples: must give each of 4 processes one"):
        list(KeyedSampler(20, 3, shuffle=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_continues_in_its_middle(workers: int) -> None:
    data = split()
    whole = loader(data, 6, shuffle=True, seed=2, epoch=5)
    rest = loader(data, 6, shuffle=True, seed=2, epoch=5, start_batch=2, workers=workers)
    assert [b[2].tolist() for b in rest] == [b[2].tolist() for b in whole][2:]
    assert len(rest) == len(whole) == 4
    rest.batch_sampler.set_epoch(5)  # type: ignore[union-attr]
    assert len(list(rest)) == 2
    rest.batch_sampler.set_epoch(6)  # type: ignore[union-attr]
    assert len(list(rest)) == 4


def test_a_batch_is_fetched_at_once() -> None:
    data = split()
    x, y, index = next(iter(loader(data, 6, shuffle=True)))
    assert x.shape == (6, 2)
    assert torch.equal(x, data.tensors()[0][index])
    assert torch.equal(y, data.labels[index])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loader(split(), 0, shuffle=True), "batch_size=0: must be at least 1"),
        (lambda: loader(split(), 21, shuffle=True, drop_last=True), "batch_size=21: 20 samples .* make no batch"),
        (lambda: loader(split(), 4, shuffle=True, workers=-1), "workers=-1: must be at least 0"),
        (lambda: loader(split(), 4, shuffle=True, start_batch=-1), "start_batch=-1: must be at least 0"),
    ],
)
def test_bad_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable", "ignore:.*LeafSpec")
@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_announces_every_epoch_and_resumes(tmp_path: Path, workers: int) -> None:
    lightning = pytest.importorskip("lightning")

    class Recorder(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.seen: dict[int, list[list[int]]] = {}

        def train_dataloader(self) -> Any:
            epoch, done = divmod(self.trainer.global_step, 4)
            return loader(split(), 6, shuffle=True, seed=4, workers=workers, epoch=epoch, start_batch=done)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen.setdefault(self.current_epoch, []).append(batch[2].tolist())
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            if save:
                self.trainer.save_checkpoint(tmp_path / f"{self.global_step}.ckpt")

        def on_train_epoch_end(self) -> None:
            if save:
                self.trainer.save_checkpoint(tmp_path / f"end{self.current_epoch}.ckpt")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(resume: Path | None = None) -> dict[int, list[list[int]]]:
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Recorder()
        trainer.fit(model, ckpt_path=resume)
        return model.seen

    def epoch(number: int) -> list[list[int]]:
        sampler = KeyedSampler(20, 6, shuffle=True, seed=4)
        sampler.set_epoch(number)
        return list(sampler)

    expected = {number: epoch(number) for number in range(3)}
    save = True
    assert fit() == expected
    save = False
    assert fit(tmp_path / "6.ckpt") == {1: expected[1][2:], 2: expected[2]}
    assert fit(tmp_path / "8.ckpt") == fit(tmp_path / "end1.ckpt") == {2: expected[2]}
