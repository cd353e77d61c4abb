"""The state of a search."""

from __future__ import annotations

import pytest
import torch

from wideberth.evaluation.search import SearchState


@pytest.mark.parametrize("stages", [2, 3])
def test_columns_hold_one_value_per_sample_whatever_the_number_of_stages(stages: int) -> None:
    columns = SearchState.empty(torch.tensor([0, 1, 2]), stages).columns()
    assert set(columns) == {
        "adversarial",
        "stage",
        "job",
        "step",
        "adversarial_prediction",
        "distance",
        "max_probability_margin",
        "evaluations",
        "next_job",
    }
