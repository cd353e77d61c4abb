"""The symptoms of false confidence: one function each, from a probe to an observation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wideberth import attacks, losses
from wideberth.attacks import PGD, Attack
from wideberth.evaluation.diagnostics.probe import (
    PGD_STEPS,
    RANDOM_OUTPUT,
    NoGradient,
    NotExamined,
    Probe,
    Reach,
    Stages,
    relative_difference,
)
from wideberth.modes import changed, snapshot

Severity: TypeAlias = Literal["doubt", "masked"]

LEAST = 3
"""Samples that a comparison of attacks must rest on: one or two are chance."""
SHARE = 0.1
"""Of the samples: an attack that should never be ahead may be ahead on fewer (sound models: up to 5 %)."""
LOOSE = 0.2
"""The same where chance decides, for further steps and restarts (sound models: up to 13 %)."""
FEW = 0.05
"""Of the samples: where fewer show an oddity (a zero gradient, a miss at a huge radius), it does not count."""
SQUARE = 0.002
"""Of the samples: AutoAttack's limit on how many only its gradient-free attack may find."""


@dataclass(frozen=True)
class Observation:
    """What a check observed.

    Attributes:
        raised: whether it is a reason not to believe the robust accuracy.
        why: one sentence with the figures.
        measured: the figures.
        severity: where it differs from the check's usual one.
    """

    raised: bool
    why: str
    measured: Mapping[str, float] = field(default_factory=dict)
    severity: Severity | None = None


# ---- what the model returns -------------------------------------------------------------------------------------


def unusable_output(probe: Probe) -> Observation:
    """Outputs of one column, of a wrong shape, or not finite: no attack can change their class."""
    outputs = probe.forward(probe.x)
    columns = outputs.shape[1] if outputs.dim() == 2 else 0
    finite = bool(torch.isfinite(outputs).all())
    raised = len(outputs) != len(probe.x) or columns < 2 or not finite
    obstacle = probe.samples.obstacle
    why = obstacle if raised and obstacle else f"The model returns {columns} finite logits per input."
    return Observation(raised, _sentence(why), {"columns": columns, "finite": float(finite)})


def probabilities(probe: Probe) -> Observation:
    """Rows in [0, 1] that sum to one: the model ends in a softmax, which saturates."""
    logits = probe.logits
    slack = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    sums = logits.sum(1)
    raised = bool((logits >= -slack).all() & (logits <= 1 + slack).all() & ((sums - 1).abs() <= slack).all())
    span = f"Outputs lie in [{float(logits.min()):.3g}, {float(logits.max()):.3g}]"
    kind = "sum to 1 in every row: they are probabilities" if raised else "are no probabilities"
    return Observation(raised, f"{span} and {kind}.", {"least": float(logits.min()), "largest": float(logits.max())})


def random_outputs(probe: Probe) -> Observation:
    """The logits of the same inputs differ from one forward pass to the next."""
    variation = probe.output_variation
    now = [losses.predictions(probe.forward(probe.x)) for _ in range(4)]
    flips = float(torch.stack([first != now[0] for first in now[1:]]).any(0).double().mean())
    why = (
        f"In repeated forward passes on the same inputs, logits differ by {variation:.2g} of their size, and the "
        f"predicted class of {flips:.0%} of the inputs changes."
    )
    severity: Severity = _severity_of_randomness(probe) if flips or variation > RANDOM_OUTPUT else "doubt"
    return Observation(variation > 1e-4, why, {"relative_change": variation, "predictions_changed": flips}, severity)


def batch_dependence(probe: Probe) -> Observation:
    """The logits of a sample depend on the other samples of its batch."""
    logits = probe.logits
    if len(logits) < 2:
        raise NotExamined("it takes two samples")
    if probe.output_variation > RANDOM_OUTPUT:
        raise NotExamined("the outputs are random, and differ from one batch to the next in any case")
    half = probe.forward(probe.x[: len(logits) // 2])
    change = relative_difference(half, logits[: len(half)])
    # Another batch size may select another kernel: with TF32 and bfloat16 the third digit may change.
    raised = change > max(5e-3, 4 * torch.finfo(logits.dtype).eps, 2 * probe.output_variation)
    why = f"Without half of their batch, logits change by {change:.2g} of their size."
    return Observation(raised, why, {"relative_change": change})


def changing_state(probe: Probe) -> Observation:
    """Layers that train while they are evaluated: the model that is attacked is not the one that is evaluated."""
    before = snapshot(probe.model)
    probe.forward(probe.x)
    moved = changed(probe.model, before)
    switched = sum(module.training for module in probe.model.modules())
    ignoring = _layers_that_ignore_eval(probe.model)
    signs = [
        (len(moved), "parameters or buffers that a forward pass changes"),
        (switched, "modules that a forward pass puts in train mode"),
        (ignoring, "layers that eval() leaves in train mode (they were evaluated in eval mode all the same)"),
    ]
    found = [f"{what}: {count}" for count, what in signs if count]
    if probe.came_in_train_mode:
        found.append(f"layers that came in train mode and were evaluated in eval mode: {probe.came_in_train_mode}")
    measured = {
        "changed": len(moved),
        "switched": switched,
        "ignoring_eval": ignoring,
        "came_in_train_mode": probe.came_in_train_mode,
    }
    why = "; ".join(found) or "a forward pass leaves the model as it was"
    return Observation(any(count for count, _ in signs), _sentence(why), measured)


def autograd_in_forward(probe: Probe) -> Observation:
    """A forward pass that computes gradients: the defence adapts to its input, and attacks must go through that."""
    with _GradientCalls() as counter:
        probe.forward(probe.x)
        with torch.enable_grad():
            probe.model(probe.x.detach().requires_grad_())
    why = f"Two forward passes called autograd for gradients {counter.calls} times."
    return Observation(counter.calls > 0, why, {"calls": counter.calls})


# ---- gradients --------------------------------------------------------------------------------------------------


def no_gradient(probe: Probe) -> Observation:
    """Gradients of the margin that are missing, zero or NaN, at the samples or at random points near them."""
    try:
        near = probe.random_starts
        found = torch.cat([probe.margin_gradient, probe.gradient(losses.margin_loss, near)]).flatten(1)
    except NoGradient as error:
        return Observation(True, _sentence(str(error)), {"zero": 1.0, "nan": 0.0})
    nan = float(found.isnan().any(1).double().mean())
    zero = float((found == 0).all(1).double().mean())
    why = f"At {zero:.0%} of the points the gradient of the logit margin is zero, at {nan:.0%} it holds NaN."
    return Observation(zero + nan > FEW, why, {"zero": zero, "nan": nan})


def saturated_loss(probe: Probe) -> Observation:
    """The cross-entropy's gradient is zero where the margin's is not: the logits are too large for it."""
    sloped = (probe.margin_gradient != 0).flatten(1).any(1)
    flat = (probe.gradient(losses.cross_entropy) == 0).flatten(1).all(1) & sloped
    blind = float(flat.double().mean())
    none = float((losses.cross_entropy(probe.logits, probe.y) == 0).double().mean())
    margin = float(losses.logit_margin(probe.logits, probe.y).median())
    why = (
        f"At {blind:.0%} of the samples the cross-entropy has zero gradient while the logit margin has one; "
        f"the loss is exactly 0 at {none:.0%}, and the median margin is {margin:.3g}."
    )
    measured = {"blind": blind, "zero_loss": none, "median_margin": margin}
    return Observation(blind > FEW, why, measured, _severity_of_large_logits(probe))


def weak_cross_entropy(probe: Probe) -> Observation:
    """PGD on the cross-entropy gets less far than PGD on the logit margin."""
    names = "PGD on the logit margin", "PGD on the cross-entropy"
    # Not by count: near the radius where many samples become adversarial, sound models differ by a quarter of them.
    found = _compared(probe.pgd_on_margin, probe.pgd_on_cross_entropy, names, share=math.inf, slack=0.1)
    return Observation(found.raised, found.why, found.measured, _severity_of_large_logits(probe))


# ---- attacks ----------------------------------------------------------------------------------------------------


def one_step_ahead(probe: Probe) -> Observation:
    """A single step gets further than many: the many follow gradients that mislead."""
    return _compared(probe.fgsm, probe.pgd_on_margin, ("one step of FGSM", f"PGD with {PGD_STEPS} steps"))


def not_converged(probe: Probe) -> Observation:
    """Twice as many steps get further, so that still more may."""
    half = probe.pgd(losses.margin_loss, PGD_STEPS // 2)
    names = f"PGD with {PGD_STEPS} steps", f"PGD with {PGD_STEPS // 2}"
    return _compared(probe.pgd_on_margin, half, names, share=LOOSE)


def restarts_find_more(probe: Probe) -> Observation:
    """A second random start succeeds on other samples than the first, so that a third may."""
    names = "PGD from another random start", "the first run"
    return _compared(probe.pgd_restarted, probe.pgd_on_margin, names, share=LOOSE)


def random_points_ahead(probe: Probe) -> Observation:
    """Random points of the ball get further than gradients do."""
    names = "the best of 20 random points", "PGD by the model's gradients"
    return _compared(probe.random_points, probe.pgd_by_own_gradients, names)


def surrogate_gradients_ahead(probe: Probe) -> Observation:
    """PGD gets further by gradients that pass over kinks, steps and ripples than by the model's own."""
    better = probe.pgd_with_surrogate_gradients | probe.pgd_with_averaged_gradients
    names = "PGD by surrogate or averaged gradients", "PGD by the model's own gradients"
    return _compared(better, probe.pgd_by_own_gradients, names)


def robust_at_huge_radii(probe: Probe) -> Observation:
    """Robust accuracy does not fall to zero as the radius grows to where every input can be made grey."""
    (low, high), norm = probe.threat.box, probe.threat.norm
    far = (high - low) / 2
    # An l1 ball holds the linf ball too, but PGD's l1 steps, one entry each, would take far too long through it.
    norm = "linf" if norm == "l1" else norm
    if norm == "l2":
        far *= math.sqrt(probe.x[0].numel())
    attack = PGD(norm=norm, box=probe.threat.box, steps=PGD_STEPS, start="none", loss=losses.margin_loss, keep="worst")
    left = torch.ones_like(probe.y, dtype=torch.bool)
    measured: dict[str, float] = {}
    for radius in _growing_radii(probe.threat.eps if norm == probe.threat.norm else 0.0, far):
        left = left & ~probe.attack(attack, eps=radius).adversarial
        mean = float(radius.mean()) if isinstance(radius, Tensor) else radius
        measured[f"robust at {mean:.3g}"] = float(left.double().mean())
        if not bool(left.any()):
            break
    grey = probe.reach_of(torch.full_like(probe.x, (low + high) / 2)).adversarial
    missed = float((left & grey).double().mean())
    robust = float(left.double().mean())
    why = f"With {norm} radii up to {mean:.3g}, PGD finds no adversarial point for {robust:.0%} of the samples"
    why += f", though the grey input is one for {missed:.0%} of all." if robust else "."
    severity: Severity = "masked" if missed > FEW else "doubt"
    measured |= {"robust": robust, "missed": missed}
    return Observation(missed > FEW or robust > SHARE, why, measured, severity)


def _growing_radii(eps: float | Tensor, far: float) -> list[float | Tensor]:
    """Three radii in geometric progression up to `far`, from `eps` where that is small enough, else from `far` / 8."""
    if isinstance(eps, Tensor):
        eps = eps.double()
        begin: float | Tensor = torch.where((eps > 0) & (eps < far / 2), eps, far / 8)
    else:
        begin = eps if 0 < eps < far / 2 else far / 8
    return [begin * (far / begin) ** power for power in (1 / 3, 2 / 3, 1.0)]


# ---- the record -------------------------------------------------------------------------------------------------


def gradient_free_ahead(probe: Probe) -> Observation:
    """An attack without gradients succeeds where attacks with gradients have failed."""
    if probe.recorded.samples is None or probe.recorded.stages is None:
        raise NotExamined("there is no record of a suite")
    suite = _suite(probe.recorded.stages)
    first = next((place for place, (_, gradient, _) in enumerate(suite) if gradient), len(suite))
    names = [name for name, gradient, _ in suite[first:] if not gradient]
    if not names:
        raise NotExamined("no gradient-free attack followed one with gradients")
    table = probe.recorded.samples
    won = table["clean_correct"] & ~table["robust"] & table["attack"].isin(names)
    count, share = int(won.sum()), float(won.mean())
    why = (
        f"{' and '.join(names)} succeeded on {count} of {len(table)} samples ({share:.2%}) where gradients had failed."
    )
    severity: Severity = "masked" if share > FEW else "doubt"
    return Observation(share > SQUARE and count >= LEAST, why, {"share": share, "count": count}, severity)


def record_refuted(probe: Probe) -> Observation:
    """The attacks of these checks succeed on samples that the record calls robust."""
    table, index = probe.recorded.samples, probe.samples.index
    if table is None or len(table) <= int(index.max()):
        raise NotExamined("there is no record of these samples")
    robust = torch.from_numpy(table["robust"].to_numpy(dtype=bool)[index.numpy()])
    refuted = int((robust & probe.all_attacks.adversarial.cpu()).sum())
    share = refuted / max(1, int(robust.sum()))
    why = f"Of {int(robust.sum())} samples that the record calls robust, these checks find {refuted} adversarial."
    severity: Severity = "masked" if share > SHARE else "doubt"
    measured = {"robust": int(robust.sum()), "refuted": refuted}
    return Observation(refuted >= LEAST and share > FEW, why, measured, severity)


# ---- help -------------------------------------------------------------------------------------------------------


def _compared(
    better: Reach, other: Reach, names: tuple[str, str], share: float = SHARE, slack: float = 0.05
) -> Observation:
    """Whether an attack gets further than another that should be as strong, in samples or in margin reduction."""
    new, rows = int((better.adversarial & ~other.adversarial).sum()), len(other.adversarial)
    far, near = (float(found.margin_reduction.double().mean()) for found in (better, other))
    raised = new >= max(LEAST, share * rows) or far > 1.25 * near + slack
    why = (
        f"{names[0]} succeeds on {new} of {rows} samples where {names[1]} fails, and removes {far:.0%} of the margin "
        f"on average instead of {near:.0%}."
    )
    measured = {"newly_adversarial": new, "margin_reduction": far, "margin_reduction_of_the_other": near}
    return Observation(raised, _sentence(why), measured)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _layers_that_ignore_eval(model: nn.Module) -> int:
    """How many layers stay in train mode when `eval()` is called on the model."""
    inherited = (nn.Module.train, nn.Module.eval)
    if all(
        (type(m).train, type(m).eval) == inherited and not {"train", "eval"} & vars(m).keys() for m in model.modules()
    ):
        return 0
    # On a copy: what an overridden method does beyond flags could not be undone.
    return sum(
        module.training for module in copy.deepcopy(model).train().eval().modules() if not list(module.children())
    )


class _GradientCalls(TorchFunctionMode):
    """Counts calls of autograd for gradients, without patching torch."""

    calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))


def _suite(stages: Stages | None) -> list[tuple[str, bool, Mapping[str, Any]]]:
    """Name, whether it needs gradients, and known settings of each attack, in order."""
    if stages is None:
        return []
    if isinstance(stages, Mapping):
        return [(name, bool(gradient), {}) for name, gradient in stages.items()]
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(Attack)}
    # A record may also name an attack by its public import path.
    kinds |= {f"{attacks.__name__}.{name}": kind for name, kind in vars(attacks).items() if kind in kinds.values()}
    found = []
    for stage in stages:
        settings = stage.get("settings") or {}
        kind = kinds.get(settings.get("class_path", ""))
        found.append((stage["name"], kind is None or kind.needs_gradient, settings.get("init_args", {})))
    return found


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)


def _severity_of_large_logits(probe: Probe) -> Severity:
    """Large logits mislead a suite that relies on probabilities; where some loss has no scale, they are a doubt."""
    scale_free = (losses.margin_loss, losses.unsaturated_margin_loss, losses.dlr_loss)
    names = {f"{loss.__module__}.{loss.__qualname__}" for loss in scale_free}
    return "doubt" if any(own.get("loss") in names for _, _, own in _suite(probe.recorded.stages)) else "masked"


def _severity_of_randomness(probe: Probe) -> Severity:
    """Random outputs mislead attacks that follow one draw's gradient; where some attack averages, they are a doubt."""
    return "doubt" if any(own.get("draws", 1) > 1 for _, _, own in _suite(probe.recorded.stages)) else "masked"
