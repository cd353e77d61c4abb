"""Checks for false confidence: each is raised by some model, and none by sound models, robust ones included."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wideberth as wb
from wideberth import losses
from wideberth.attacks import PGD, Attack
from wideberth.checks import InputError, Norm
from wideberth.configuration import describe
from wideberth.evaluation import evaluate
from wideberth.evaluation.diagnostics import CHECKS, Finding, SurrogateGradients, examine, grade

PAGE = Path(__file__).resolve().parents[3] / "docs/false-confidence.md"
EPS: dict[Norm, float] = {"linf": 0.125, "l2": 0.7, "l1": 3.0}
"""Radii that the robust net withstands on some samples and not on others; 0.125 is two grey levels of the digits."""
RULE = 1 / 16
"""From one grey level to the next: all clean inputs are multiples of it."""

each_norm = pytest.mark.parametrize("norm", list(EPS))


def trained(model: nn.Module, eps: float, epochs: int) -> nn.Module:
    """The model after some epochs of the digits, attacked where there is a radius."""
    x, y, _ = wb.data.Digits().train().tensors()
    generator = torch.Generator().manual_seed(0)
    optimizer, attack = torch.optim.Adam(model.parameters(), 5e-3), PGD(steps=4)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            point = x[rows]
            if eps:
                point = attack(model, point, y[rows], eps=eps, index=rows, seed=epoch, check_success=False).x
            optimizer.zero_grad()
            F.cross_entropy(model(point), y[rows]).backward()
            optimizer.step()
    return model.eval()


def net(*hidden: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wb.models.MLP((1, 8, 8), 10, hidden)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    return wb.data.Digits().test().tensors()[:2]


@pytest.fixture(scope="session")
def standard() -> nn.Module:
    return trained(net(64), eps=0, epochs=10)


@pytest.fixture(scope="session")
def robust() -> nn.Module:
    return trained(net(128), eps=0.15, epochs=10)


def raised(findings: list[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.raised}


def finding(findings: list[Finding], name: str) -> Finding:
    return next(each for each in findings if each.name == name)


# ---- sound models ---------------------------------------------------------------------------------------------------


def sound(findings: list[Finding]) -> None:
    assert raised(findings) == set(), [each.why for each in findings if each.raised]
    assert grade(findings) == ("trusted", "None of 15 checks found a sign of false confidence.")
    assert [each.name for each in findings if not each.measured] == [
        "gradient-free attack finds more",
        "record refuted",
    ]


@each_norm
@pytest.mark.parametrize("kind", ["standard", "robust", "linear"])
def test_sound_models_raise_no_alarm(
    kind: str, norm: Norm, standard: nn.Module, robust: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    model = trained(net(), 0, 10) if kind == "linear" else {"standard": standard, "robust": robust}[kind]
    sound(examine(model, *digits, eps=EPS[norm], norm=norm))


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.05, 0.2, 0.6])
def test_robust_model_raises_no_alarm_at_any_radius(
    eps: float, robust: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    sound(examine(robust, *digits, eps=eps, norm="linf", seed=1))


def test_the_robust_model_is_robust(standard: nn.Module, robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """The tests above mean something only if there is robustness to be suspected."""
    held = {
        name: evaluate(model, digits, eps=0.125, margin=False)
        for name, model in {"standard": standard, "robust": robust}.items()
    }
    assert held["robust"].robust_accuracy > 0.5
    assert held["robust"].robust_accuracy > held["standard"].robust_accuracy + 0.15


@each_norm
def test_an_honest_record_is_not_refuted(norm: Norm, robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    record = evaluate(robust, digits, norm=norm, eps=EPS[norm], margin=False)
    found = examine(
        robust, *digits, eps=EPS[norm], norm=norm, samples=record.samples, stages=record.protocol["attacks"]
    )
    assert grade(found)[0] == "trusted"
    assert finding(found, "record refuted").measured["robust"] > 0


def test_double_precision_and_other_boxes(robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """The same model on inputs in [-1, 1], with the radius in those units."""
    x, y = digits
    wide = Around(robust, before=lambda x: ((x + 1) / 2).float(), after=Tensor.double)
    sound(examine(wide, 2 * x.double() - 1, y, eps=0.25, norm="linf", box=(-1.0, 1.0)))


# ---- models that raise a check ---------------------------------------------------------------------------------------


class Around(nn.Module):
    """A model with something done to its inputs, and to its logits."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


class BatchNorm(nn.Module):
    """A model behind a batch norm over its inputs; `how` says what keeps that from settling down."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how
        self.norm = nn.BatchNorm1d(64, track_running_stats=how != "no statistics")
        with torch.no_grad():
            self.norm.weight.fill_(0.3)
            self.norm.bias.fill_(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor
        self.eval()

    def train(self, mode: bool = True) -> BatchNorm:
        super().train(mode)
        self.norm.training = mode or self.how == "deaf to eval"
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "switches":
            self.norm.train()
        if self.how == "counts":
            self.calls = self.calls + 1
        logits: Tensor = self.model(self.norm(x.flatten(1)))
        return logits


class Centres(nn.Module):
    """Logits -||h(x) - mu_k||^2 with centres of length 10 at equal angles, trained by that distance (MMC)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(64)
        simplex = F.normalize(torch.eye(10) - 0.1, dim=1)
        self.register_buffer("centres", 10 * simplex)
        self.centres: Tensor
        x, y, _ = wb.data.Digits().train().tensors()
        optimizer, generator = torch.optim.Adam(self.parameters(), 5e-3), torch.Generator().manual_seed(0)
        for _ in range(10):
            for rows in torch.randperm(len(x), generator=generator).split(64):
                optimizer.zero_grad()
                (self.body(x[rows]) - self.centres[y[rows]]).square().sum(1).mean().backward()
                optimizer.step()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return -(self.body(x)[:, None] - self.centres).square().sum(2)


class TwoBasins(nn.Module):
    """Uphill ends in a mistake on one side of the input and short of it on the other: a start has an even chance."""

    def forward(self, x: Tensor) -> Tensor:
        way = (x.flatten(1)[:, 0] - 0.5) / 0.125
        rise = 1.5 * way.relu() + 0.5 * (-way).relu()
        return torch.stack([torch.ones_like(rise), rise], 1)


def purified(model: nn.Module, how: str) -> Callable[[Tensor], Tensor]:
    """A step towards what the model is surer of, before it is asked."""

    def before(x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            energy = model(point).logsumexp(1).sum()
            if how == "grad":
                (point.grad,) = torch.autograd.grad(energy, point)
            elif how == "backward":
                energy.backward()
            else:
                point.grad = torch.func.grad(lambda x: model(x).logsumexp(1).sum())(x.detach())
        assert point.grad is not None
        return x + 0.01 * point.grad.sign()

    return before


def rippled(height: float) -> Callable[[Tensor], Tensor]:
    """Inputs plus waves as long as a grey level: seen only between the levels, where their slopes drown the input's."""
    return lambda x: x + height * RULE / math.tau * torch.sin(math.tau * x / RULE)


@dataclass(frozen=True)
class Case:
    """A model that looks robust for a wrong reason, made from a sound one.

    `trips` are the checks that it must raise; where `only`, it may raise no others.
    """

    make: Callable[[nn.Module], nn.Module]
    trips: set[str]
    grade: str
    only: bool = False


FALSE: dict[str, Case] = {
    "one column": Case(lambda m: Around(m, after=lambda z: z[:, :1]), {"unusable output"}, "masked", only=True),
    "NaN logits": Case(lambda m: Around(m, after=lambda z: z * math.nan), {"unusable output"}, "masked", only=True),
    "softmax": Case(lambda m: Around(m, after=lambda z: z.softmax(1)), {"probabilities"}, "doubtful"),
    "steep softmax": Case(
        lambda m: Around(m, after=lambda z: (20 * z).softmax(1)), {"probabilities", "no gradient"}, "masked"
    ),
    "noise": Case(
        lambda m: Around(m, before=lambda x: x + 0.2 * torch.randn_like(x)), {"random outputs"}, "masked", only=True
    ),
    "noise from numpy": Case(
        lambda m: Around(m, after=lambda z: z * float(1 + np.random.rand())),  # noqa: NPY002 (models do use it)
        {"random outputs"},
        "masked",
        only=True,
    ),
    "dropout in eval": Case(lambda m: Around(m, before=lambda x: F.dropout(x, 0.3)), {"random outputs"}, "masked"),
    "batch statistics": Case(lambda m: BatchNorm(m, "no statistics"), {"batch dependence"}, "masked"),
    "batch norm deaf to eval": Case(lambda m: BatchNorm(m, "deaf to eval"), {"changing state"}, "doubtful"),
    "batch norm in train mode": Case(
        lambda m: BatchNorm(m, "switches"), {"changing state", "batch dependence"}, "masked"
    ),
    "counting": Case(lambda m: BatchNorm(m, "counts"), {"changing state"}, "doubtful", only=True),
    "purified": Case(lambda m: Around(m, before=purified(m, "grad")), {"autograd in forward"}, "doubtful"),
    "purified by backward": Case(
        lambda m: Around(m, before=purified(m, "backward")), {"autograd in forward"}, "doubtful"
    ),
    "purified by func": Case(lambda m: Around(m, before=purified(m, "func")), {"autograd in forward"}, "doubtful"),
    "detached": Case(lambda m: Around(m, before=Tensor.detach), {"no gradient"}, "masked", only=True),
    "NaN gradient": Case(lambda m: Around(m, before=lambda x: x + (0 * x).sqrt()), {"no gradient"}, "masked"),
    "quantised": Case(
        lambda m: Around(m, before=lambda x: (4 * x).round() / 4),
        {"no gradient", "random points beat PGD", "surrogate gradients beat own", "robust at huge radii"},
        "masked",
    ),
    "threshold with a misleading slope": Case(
        lambda m: Around(m, before=lambda x: (x > 0.5).float() + 1e-3 * x.flip(3) * torch.tensor([1.0, -1.0] * 4)),
        {"robust at huge radii"},
        "masked",
    ),
    "logits times 1000": Case(
        lambda m: Around(m, after=lambda z: 1000 * z), {"saturated loss", "weak cross-entropy"}, "masked", only=True
    ),
    "far centres": Case(lambda _: Centres(), {"saturated loss", "weak cross-entropy"}, "masked", only=True),
    "ripples": Case(
        lambda m: Around(m, before=rippled(1.5)), {"FGSM beats PGD", "surrogate gradients beat own"}, "masked"
    ),
    "high ripples": Case(lambda m: Around(m, before=rippled(6)), {"not converged"}, "masked"),
    "two basins": Case(lambda _: TwoBasins(), {"restarts find more"}, "masked"),
}


@pytest.mark.parametrize("name", list(FALSE))
def test_false_confidence_is_found(name: str, robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    case = FALSE[name]
    model, (x, y) = case.make(robust), digits
    if name == "two basins":
        x, y = torch.full((64, 4), 0.51), torch.zeros(64, dtype=torch.int64)
    found = examine(model, x, y, eps=0.125, norm="linf")
    assert [each.name for each in found] == [check.name for check in CHECKS]
    assert case.trips <= raised(found)
    assert raised(found) == case.trips or not case.only
    told, why = grade(found)
    assert told == case.grade
    assert any(each.name in why for each in found if each.raised)


def test_every_check_has_a_model_that_trips_it() -> None:
    """The last two are tripped by records, below."""
    tripped = set.union(*(case.trips for case in FALSE.values()))
    assert {check.name for check in CHECKS} == tripped | {"gradient-free attack finds more", "record refuted"}


# ---- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blind(PGD):
    """An attack that asks for no gradient, as far as its class says."""

    needs_gradient = False


def record(won: int, rows: int = 500, attack: str = "Blind") -> pd.DataFrame:
    """Samples that were broken by gradients, but for the first ones, and the last, which held."""
    table = pd.DataFrame({"clean_correct": True, "robust": False, "attack": "PGD"}, index=range(rows))
    table.loc[: won - 1, "attack"] = attack
    table.loc[rows - 5 :, ["robust", "attack"]] = [True, ""]
    return table


def stages(**attacks: Attack) -> list[dict[str, object]]:
    return [{"name": name, "settings": describe(attack)} for name, attack in attacks.items()]


@pytest.mark.parametrize(
    ("won", "rows", "expected", "severity"),
    [(0, 500, False, "doubt"), (2, 500, False, "doubt"), (3, 500, True, "doubt"), (3, 1500, False, "doubt"),
     (4, 1500, True, "doubt"), (26, 500, True, "masked")],
)  # fmt: skip
@pytest.mark.parametrize("form", ["settings", "mapping"])
def test_gradient_free_attacks_that_find_more_raise_a_check(
    won: int, rows: int, expected: bool, severity: str, form: str, robust: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    """More than 0.2 points, and at least three samples."""
    line_up = stages(PGD=PGD(), Blind=Blind()) if form == "settings" else {"PGD": True, "Blind": False}
    table = record(won, rows)
    found = finding(
        examine(robust, *digits, eps=0.125, norm="linf", samples=table, stages=line_up, rows=2),
        "gradient-free attack finds more",
    )
    assert (found.raised, found.severity) == (expected, severity)
    assert found.measured == {"share": won / rows, "count": won}


def test_attacks_are_known_by_their_public_names(robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    line_up = [{"name": name, "settings": {"class_path": f"wideberth.attacks.{name}"}} for name in ("PGD", "Square")]
    found = examine(robust, *digits, eps=0.125, norm="linf", samples=record(9, attack="Square"), stages=line_up, rows=2)
    assert finding(found, "gradient-free attack finds more").raised


def test_a_gradient_free_attack_that_came_first_proves_nothing(
    robust: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    for line_up in (stages(Blind=Blind(), PGD=PGD()), {"PGD": True}, None):
        found = examine(robust, *digits, eps=0.125, norm="linf", samples=record(100), stages=line_up, rows=2)
        assert not finding(found, "gradient-free attack finds more").raised
        assert finding(found, "gradient-free attack finds more").why.startswith("Not examined")


def test_a_record_that_is_too_good_is_refuted(standard: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """An attack that does nothing leaves everything robust; one that is nearly right leaves little to find."""
    idle = evaluate(standard, digits, eps=0.125, suite={"idle": PGD(steps=1, step_size=0.0, start="none")})
    found = examine(standard, *digits, eps=0.125, norm="linf", samples=idle.samples)
    told = finding(found, "record refuted")
    assert raised(found) == {"record refuted"}
    assert told.severity == "masked"
    assert told.measured["robust"] == 64
    assert 30 < told.measured["refuted"] < 64
    some = idle.samples.assign(robust=idle.samples["robust"] & (torch.arange(500) % 50 == 0).numpy())
    assert not finding(examine(standard, *digits, eps=0.125, norm="linf", samples=some), "record refuted").raised
    short = examine(standard, *digits, eps=0.125, norm="linf", samples=idle.samples[:9])
    assert finding(short, "record refuted").why.startswith("Not examined")


def test_line_up_decides_how_grave_large_logits_and_noise_are(robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    def graded(name: str, *line_up: Attack) -> str:
        told = [{"name": "attack", "settings": describe(attack)} for attack in line_up]
        return grade(examine(FALSE[name].make(robust), *digits, eps=0.125, norm="linf", stages=told))[0]

    assert graded("logits times 1000", PGD(), PGD(loss=losses.probability_margin_loss)) == "masked"
    assert graded("logits times 1000", PGD(), PGD(loss=losses.margin_loss)) == "doubtful"
    assert graded("logits times 1000", PGD(), PGD(loss=losses.unsaturated_margin_loss)) == "doubtful"
    assert graded("noise", PGD()) == "masked"
    assert graded("noise", PGD(draws=20)) == "doubtful"


# ---- manners --------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, object]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        **{name: tensor.detach().clone().tolist() for name, tensor in tensors.items()},
        "flags": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
    }


@pytest.mark.parametrize("how", ["counts", "deaf to eval", "switches", "no statistics"])
def test_model_and_global_state_are_given_back(how: str, standard: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Even by a model that draws from every generator and moves its own buffers whenever it is asked."""
    model = BatchNorm(standard, how)
    noisy = Around(model, after=lambda z: z + torch.randn(()) + random.random() + np.random.rand())  # noqa: NPY002
    model.norm.weight.requires_grad_(False)
    model.norm.bias.grad = torch.ones(64)
    noisy.train()
    model.model.eval()

    def generators() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002

    before = state_of(noisy), generators()
    examine(noisy, *digits, eps=0.1, norm="linf")
    assert (state_of(noisy), generators()) == before
    noisy(digits[0])
    assert generators() != before[1]


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_forward_that_fails_leaves_nothing_switched_on(
    kind: type[RuntimeError], robust: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    """A model that cannot be run with gradients has none; one that does not fit into memory may."""

    def before(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise kind("not\nhere")
        return x

    found = examine(Around(robust, before=before), *digits, eps=0.1, norm="linf")
    assert finding(found, "autograd in forward").why == f"Not examined, because it failed: {kind.__name__}: not here."
    assert raised(found) == ({"no gradient"} if kind is RuntimeError else set())
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("name", ["ripples", "noise", "noise from numpy"])
def test_findings_are_a_function_of_the_seed(name: str, robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    def found(seed: int) -> list[Finding]:
        return examine(FALSE[name].make(robust), *digits, eps=0.125, norm="linf", seed=seed)

    assert found(0) == found(0)
    assert found(0) != found(1)


def test_one_radius_per_sample(robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Equal radii find what one radius finds; at a radius of 0 no attack gets anywhere."""
    x, y = digits
    # Huge radii follow from eps in float64, where 0.7 differs from the float32 nearest to it.
    same = [each for each in CHECKS if each.name != "robust at huge radii"]

    def found(eps: float | Tensor, norm: Norm) -> list[Finding]:
        return [finding(examine(robust, x, y, eps=eps, norm=norm, rows=16), each.name) for each in same]

    for norm in EPS:
        assert found(torch.full((500,), EPS[norm]), norm) == found(EPS[norm], norm)
    chosen = (robust(x).argmax(1) == y).double().cumsum(0)
    mixed = torch.where(chosen % 2 == 1, 0.5, 0.0)
    half = finding(examine(robust, x, y, eps=mixed, norm="linf"), "FGSM beats PGD").measured
    assert 0.3 < half["margin_reduction"] < 0.7
    assert raised(examine(robust, x, y, eps=torch.linspace(0, 0.2, 500), norm="linf")) == set()
    with pytest.raises(InputError, match="one radius per sample"):
        examine(robust, x, y, eps=torch.zeros(3), norm="linf")


class Counting(nn.Module):
    """Counts passes, and remembers the largest batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes = self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.passes += 1
        self.largest = max(self.largest, len(x))
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, _: Tensor) -> None:
        self.passes += 1


def test_an_examination_is_cheap(robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """A few hundred passes over a few rows, however large the data set."""
    model = Counting(robust)
    examine(model, *digits, eps=0.125, norm="linf", rows=16)
    assert model.passes < 500
    assert model.largest == 16


def test_arriving_in_train_mode_is_a_note(digits: tuple[Tensor, Tensor]) -> None:
    model = trained(wb.models.MLP((1, 8, 8), 10, (64,), batch_norm=True), 0, 8).train()
    found = examine(model, *digits, eps=0.05, norm="linf")
    told = finding(found, "changing state")
    assert not told.raised
    assert told.measured["came_in_train_mode"] == 1
    assert told.why == "Layers that came in train mode and were evaluated in eval mode: 1."
    assert grade(found)[0] == "trusted"


def test_nothing_to_attack(robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """No sample is classified correctly, or there is only one."""
    x, y = digits
    found = examine(Around(robust, after=torch.zeros_like), x, y, eps=0.1, norm="linf")
    assert grade(found)[0] == "trusted"
    assert finding(found, "not converged").why == "Not examined: none of the 500 samples is classified correctly."
    right = int((robust(x).argmax(1) == y).nonzero()[0])
    alone = examine(robust, x[right : right + 1], y[right : right + 1], eps=0.1, norm="linf")
    assert raised(alone) == set()
    assert not any("failed" in each.why for each in alone)


def test_findings_fit_into_json(robust: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    for model in (robust, FALSE["one column"].make(robust), FALSE["NaN logits"].make(robust)):
        for found in examine(model, *digits, eps=0.1, norm="l2"):
            assert json.loads(json.dumps(asdict(found), allow_nan=False)) == asdict(found)
            assert found.why.endswith(".")
            assert found.advice.endswith(".")
            assert "\n" not in found.why + found.advice


@pytest.mark.parametrize(
    "wrong",
    [{"eps": -1.0}, {"eps": math.inf}, {"norm": "l3"}, {"box": (1.0, 0.0)}, {"box": (0.0, 0.5)}, {"rows": 0},
     {"y": torch.zeros(3, dtype=torch.int64)}, {"y": torch.full((500,), 10)}],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(
    wrong: dict[str, object], robust: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    given = {"x": digits[0], "y": digits[1], "eps": 0.1, "norm": "linf"} | wrong
    with pytest.raises(InputError):
        examine(robust, **given)  # type: ignore[arg-type]


def test_the_grade_is_the_gravest_finding() -> None:
    fine = Finding("fine", False, "masked", "", "", {"n": 1})
    unmade = Finding("unmade", False, "masked", "", "", {})
    doubt, masked = Finding("d", True, "doubt", "", "", {"n": 1}), Finding("m", True, "masked", "", "", {"n": 1})
    assert grade([fine, unmade]) == ("trusted", "None of 1 checks found a sign of false confidence.")
    assert grade([fine, doubt]) == ("doubtful", "1 of 2 checks were raised, the gravest: d.")
    assert grade([doubt, masked, fine]) == ("masked", "2 of 3 checks were raised, the gravest: m.")
    assert grade([masked], robust_accuracy=0.0)[0] == "trusted"
    assert grade([masked], robust_accuracy=0.1)[0] == "masked"


# ---- surrogate gradients ---------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """All kinds of functions without slopes, in place and not, by function and by method."""

    def forward(self, x: Tensor) -> Tensor:
        wide = 4 * x.flatten(1) - 2
        shared = wide.clone()
        F.relu(shared, inplace=True)  # whoever holds `shared` sees it
        clamped = torch.clamp(wide, 0, 1) + F.hardtanh(wide) + wide.clone().clamp_(min=0)
        return shared + clamped + wide.round() + torch.floor(wide) + wide.clone().ceil_() + torch.sign(wide)


def test_surrogate_gradients_keep_the_outputs_and_have_slopes_everywhere(
    robust: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x = digits[0][:8].clone().requires_grad_()
    for model in (robust, Flat()):
        assert torch.allclose(SurrogateGradients(model)(x), model(x), rtol=0, atol=1e-5)
    (own,) = torch.autograd.grad(Flat()(x).sum(), x)
    (surrogate,) = torch.autograd.grad(SurrogateGradients(Flat())(x).sum(), x)
    below = digits[0][:8] == 0
    assert (own[below] == 0).all()
    assert (surrogate > own).all()


def test_the_page_explains_every_check() -> None:
    headings = [line.removeprefix("### ") for line in PAGE.read_text().splitlines() if line.startswith("### ")]
    assert headings == [check.name for check in CHECKS]
