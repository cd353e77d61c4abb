"""The grade of a verdict: 0 needs no trust, and a model that has learned nothing earns none."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

import wideberth as wb
from wideberth.attacks import PGD, Attack
from wideberth.evaluation import Finding, evaluate
from wideberth.evaluation.grading import grade_verdict

FINE = Finding("a", False, "doubt", "", "", {"x": 1.0})
MASKED = Finding("m", True, "masked", "", "", {"x": 1.0})


def table(labels: list[int], right: int, robust: int) -> pd.DataFrame:
    n = len(labels)
    columns = {
        "label": labels,
        "clean_correct": [i < right for i in range(n)],
        "robust": [i < robust for i in range(n)],
    }
    return pd.DataFrame(columns)


@pytest.mark.parametrize(
    ("labels", "right", "robust", "findings", "expected"),
    [
        pytest.param([0, 1] * 50, 90, 0, [MASKED, FINE], "trusted", id="0 needs no trust"),
        pytest.param([0, 1] * 50, 90, 1, [MASKED, FINE], "masked", id="1 of 100 does"),
        pytest.param([0, 1] * 50, 90, 70, [FINE], "trusted", id="sound"),
        pytest.param([0, 1] * 50, 55, 50, [FINE], "doubtful", id="55 of 100 is chance"),
        pytest.param([0, 1, 2] * 40, 38, 38, [FINE], "doubtful", id="31.7 % on three classes"),
        pytest.param([0, 1] * 50, 0, 0, [FINE], "doubtful", id="0 % clean"),
        pytest.param([0, 1] * 50, 0, 0, [MASKED], "doubtful", id="0 % clean, masked"),
        pytest.param([0] * 12, 12, 12, [FINE], "doubtful", id="one class only"),
        pytest.param([0] * 90 + [1] * 10, 90, 90, [FINE], "doubtful", id="the majority"),
        pytest.param([0, 1] * 50, 55, 50, [MASKED, FINE], "masked", id="masked stays masked"),
    ],
)
def test_the_grade(labels: list[int], right: int, robust: int, findings: list[Finding], expected: str) -> None:
    word, reason = grade_verdict(findings, table(labels, right, robust))
    assert word == expected
    assert ("not distinguishable from" in reason) == (expected == "doubtful")


def test_an_evaluation_that_leaves_nothing_is_trusted_whatever_the_checks_say() -> None:
    """A steep sigmoid hides the gradients of the cross-entropy; the margin's attack finds every sample all the same."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y, _ = wb.data.Digits().train().tensors()
    with torch.no_grad():
        means = torch.stack([x[y == k].mean(0).flatten() for k in range(10)])
        model[1].weight.copy_(means * 1e4)
        model[1].bias.copy_(-means.square().sum(1) / 2 * 1e4)
    suite: dict[str, Attack] = {"PGD": PGD(steps=20, keep="worst", loss=wb.losses.margin_loss)}
    found = evaluate(model, wb.data.Digits(test_rows=60), eps=0.3, suite=suite, margin=False)
    assert found.robust_accuracy == 0 < found.clean_accuracy
    assert any(finding["raised"] for finding in found.protocol["findings"])
    assert found.protocol["grade"]["verdict"] == "trusted"


def test_random_weights_are_not_trusted() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = wb.models.MLP((1, 8, 8), 10, (16,))
    found = evaluate(model, wb.data.Digits(test_rows=60), eps=0.001, suite="pgd", margin=False)
    assert found.protocol["grade"]["verdict"] != "trusted"
