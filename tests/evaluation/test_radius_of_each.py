"""One radius per sample: each sample is judged by its own, whatever form the radii come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from test_verdict import EPS, LINE_UP, Shuffled, problem
from torch import Tensor

from wideberth.evaluation import Evaluation, accuracy_curve, evaluate
from wideberth.evaluation.protocol import radius_of_each

FACTORS = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
"""Of EPS: sample i has radius EPS * FACTORS[i % 4]."""


def radii() -> Tensor:
    return EPS * FACTORS[torch.arange(40) % 4]


def verdict(eps: Any, **options: Any) -> Evaluation:
    model, x, y = problem()
    return evaluate(model, (x, y), eps=eps, suite=LINE_UP, **{"margin": False, "examined": False} | options)


def test_each_sample_is_judged_as_if_its_radius_were_that_of_all() -> None:
    found = verdict(radii(), batch_size=8).samples
    for place, factor in enumerate(FACTORS.tolist()):
        alone = verdict(EPS * factor).samples
        rows = alone.index % 4 == place
        assert_frame_equal(found[rows], alone[rows], rtol=1e-9)
    assert found["eps"].tolist() == radii().tolist()


def test_a_sample_of_radius_zero_is_adversarial_exactly_if_it_is_misclassified() -> None:
    found = verdict(radii()).samples
    still = found[found["eps"] == 0]
    assert (still["robust"] == still["clean_correct"]).all()
    assert (still["evaluations"] == 1).all()
    assert 0 < still["robust"].sum() < len(still)
    moved = found[found["eps"] > EPS]
    assert moved["robust"].sum() < moved["clean_correct"].sum()


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda eps: eps.float(), id="float32"),
        pytest.param(lambda eps: eps.numpy(), id="array"),
        pytest.param(lambda eps: eps.numpy().astype(np.float32), id="float32 array"),
        pytest.param(lambda eps: eps.tolist(), id="list"),
        pytest.param(lambda eps: tuple(eps.tolist()), id="tuple"),
        pytest.param(lambda eps: pd.Series(eps.numpy(), index=range(100, 140)), id="Series"),
    ],
)
def test_every_form_gives_the_same(form: Any) -> None:
    options = {"suite": {"PGD": LINE_UP["PGD"]}}
    model, x, y = problem()
    found, whole = (
        evaluate(model, (x, y), eps=eps, margin=False, examined=False, **options) for eps in (form(radii()), radii())
    )
    assert_frame_equal(found.samples, whole.samples, rtol=1e-5)


def test_rows_and_radii_stay_together() -> None:
    whole = verdict(radii()).samples
    fewer = verdict(radii(), rows=13).samples
    chosen = whole.loc[fewer["index"]].reset_index(drop=True)
    assert_frame_equal(fewer, chosen, rtol=1e-9)
    eps = torch.full_like(radii(), float("nan"))  # radii of samples that are not evaluated may be unknown
    rows = fewer["index"].tolist()
    eps[rows] = radii()[rows]
    assert_frame_equal(verdict(eps, rows=13).samples, chosen, rtol=1e-9)
    shuffled = Shuffled()
    found = evaluate(
        problem()[0], shuffled, eps=radii()[shuffled.order], suite=LINE_UP, margin=False, examined=False
    ).samples
    found = found.sort_values("index", ignore_index=True).drop(columns="position")
    assert_frame_equal(found, whole.drop(columns="position"), rtol=1e-9)


def test_the_record_says_what_radii_there_were() -> None:
    found = verdict(radii(), examined=True, margin=True)
    told = found.protocol["eps"]
    assert told == {"per_sample": True, "min": 0.0, "mean": pytest.approx(0.875 * EPS), "max": 2 * EPS}
    assert "grade" in found.protocol
    assert verdict(EPS).protocol["eps"] == EPS
    model, x, y = problem()
    assert not found.verify(model, (x, y)).disagreements
    assert found.verify(model, (x, y)).checked > 5


def test_the_curve_is_that_of_the_smallest_radii_whatever_the_radii_asked_for() -> None:
    """A search within radii can only lower the smallest radius known."""
    grid = np.linspace(0, 3 * EPS, 20)
    curve = accuracy_curve(verdict(0.0, radii=True).samples, grid)
    of_each = verdict(radii(), radii=True)
    assert (accuracy_curve(of_each.samples, grid)["accuracy"] <= curve["accuracy"]).all()
    table = of_each.samples
    within = table["radius"] <= table["eps"] * (1 + 1e-6)
    assert (within == ~table["robust"]).all(), "verdict and curve agree at each sample's own radius"
    assert of_each.adversarial is not None
    model, x, y = problem()
    assert not of_each.verify(model, (x, y)).disagreements


def test_only_the_radii_of_evaluated_samples_are_looked_at() -> None:
    chosen = radius_of_each([0.1, -1, 0.3], 3, torch.tensor([2, 0]))
    assert chosen.tolist() == [0.3, 0.1]
    assert chosen.dtype == torch.float64
