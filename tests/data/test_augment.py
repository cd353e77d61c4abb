"""Augmentation: equal to the plain definition, and the same whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from wideberth.checks import InputError
from wideberth.data import CropFlip, RandomResizedCrop
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


def stretched(how: RandomResizedCrop, image: Tensor, index: int, seed: int, epoch: int) -> Tensor:
    """One image, step by step: ten tries for a size that fits, a place, torch's own resizing of the crop."""
    noise = Noise(torch.tensor([index]), seed, epoch)
    height, width = image.shape[1:]
    shares, shapes = noise.fold("size").uniform((2, 10), torch.float64)[0].tolist()
    crop = min(height, round(width / how.ratio[0])), min(width, round(height * how.ratio[1]))
    for share, shape in zip(shares, shapes, strict=True):
        area = height * width * (how.scale[0] + share * (how.scale[1] - how.scale[0]))
        ratio = how.ratio[0] * (how.ratio[1] / how.ratio[0]) ** shape
        size = max(1, round((area / ratio) ** 0.5)), max(1, round((area * ratio) ** 0.5))
        if size[0] <= height and size[1] <= width:
            crop = size
            break
    places = noise.fold("place").uniform((2,), torch.float64)[0].tolist()
    top, left = int(places[0] * (height - crop[0] + 1)), int(places[1] * (width - crop[1] + 1))
    cut = image[None, :, top : top + crop[0], left : left + crop[1]]
    out = interpolate(cut, (height, width), mode="bilinear", align_corners=False)[0]
    return out.flip(-1) if how.flip and noise.fold("flip").integer(2, (1,)).item() else out


@pytest.mark.parametrize(
    "how",
    [
        RandomResizedCrop(),
        RandomResizedCrop((0.3, 0.9), (1.0, 1.0), flip=False),
        RandomResizedCrop((0.01, 0.02)),
        RandomResizedCrop((0.9, 1.0), (4.0, 5.0)),  # none fits
    ],
)
@pytest.mark.parametrize("shape", [(9, 9), (7, 12)])
def test_resized_crops_equal_the_plain_definition(how: RandomResizedCrop, shape: tuple[int, int]) -> None:
    x = torch.rand(40, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = how(x, INDEX, seed=3, epoch=2)
    expected = torch.stack([stretched(how, image, int(i), 3, 2) for image, i in zip(x, INDEX, strict=True)])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(how(x.float(), INDEX, seed=3, epoch=2), expected.float())


def test_resized_crops_depend_on_sample_seed_and_epoch_alone() -> None:
    how, before, state = RandomResizedCrop(), X.clone(), torch.get_rng_state()
    whole = how(X, INDEX, seed=0, epoch=1)
    assert torch.equal(how(X[5:6], INDEX[5:6], seed=0, epoch=1), whole[5:6])
    assert torch.equal(how(X.flip(0), INDEX.flip(0), seed=0, epoch=1), whole.flip(0))
    assert not torch.equal(how(X, INDEX, seed=0, epoch=2), whole)
    assert not torch.equal(how(X, INDEX, seed=1, epoch=1), whole)
    assert torch.equal(X, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resized_crops_stay_within_the_values_of_the_image(dtype: torch.dtype) -> None:
    x = (torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.3).to(dtype)
    out = RandomResizedCrop()(x, INDEX, seed=0, epoch=0)
    assert out.dtype == dtype
    assert 0 <= out.min() < out.max() <= 1
    assert torch.equal(RandomResizedCrop()(torch.ones_like(x), INDEX, seed=0, epoch=0), torch.ones_like(x))


def test_resized_crops_cover_the_areas_asked_for() -> None:
    ramp = torch.linspace(0, 1, 32).view(1, 1, 1, 32).expand(4000, 1, 32, 32)
    out = RandomResizedCrop((0.25, 1.0), (1.0, 1.0))(ramp, torch.arange(4000), seed=0, epoch=0)
    widths = (out[:, 0, 0, -1] - out[:, 0, 0, 0]).abs() * 31 + 1  # of the crop, in pixels
    areas = (widths / 32) ** 2
    assert 0.22 < areas.min() < 0.3
    assert areas.max() > 0.95
    assert 0.6 < areas.mean() < 0.65
    assert 0.47 < (out[:, 0, 0, -1] < out[:, 0, 0, 0]).float().mean() < 0.53


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropFlip(-1), "padding=-1: must be at least 0"),
        (lambda: CropFlip(mode="wrap"), "mode='wrap': accepted are constant, reflect"),  # type: ignore[arg-type]
        (lambda: CropFlip()(X[:, 0], INDEX, seed=0, epoch=0), "CropFlip is for images"),
        (
            lambda: RandomResizedCrop((0.0, 1.0)),
            r"scale=\(0.0, 1.0\): must be \(smallest, largest\), above 0",
        ),
        (lambda: RandomResizedCrop((0.5, 1.1)), "scale="),
        (lambda: RandomResizedCrop((0.5, 0.4)), "scale="),
        (lambda: RandomResizedCrop(ratio=(2.0, 1.0)), "ratio="),
        (lambda: RandomResizedCrop(ratio=(1.0, float("inf"))), "ratio="),
        (lambda: RandomResizedCrop()(X[:, 0], INDEX, seed=0, epoch=0), "RandomResizedCrop is for images"),
        (lambda: CropFlip(6, "reflect")(X, INDEX, seed=0, epoch=0), "padding=6: mode='reflect' needs less than"),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
