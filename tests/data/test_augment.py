"""Augmentation: equal to the plain definition, and the same whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from wideberth.checks import InputError
from wideberth.data import CropFlip
from wideberth.randomness import Noise

X = torch.rand(40, 3, 7, 6, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(40) * 7


def plain(how: CropFlip, image: Tensor, index: int, seed: int, epoch: int) -> Tensor:
    """One image, step by step."""
    noise = Noise(torch.tensor([index]), seed, epoch)
    top, left = noise.fold("crop").integer(2 * how.padding + 1, (2,))[0].tolist()
    padded = pad(image[None], (how.padding,) * 4, mode=how.mode)[0]
    cropped = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
    return cropped.flip(-1) if how.flip and noise.fold("flip").integer(2, (1,)).item() else cropped


@pytest.mark.parametrize(
    "how", [CropFlip(), CropFlip(3, "reflect"), CropFlip(2, flip=False), CropFlip(0), CropFlip(0, flip=False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_plain_definition(how: CropFlip, dtype: torch.dtype) -> None:
    out = how(X.to(dtype), INDEX, seed=3, epoch=2)
    expected = torch.stack([plain(how, x, int(i), 3, 2) for x, i in zip(X.to(dtype), INDEX, strict=True)])
    assert out.dtype == dtype
    assert torch.equal(out, expected)


def test_independent_of_the_batch() -> None:
    how = CropFlip()
    whole = how(X, INDEX, seed=0, epoch=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(how(X[order], INDEX[order], seed=0, epoch=1), whole[order])
    assert torch.equal(how(X[5:6], INDEX[5:6], seed=0, epoch=1), whole[5:6])
    assert torch.equal(how(X.contiguous(memory_format=torch.channels_last), INDEX, seed=0, epoch=1), whole)


def test_new_pictures_each_epoch_and_seed_and_the_input_is_untouched() -> None:
    how, before, state = CropFlip(), X.clone(), torch.get_rng_state()
    a, b, c = how(X, INDEX, seed=0, epoch=0), how(X, INDEX, seed=0, epoch=1), how(X, INDEX, seed=1, epoch=0)
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(X, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_shifts_and_flips_are_uniform() -> None:
    ramp = torch.arange(1, 9.0).view(1, 1, 1, 8).expand(4000, 1, 8, 8) / 8
    out = CropFlip(2)(ramp, torch.arange(4000), seed=0, epoch=0)
    flipped = out[:, 0, 4, 3] > out[:, 0, 4, 4]
    assert 0.47 < flipped.float().mean() < 0.53
    straight = torch.where(flipped[:, None], out[:, 0, 4].flip(-1), out[:, 0, 4])
    shift = (straight[:, 4] * 8).round().long() - 5
    assert torch.bincount(shift + 2, minlength=5).min() > 700


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropFlip(-1), "padding=-1: must be at least 0"),
        (lambda: CropFlip(mode="wrap"), "mode='wrap': accepted are constant, reflect"),  # type: ignore[arg-type]
        (lambda: CropFlip()(X[:, 0], INDEX, seed=0, epoch=0), "CropFlip is for images"),
        (lambda: CropFlip(6, "reflect")(X, INDEX, seed=0, epoch=0), "padding=6: mode='reflect' needs less than"),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
