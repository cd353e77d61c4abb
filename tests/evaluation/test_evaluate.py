"""Evaluation against models of known robustness, attacks that lie, and every form of data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from scipy.stats import beta
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from wideberth import geometry, losses
from wideberth.attacks import FGSM, PGD, Attack, AttackInputs, AttackState, Spatial
from wideberth.checks import InputError, Norm
from wideberth.data import InMemory, Split, Tensors
from wideberth.evaluation import Evaluation, evaluate, verify

DUAL: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": float("inf")}
EPS: dict[Norm, float] = {"linf": 0.1, "l2": 0.2, "l1": 0.3}
FAST: dict[str, Attack] = {
    "FGSM": FGSM(step_size=0.05),
    "PGD": PGD(steps=3, step_size=0.03, restarts=2, keep="worst", loss=losses.margin_loss),
}
"""Steps too short to reach the face of the ball from everywhere, so that the random start matters."""

each_norm = pytest.mark.parametrize("norm", list(DUAL))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def network() -> nn.Sequential:
    """Four classes from six inputs, balanced in the unit box, with dropout and batch norm in train mode."""
    weight = drawn(16, 6)
    body = linear(weight, -weight.sum(1) / 2), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(16, dtype=torch.float64)
    return nn.Sequential(*body, linear(drawn(4, 16, seed=1), torch.zeros(4))).train()


@pytest.fixture
def model() -> nn.Sequential:
    return network()


@pytest.fixture
def samples(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Fifty inputs, exact in float32, with labels of which every tenth is wrong."""
    x = torch.rand(50, 6, generator=torch.Generator().manual_seed(3)).double()
    y = model.eval()(x).argmax(1)
    model.train()
    y[::10] = (y[::10] + 1) % 4
    return x, y


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("index", ignore_index=True).drop(columns="position")


@each_norm
def test_linear_model_has_its_exact_robust_accuracy(norm: Norm) -> None:
    """Labels and distances are known; no sample lies within 1 % of the radius, where an attack may stop short."""
    weight, bias = drawn(2, 6), torch.tensor([0.1, 0.0], dtype=torch.float64)
    bias[1] -= (weight[1] - weight[0]).sum() / 2
    x = 0.5 + 0.08 * drawn(200, 6, seed=1).clamp(-2, 2)
    plain = linear(weight, bias)
    y = (plain(x).argmax(1) + (torch.arange(200) % 9 == 0)) % 2
    distance = losses.logit_margin(plain(x), y).detach() / (weight[0] - weight[1]).norm(p=DUAL[norm])
    eps = float(distance[distance > 0].median())
    clear = (distance / eps - 1).abs() > 0.01
    x, y, distance = x[clear], y[clear], distance[clear]
    attack = PGD(norm=norm, steps=20, start="none", keep="first_flip")
    found = evaluate(plain, (x, y), norm=norm, eps=eps, suite={"PGD": attack})
    assert found.samples["robust"].tolist() == (distance > eps).tolist()
    assert found.samples["clean_correct"].tolist() == (distance > 0).tolist()
    assert found.robust_accuracy == (distance > eps).double().mean().item()
    assert found.clean_accuracy == (distance > 0).double().mean().item()
    assert 0.1 < found.robust_accuracy < found.clean_accuracy < 1
    assert found.samples["effective_margin"].tolist() == pytest.approx(distance.tolist())
    broken = found.samples[found.samples["attack"] == "PGD"]
    assert (broken["distance"] >= broken["effective_margin"] * (1 - 1e-6)).all()


def test_named_suite_breaks_what_can_be_broken(model: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    found = evaluate(model, samples, eps=0.1)
    assert found.protocol["suite"] == "fast"
    assert [stage["name"] for stage in found.protocol["attacks"]] == ["PMA", "PMA diverse", "APGD margin", "Square"]
    assert 0 < found.robust_accuracy < found.clean_accuracy == 0.9


@each_norm
def test_table_tells_one_story(norm: Norm, model: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    eps = EPS[norm]
    suite = {name: replace(attack, norm=norm) for name, attack in FAST.items()}
    found = evaluate(model, samples, norm=norm, eps=eps, suite=suite, batch_size=16)
    table, y = found.samples, samples[1].numpy()
    assert table["index"].tolist() == list(range(50))
    assert table["label"].tolist() == y.tolist()
    assert (table["clean_correct"] == (table["clean_prediction"] == y)).all()
    assert (table["clean_correct"] == (table["logit_margin"] > 0)).all()
    assert (table["clean_correct"] == (table["effective_margin"] > 0)).all()
    assert (table["effective_weight_norm"] > 0).all()
    robust, wrong = table["robust"], ~table["clean_correct"]
    broken = ~robust & ~wrong
    assert not (robust & wrong).any()
    assert robust.any()
    assert broken.any()
    assert wrong.sum() == 5
    assert set(table["attack"][broken]) <= set(FAST)
    assert (table["attack"][wrong] == "clean").all()
    assert (table["attack"][robust] == "").all()
    assert (table["distance"][wrong] == 0).all()
    assert table["distance"][robust].isna().all()
    assert table["distance"][broken].between(0, eps * (1 + 1e-6), inclusive="right").all()
    assert (table["adversarial_prediction"][broken] != table["label"][broken]).all()
    assert (table["adversarial_prediction"][~broken] == table["clean_prediction"][~broken]).all()
    assert (table["evaluations"][wrong] == 1).all()
    assert (table["evaluations"][table["attack"] == "FGSM"] == 1 + 3).all()
    assert (table["evaluations"][robust] == 1 + 3 + 2 * 7).all()
    left = [stage["robust_accuracy"] for stage in found.protocol["attacks"]]
    assert left[0] == pytest.approx(1 - (wrong | (table["attack"] == "FGSM")).mean())
    assert left[-1] == pytest.approx(found.robust_accuracy)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_the_verdict(
    batch_size: int, model: nn.Sequential, samples: tuple[Tensor, Tensor]
) -> None:
    found, whole = (evaluate(model, samples, eps=0.1, suite=FAST, batch_size=n) for n in (batch_size, 50))
    assert_frame_equal(found.samples, whole.samples, rtol=1e-9)


class Indexed(Dataset[Any]):
    """(x, y, index), in another order."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.order = x, y, torch.arange(len(y)).flip(0)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        row = int(self.order[position])
        return self.x[row], int(self.y[row]), row


def test_every_form_of_data_gives_the_same(model: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    model, x, y = model.float(), samples[0].float(), samples[1]
    forms = {
        "tuple": (x, y),
        "Data": Tensors(x[:4], y[:4], x, y, classes=4),
        "Split": Split(InMemory(x, y, classes=4)),
        "Split in another order": Split(InMemory(x, y, classes=4), torch.arange(50).flip(0)),
        "Dataset": TensorDataset(x, y),
        "Dataset with index": Indexed(x, y),
    }
    tables = {
        name: comparable(evaluate(model, cast(Any, form), eps=0.1, suite=FAST, batch_size=20).samples)
        for name, form in forms.items()
    }
    for name, table in tables.items():
        assert_frame_equal(table, tables["tuple"], rtol=1e-4, obj=name)


def test_box_is_that_of_the_data(samples: tuple[Tensor, Tensor]) -> None:
    """In the box [-1, 1] the attack may go below zero, which here is the only way to the boundary."""
    model = linear(torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, -0.05]))
    x, y = torch.full((3, 1), 0.02), torch.zeros(3, dtype=torch.int64)
    data = Tensors(x, y, x, y, classes=2, box=(-1.0, 1.0))
    found = evaluate(model, data, eps=0.1)
    assert found.robust_accuracy == 0
    assert found.protocol["box"] == [-1.0, 1.0]
    assert evaluate(model, (x, y), eps=0.1).robust_accuracy == 1


def test_rows_limit_and_margin_switch(model: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    found = evaluate(model, samples, eps=0.1, suite=FAST, rows=12, batch_size=5, margin=False)
    whole = evaluate(model, samples, eps=0.1, suite=FAST)
    assert len(found.samples) == 12
    assert len(evaluate(model, samples, eps=0.1, suite=FAST, rows=1000).samples) == 50
    expected = whole.samples.loc[found.samples["index"]].drop(columns=["effective_margin", "effective_weight_norm"])
    assert_frame_equal(found.samples, expected.reset_index(drop=True))


@each_norm
def test_radius_zero_gives_clean_accuracy(norm: Norm, model: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    found = evaluate(model, samples, norm=norm, eps=0, suite={"PGD": PGD(norm=norm, steps=2)})
    assert found.robust_accuracy == found.clean_accuracy == 0.9


def test_seed_is_all_that_randomness_depends_on(model: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    tables = [evaluate(model, samples, eps=0.1, suite=FAST, seed=seed).samples for seed in (0, 0, 1)]
    assert_frame_equal(tables[0], tables[1])
    assert not tables[0]["distance"].equals(tables[2]["distance"])


def test_model_is_given_back_as_it_was(model: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    model[3].eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    evaluate(model, samples, eps=0.1, suite=FAST)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
def test_constant_model_is_as_robust_as_it_is_right() -> None:
    """On ties nobody is right, whatever argmax says; away from them the margin is infinite, and the record is JSON."""
    x, y = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3
    tie = linear(torch.zeros(3, 3).double(), torch.zeros(3))
    assert evaluate(tie, (x, y), eps=0.1, suite=FAST).clean_accuracy == 0
    sure = linear(torch.zeros(3, 3).double(), torch.tensor([1.0, 0.0, 0.0]))
    found = evaluate(sure, (x, y), eps=0.1, suite=FAST)
    assert found.robust_accuracy == found.clean_accuracy == pytest.approx(1 / 3)
    assert found.samples["effective_margin"].abs().min() == float("inf")
    json.dumps(found.summary(), allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class Liar(Attack[AttackState]):
    """Claims success for every sample, with a point that is not allowed or not misclassified."""

    lie: str = ""

    @property
    def num_steps(self) -> int:
        return 1

    def init(self, inputs: AttackInputs) -> AttackState:
        return AttackState.initial(inputs, inputs.x)

    def update(self, model: nn.Module, inputs: AttackInputs, state: AttackState) -> AttackState:
        x, eps = inputs.x, geometry.column(inputs.eps, inputs.x)
        told = {
            "outside the ball": x + 3 * eps,
            "just outside the ball": x + eps * (1 + 1e-4),
            "outside the box": torch.full_like(x, 1.05),
            "correctly classified": x - eps / 100,
            "not a number": torch.full_like(x, torch.nan),
            "the truth": x + eps,
            "the truth, denied": x + eps,
        }[self.lie]
        success = torch.full_like(inputs.y, self.lie != "the truth, denied", dtype=torch.bool)
        return replace(state, best=told, adversarial=success, iteration=state.iteration + 1)


@pytest.mark.parametrize(
    ("lie", "start", "believed"),
    [
        ("outside the ball", 0.5, False),
        ("just outside the ball", 0.59995, False),
        ("outside the box", 0.96, False),
        ("correctly classified", 0.55, False),
        ("not a number", 0.55, False),
        ("the truth", 0.65, True),
        ("the truth, denied", 0.65, True),
    ],
)
def test_no_attack_is_taken_at_its_word(lie: str, start: float, believed: bool) -> None:
    """Above 0.7 (or 1.02, for the box) the model is wrong; every lie but two would be on the far side."""
    boundary = 1.02 if lie == "outside the box" else 0.7
    model = linear(torch.tensor([[0.0], [1.0]]).double(), torch.tensor([boundary, 0.0]))
    x, y = torch.full((4, 1), start, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    found = evaluate(model, (x, y), eps=0.1, suite={"liar": Liar(lie=lie)})
    assert found.clean_accuracy == 1
    assert found.robust_accuracy == (0 if believed else 1)
    assert set(found.samples["attack"]) == ({"liar"} if believed else {""})


@pytest.mark.parametrize(
    ("move", "norm", "holds"),
    [
        ([0.3, 0.0], "linf", True),
        ([0.3 * (1 + 5e-7), 0.0], "linf", True),
        ([0.3 * (1 + 5e-6), 0.0], "linf", False),
        ([0.3, 0.1], "linf", True),
        ([0.3, 0.1], "l2", False),
        ([0.3, 0.1], "l1", False),
        ([0.2, 0.1], "l1", True),
        ([0.0, 0.3], "l2", False),
        ([0.1, 0.0], "l2", False),
    ],
)
def test_verify_measures_in_the_norm_and_asks_the_model(move: list[float], norm: Norm, holds: bool) -> None:
    """Class 1 from x0 > 0.65 on; radius 0.3 around (0.5, 0.5), and none for the second row."""
    model = linear(torch.tensor([[0.0, 0.0], [1.0, 0.0]]).double(), torch.tensor([0.65, 0.0]))
    x = torch.full((2, 2), 0.5, dtype=torch.float64)
    eps = torch.tensor([0.3, 0.0], dtype=torch.float64)
    moved = x + torch.tensor(move, dtype=torch.float64)
    assert verify(model, x, torch.tensor([0, 0]), moved, eps, norm).tolist() == [holds, False]


def test_verify_sees_the_box(model: nn.Sequential) -> None:
    wrong = linear(torch.zeros(2, 2).double(), torch.tensor([0.0, 1.0]))
    x = torch.tensor([[0.0, 0.5], [0.9, 0.5]], dtype=torch.float64)
    moved = x + torch.tensor([[-0.1, 0.0], [0.1, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    assert verify(wrong, x, y, moved, 0.2, "linf").tolist() == [False, True]
    assert verify(wrong, x, y, moved, 0.2, "linf", (-1.0, 0.95)).tolist() == [True, False]


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("hits", "n"), [(0, 20), (1, 20), (13, 20), (20, 20), (512, 1000)])
def test_interval_is_that_of_clopper_and_pearson(hits: int, n: int, confidence: float) -> None:
    robust = [i < hits for i in range(n)]
    record = Evaluation(pd.DataFrame({"robust": robust, "clean_correct": [True] * n}), {})
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else beta.ppf(tail, hits, n - hits + 1)
    high = 1.0 if hits == n else beta.ppf(1 - tail, hits + 1, n - hits)
    assert record.interval("robust", confidence) == pytest.approx((low, high), abs=1e-9)
    assert record.interval("clean", confidence) == pytest.approx((beta.ppf(tail, n, 1), 1.0), abs=1e-9)


def test_interval_of_something_else_is_refused() -> None:
    word: Any = "adversarial"
    with pytest.raises(InputError, match="which='adversarial': accepted are robust, clean"):
        Evaluation(pd.DataFrame({"robust": [True], "clean_correct": [True]}), {}).interval(word)


def test_protocol_says_how_the_verdict_was_found(model: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    told = evaluate(model, samples, eps=0.1, suite=FAST, seed=5).summary()
    assert {key: told[key] for key in ("norm", "eps", "box", "suite", "seed", "n")} == {
        "norm": "linf",
        "eps": 0.1,
        "box": [0.0, 1.0],
        "suite": "custom",
        "seed": 5,
        "n": 50,
    }
    settings = told["attacks"][1]["settings"]
    assert settings["class_path"].endswith("PGD")
    assert settings["init_args"]["steps"] == 3
    assert settings["init_args"]["loss"] == "wideberth.losses.margin_loss"
    assert told["versions"]["torch"] == torch.__version__
    json.dumps(told, allow_nan=False)


def given(**change: Any) -> Mapping[str, Any]:
    x = torch.full((4, 2), 0.5)
    model = linear(torch.eye(2), torch.zeros(2))
    return {"model": model, "data": (x, torch.tensor([0, 1, 0, 1])), "suite": FAST} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l0"}, "norm='l0': accepted are linf, l2, l1"),
        ({"eps": -0.1}, "eps=-0.1: must be"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": float("inf")}, "eps=inf: must be"),
        (
            {"eps": torch.tensor([0.1, 0.2])},
            "eps of shape (2,): must be a number or one radius per sample, shape (4,)",
        ),
        ({"eps": [0.1, 0.2, -0.1, 0.1]}, "eps holds a negative or non-finite radius"),
        ({"eps": pd.Series([0.1, float("nan"), 0.1, 0.1])}, "eps holds a negative or non-finite radius"),
        ({"eps": ["a", "b", "c", "d"]}, "eps: a list that holds no numbers"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"rows": 0}, "rows=0: must be at least 1"),
        ({"rows": -3}, "rows=-3: must be at least 1"),
        ({"suite": "all"}, "suite='all': accepted are"),
        ({"suite": {}}, "suite: holds no attack"),
        (
            {"suite": {"FGSM": FGSM(norm="l2")}},
            "suite: FGSM attacks in l2 and box (0.0, 1.0), the evaluation is in linf",
        ),
        ({"suite": {"FGSM": FGSM(box=(-1.0, 1.0))}}, "suite: FGSM attacks in linf and box (-1.0, 1.0)"),
        ({"suite": {"turned": Spatial()}}, "suite: turned: Spatial has no ball of a norm"),
        ({"box": (1.0, 0.0), "suite": "pgd"}, "box=(1.0, 0.0): must be (low, high)"),
        ({"model": linear(torch.ones(1, 2), torch.zeros(1))}, "the model returned shape (4, 1) for 4 inputs"),
        ({"model": linear(torch.eye(2) * torch.nan, torch.zeros(2))}, "the model returned NaN or infinite logits"),
        ({"data": (torch.full((2, 2), 0.5), torch.tensor([0, 2]))}, "labels span 0..2: the model has 2 classes"),
        ({"data": (torch.full((2, 2), 0.5), torch.tensor([-1, 0]))}, "labels span -1..0"),
        ({"data": (torch.full((2, 2), 0.5), torch.tensor([0, 1, 0]))}, "data: tensors of lengths [2, 3]"),
        ({"data": (torch.full((2, 2), 255.0), torch.tensor([0, 1]))}, "x spans [255, 255]: must lie in the box"),
        ({"data": (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))}, "data: holds no samples"),
    ],
)
def test_refuses_what_cannot_be_evaluated(change: dict[str, Any], message: str) -> None:
    arguments = dict(given(**change))
    with pytest.raises(InputError) as refused:
        evaluate(arguments.pop("model"), arguments.pop("data"), **arguments)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
