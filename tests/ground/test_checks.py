"""Bad input is refused in one line that names the argument, what came and what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from wideberth import checks
from wideberth.checks import InputError

NAN, INF = float("nan"), float("inf")
REFUSED: list[tuple[Callable[..., None], tuple[Any, ...], str]] = [
    (checks.choice, ("start", "x", ("a", "b")), "start='x': accepted are a, b"),
    (checks.norm_name, ("l0",), "norm='l0': accepted are linf, l2, l1"),
    (checks.norm_name, (2,), "norm=2: accepted are linf, l2, l1"),
    (checks.at_least, ("steps", 0, 1), "steps=0: must be at least 1"),
    (checks.at_least, ("beta", NAN, 0), "beta=nan: must be at least 0"),
    (checks.at_least, ("beta", "1", 0), "beta=1: must be at least 0"),
    (checks.at_least, ("beta", torch.ones(2), 0), "beta=tensor([1., 1.]): must be at least 0"),
    (checks.valid_box, ((1.0, 0.0),), "box=(1.0, 0.0): must be (low, high) with low < high"),
    (checks.valid_box, ((0.0, 0.0),), "box=(0.0, 0.0): must be"),
    (checks.valid_box, ((0.0, NAN),), "box=(0.0, nan): must be"),
    (checks.valid_box, ((0.0, 1.0, 2.0),), "box=(0.0, 1.0, 2.0): must be"),
    (checks.valid_eps, (-1.0, 3), "eps=-1.0: must be a finite number >= 0, or a tensor of shape (3,)"),
    (checks.valid_eps, (INF, 3), "eps=inf: must be"),
    (checks.valid_eps, (NAN, 3), "eps=nan: must be"),
    (checks.valid_eps, ("8/255", 3), "eps='8/255': must be"),
    (checks.valid_eps, (None, 3), "eps=None: must be"),
    (checks.valid_eps, (-1.0,), "eps=-1.0: must be a finite number >= 0"),
    (checks.valid_eps, (torch.zeros(2),), "eps=tensor([0., 0.]): must be a finite number >= 0"),
    (checks.valid_eps, (torch.zeros(2), 3), "eps of shape (2,): must be a number or one radius per sample, shape (3,)"),
    (checks.valid_eps, (torch.zeros(3, 1), 3), "eps of shape (3, 1): must be"),
    (checks.valid_eps, (torch.tensor([0.0, -1.0, 0.0]), 3), "eps holds a negative or non-finite radius"),
    (checks.valid_eps, (torch.tensor([0.0, NAN, 0.0]), 3), "eps holds a negative or non-finite radius"),
    (checks.valid_eps, (torch.tensor([0.0, INF, 0.0]), 3), "eps holds a negative or non-finite radius"),
    (checks.valid_inputs, (torch.zeros(3), (0.0, 1.0)), "x of shape (3,): must be (B, ...) with at least one sample"),
    (checks.valid_inputs, (torch.zeros(0, 3), (0.0, 1.0)), "x of shape (0, 3): must be"),
    (checks.valid_inputs, (torch.zeros(2, 3).byte(), (0.0, 1.0)), "x is torch.uint8: must be floating point"),
    (
        checks.valid_inputs,
        (torch.full((2, 3), 255.0), (0.0, 1.0)),
        "x spans [255, 255]: must lie in the box [0.0, 1.0]",
    ),
    (checks.valid_inputs, (torch.tensor([[0.5, -0.01]]), (0.0, 1.0)), "x spans [-0.01, 0.5]: must lie"),
    (checks.valid_inputs, (torch.tensor([[0.5, NAN]]), (0.0, 1.0)), "x spans [nan, nan]: must lie"),
    (checks.valid_labels, (torch.zeros(2, dtype=torch.int64), 3, 4), "y of shape (2,) and torch.int64: must be (3,)"),
    (checks.valid_labels, (torch.zeros(3, 1, dtype=torch.int64), 3, 4), "y of shape (3, 1)"),
    (
        checks.valid_labels,
        (torch.zeros(3), 3, 4),
        "y of shape (3,) and torch.float32: must be (3,) classes, torch.int64",
    ),
    (checks.valid_labels, (torch.zeros(3, dtype=torch.int32), 3, 4), "y of shape (3,) and torch.int32: must be"),
    (checks.valid_labels, (torch.tensor([0, 4, 1]), 3, 4), "labels span 0..4: the model has 4 classes, so 0..3"),
    (checks.valid_labels, (torch.tensor([0, -1, 1]), 3, 4), "labels span -1..1: the model has 4 classes"),
    (
        checks.valid_logits,
        (torch.zeros(3, 1), 3),
        "the model returned shape (3, 1) for 3 inputs: must be logits (3, K)",
    ),
    (checks.valid_logits, (torch.zeros(3), 3), "the model returned shape (3,) for 3 inputs"),
    (checks.valid_logits, (torch.zeros(2, 4), 3), "the model returned shape (2, 4) for 3 inputs"),
    (checks.valid_logits, (torch.zeros(3, 4, 1), 3), "the model returned shape (3, 4, 1) for 3 inputs"),
    (checks.valid_logits, (torch.tensor([[0.0, NAN]]), 1), "the model returned NaN or infinite logits: must be finite"),
    (checks.valid_logits, (torch.tensor([[0.0, INF]]), 1), "the model returned NaN or infinite logits: must be finite"),
]
ACCEPTED: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    (checks.norm_name, ("l1",)),
    (checks.at_least, ("steps", 1, 1)),
    (checks.valid_box, ((-1.0, 1.0),)),
    (checks.valid_box, ([0, 255],)),
    (checks.valid_eps, (0, 3)),
    (checks.valid_eps, (8 / 255, 3)),
    (checks.valid_eps, (torch.tensor(0.1), 3)),
    (checks.valid_eps, (torch.tensor([0.0, 0.1, 5.0]), 3)),
    (checks.valid_inputs, (torch.tensor([[0.0, 1.0]]), (0.0, 1.0))),
    (checks.valid_inputs, (torch.zeros(1, 2, 3, 4, 5, dtype=torch.float16), (0.0, 1.0))),
    (checks.valid_labels, (torch.tensor([0, 3, 1]), 3, 4)),
    (checks.valid_logits, (torch.zeros(3, 2), 3)),
]


def case_name(value: Any) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("check", "arguments", "message"), REFUSED, ids=case_name)
def test_refuses_in_one_line(check: Callable[..., None], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError) as refused:
        check(*arguments)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("check", "arguments"), ACCEPTED, ids=case_name)
def test_accepts_without_a_word(check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    check(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("box", [(0.0, 0.1), (-0.3, 0.7), (-2.1179, 2.64)], ids=str)
def test_a_face_of_the_box_is_what_the_dtype_makes_of_it(box: checks.Box, dtype: torch.dtype) -> None:
    """float32 rounds 0.1 up: an input clamped to 0.1 lies in a box that ends at 0.1."""
    checks.valid_inputs(torch.tensor([[-9.0, 9.0]], dtype=dtype).clamp(*box), box)
    with pytest.raises(InputError, match="must lie in the box"):
        checks.valid_inputs(torch.tensor([[box[1] + 0.1]], dtype=dtype), box)


def test_input_errors_are_value_errors() -> None:
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (KeyError("name"), "KeyError: 'name'"),
        (RuntimeError(), "RuntimeError"),
        (OSError("x" * 500), "OSError: " + "x" * 188 + "..."),
    ],
)
def test_an_exception_fits_on_one_line(error: Exception, text: str) -> None:
    assert checks.one_line(error) == text
