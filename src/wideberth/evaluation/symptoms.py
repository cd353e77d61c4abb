"""What false confidence looks like: one function per symptom, each of which looks at a subject and says what it saw."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wideberth import losses
from wideberth.attacks import PGD, Attack
from wideberth.evaluation.subject import (
    STEPS,
    WOBBLE,
    NoGradient,
    NotExamined,
    Reached,
    Stages,
    Subject,
    difference,
)
from wideberth.modes import changed, snapshot

Severity: TypeAlias = Literal["doubt", "masked"]

LEAST = 3
"""Rows that a comparison of attacks must hang on: one or two are chance."""
SHARE = 0.1
"""Of the rows: so many may an attack break that another, never weaker by rights, leaves (sound models: up to 5 %)."""
LOOSE = 0.2
"""The same for what chance sets apart, further steps and restarts (sound models: up to 13 %)."""
FEW = 0.05
"""Of the rows: an oddity (a dead gradient, a miss at a huge radius) of fewer does not shift the verdict."""
SQUARE = 0.002
"""Of the samples: AutoAttack's limit on what its gradient-free attack may win."""


@dataclass(frozen=True)
class Seen:
    """What a check saw.

    Attributes:
        raised: whether it is a reason to worry.
        why: one sentence with the figures.
        measured: the figures.
        severity: where it differs from the check's usual one.
    """

    raised: bool
    why: str
    measured: Mapping[str, float] = field(default_factory=dict)
    severity: Severity | None = None


# ---- what the model returns -------------------------------------------------------------------------------------


def unusable_output(subject: Subject) -> Seen:
    """Outputs that no attack can flip, or nothing can be said of: one column, wrong shape, NaN."""
    outputs = subject.forward(subject.x)
    columns = outputs.shape[1] if outputs.dim() == 2 else 0
    finite = bool(torch.isfinite(outputs).all())
    raised = len(outputs) != len(subject.x) or columns < 2 or not finite
    why = subject.obstacle if raised and subject.obstacle else f"The model returns {columns} finite logits per input."
    return Seen(raised, _sentence(why), {"columns": columns, "finite": float(finite)})


def probabilities(subject: Subject) -> Seen:
    """Rows in [0, 1] that sum to one: softmax stands inside the model, and saturates there."""
    logits = subject.logits
    slack = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    sums = logits.sum(1)
    raised = bool((logits >= -slack).all() & (logits <= 1 + slack).all() & ((sums - 1).abs() <= slack).all())
    told = f"Outputs lie in [{float(logits.min()):.3g}, {float(logits.max()):.3g}]"
    tail = "sum to 1 in every row: they are probabilities" if raised else "are no probabilities"
    return Seen(raised, f"{told} and {tail}.", {"least": float(logits.min()), "largest": float(logits.max())})


def random_outputs(subject: Subject) -> Seen:
    """The same inputs get other logits when they are asked about again."""
    wobble = subject.wobble
    now = [losses.predictions(subject.forward(subject.x)) for _ in range(4)]
    flips = float(torch.stack([first != now[0] for first in now[1:]]).any(0).double().mean())
    why = f"Asked again about the same inputs, logits differ by {wobble:.2g} of their size, {flips:.0%} in the class."
    severity: Severity = _gravity_of_chance(subject) if flips or wobble > WOBBLE else "doubt"
    return Seen(wobble > 1e-4, why, {"relative_change": wobble, "predictions_changed": flips}, severity)


def batch_dependence(subject: Subject) -> Seen:
    """The logits of a sample depend on which others share its batch."""
    logits = subject.logits
    if len(logits) < 2:
        raise NotExamined("it takes two samples")
    if subject.wobble > WOBBLE:
        raise NotExamined("the outputs are random, and differ from one batch to the next in any case")
    half = subject.forward(subject.x[: len(logits) // 2])
    change = difference(half, logits[: len(half)])
    # Other batch sizes take other kernels: TF32 and bfloat16 may move the third digit.
    raised = change > max(5e-3, 4 * torch.finfo(logits.dtype).eps, 2 * subject.wobble)
    why = f"Without half of their batch, logits change by {change:.2g} of their size."
    return Seen(raised, why, {"relative_change": change})


def moving_state(subject: Subject) -> Seen:
    """Layers that train while they are judged: what an attack asked is not what the verdict asks."""
    before = snapshot(subject.model)
    subject.forward(subject.x)
    moved = changed(subject.model, before)
    flipped = sum(module.training for module in subject.model.modules())
    stubborn = _still_training(subject.model)
    signs = [
        (len(moved), "parameters or buffers that a forward pass changes"),
        (flipped, "modules that a forward pass puts in train mode"),
        (stubborn, "layers that eval() leaves in train mode (they were judged in eval mode all the same)"),
    ]
    found = [f"{what}: {count}" for count, what in signs if count]
    if subject.trained:
        found.append(f"layers that came in train mode and were judged in eval mode: {subject.trained}")
    measured = {"changed": len(moved), "switched": flipped, "stubborn": stubborn, "came_in_train_mode": subject.trained}
    why = "; ".join(found) or "a forward pass leaves the model as it was"
    return Seen(any(count for count, _ in signs), _sentence(why), measured)


def autograd_in_forward(subject: Subject) -> Seen:
    """A forward pass that asks for gradients: the defence answers the input, and an attack must go through that."""
    with _Backwards() as watch:
        subject.forward(subject.x)
        with torch.enable_grad():
            subject.model(subject.x.detach().requires_grad_())
    why = f"Two forward passes asked autograd for gradients {watch.calls} times."
    return Seen(watch.calls > 0, why, {"calls": watch.calls})


# ---- gradients --------------------------------------------------------------------------------------------------


def no_gradient(subject: Subject) -> Seen:
    """Gradients of the margin that are missing, zero or NaN, at the samples or at random points near them."""
    try:
        near = subject.at_start
        found = torch.cat([subject.margin_gradient, subject.gradient(losses.margin_loss, near)]).flatten(1)
    except NoGradient as error:
        return Seen(True, _sentence(str(error)), {"zero": 1.0, "nan": 0.0})
    nan = float(found.isnan().any(1).double().mean())
    zero = float((found == 0).all(1).double().mean())
    why = f"At {zero:.0%} of the points the gradient of the logit margin is zero, at {nan:.0%} it holds NaN."
    return Seen(zero + nan > FEW, why, {"zero": zero, "nan": nan})


def saturated_loss(subject: Subject) -> Seen:
    """The cross-entropy's gradient is zero where the margin's is not: the logits are too large for it."""
    sloped = (subject.margin_gradient != 0).flatten(1).any(1)
    flat = (subject.gradient(losses.cross_entropy) == 0).flatten(1).all(1) & sloped
    blind = float(flat.double().mean())
    none = float((losses.cross_entropy(subject.logits, subject.y) == 0).double().mean())
    margin = float(losses.logit_margin(subject.logits, subject.y).median())
    why = (
        f"At {blind:.0%} of the samples the cross-entropy has zero gradient while the logit margin has one; "
        f"the loss is exactly 0 at {none:.0%}, and the median margin is {margin:.3g}."
    )
    measured = {"blind": blind, "zero_loss": none, "median_margin": margin}
    return Seen(blind > FEW, why, measured, _gravity_of_scale(subject))


def weak_cross_entropy(subject: Subject) -> Seen:
    """PGD on the cross-entropy falls behind PGD on the logit margin."""
    names = "PGD on the logit margin", "PGD on the cross-entropy"
    # Not by count: where many samples stand near the radius, sound models lose a quarter of them to the margin alone.
    seen = _compared(subject.on_margin, names[0], subject.on_cross_entropy, names[1], share=math.inf, slack=0.1)
    return Seen(seen.raised, seen.why, seen.measured, _gravity_of_scale(subject))


# ---- attacks ----------------------------------------------------------------------------------------------------


def one_step_ahead(subject: Subject) -> Seen:
    """A single step goes further than many: the many follow gradients that mislead."""
    return _compared(subject.in_one_step, "one step of FGSM", subject.on_margin, f"PGD with {STEPS} steps")


def not_converged(subject: Subject) -> Seen:
    """Twice as many steps go further: so might more."""
    half = subject.pgd(losses.margin_loss, STEPS // 2)
    names = f"PGD with {STEPS} steps", f"PGD with {STEPS // 2}"
    return _compared(subject.on_margin, names[0], half, names[1], share=LOOSE)


def restarts_find_more(subject: Subject) -> Seen:
    """A second random start breaks others than the first: so would a third."""
    names = "PGD from another random start", "the first run"
    return _compared(subject.restarted, names[0], subject.on_margin, names[1], share=LOOSE)


def random_points_ahead(subject: Subject) -> Seen:
    """Random points of the ball go further than gradients do."""
    return _compared(subject.at_random, "the best of 20 random points", subject.own, "PGD by the model's gradients")


def better_gradients(subject: Subject) -> Seen:
    """Points crafted by gradients that pass over kinks, steps and ripples go further than those by the model's own."""
    softened = subject.softly | subject.averaged
    return _compared(softened, "PGD by softened or averaged gradients", subject.own, "PGD by the model's own gradients")


def stays_robust(subject: Subject) -> Seen:
    """Robust accuracy does not fall to nothing as the radius grows to where any input can be made grey."""
    low, high = subject.box
    far = (high - low) / 2
    # An l1 ball holds that linf ball too, but PGD's l1 steps, an entry each, would take far too long through it.
    norm = "linf" if subject.norm == "l1" else subject.norm
    if norm == "l2":
        far *= math.sqrt(subject.x[0].numel())
    begin = subject.eps if norm == subject.norm and 0 < subject.eps < far / 2 else far / 8
    attack = PGD(norm=norm, box=subject.box, steps=STEPS, start="none", loss=losses.margin_loss, keep="worst")
    left = torch.ones_like(subject.y, dtype=torch.bool)
    measured: dict[str, float] = {}
    for power in (1 / 3, 2 / 3, 1.0):
        radius = begin * (far / begin) ** power
        left = left & ~subject.attacked(attack, eps=radius).broken
        measured[f"robust at {radius:.3g}"] = float(left.double().mean())
        if not bool(left.any()):
            break
    grey = subject.judged(torch.full_like(subject.x, (low + high) / 2)).broken
    missed = float((left & grey).double().mean())
    held = float(left.double().mean())
    why = f"With {norm} radii up to {radius:.3g}, PGD leaves {held:.0%} of the samples unbroken"
    why += f", and the grey input breaks {missed:.0%} that it left." if held else "."
    severity: Severity = "masked" if missed > FEW else "doubt"
    return Seen(missed > FEW or held > SHARE, why, measured | {"left": held, "missed": missed}, severity)


# ---- the record -------------------------------------------------------------------------------------------------


def gradient_free_ahead(subject: Subject) -> Seen:
    """An attack that asks for no gradients breaks what attacks with gradients left."""
    if subject.samples is None or subject.stages is None:
        raise NotExamined("there is no record of a line-up")
    line_up = _line_up(subject.stages)
    first = next((place for place, (_, gradient, _) in enumerate(line_up) if gradient), len(line_up))
    names = [name for name, gradient, _ in line_up[first:] if not gradient]
    if not names:
        raise NotExamined("no gradient-free attack followed one with gradients")
    table = subject.samples
    won = table["clean_correct"] & ~table["robust"] & table["attack"].isin(names)
    count, share = int(won.sum()), float(won.mean())
    why = f"{' and '.join(names)} broke {count} of {len(table)} samples ({share:.2%}) that gradients had left."
    severity: Severity = "masked" if share > FEW else "doubt"
    return Seen(share > SQUARE and count >= LEAST, why, {"share": share, "count": count}, severity)


def broken_after_all(subject: Subject) -> Seen:
    """The attacks of these very checks break what the record calls robust."""
    if subject.samples is None or len(subject.samples) <= int(subject.where.max()):
        raise NotExamined("there is no record of these samples")
    held = torch.from_numpy(subject.samples["robust"].to_numpy(dtype=bool)[subject.where.numpy()])
    refuted = int((held & subject.anything.broken.cpu()).sum())
    share = refuted / max(1, int(held.sum()))
    why = f"Of {int(held.sum())} samples that the record calls robust, these checks broke {refuted}."
    severity: Severity = "masked" if share > SHARE else "doubt"
    return Seen(refuted >= LEAST and share > FEW, why, {"held": int(held.sum()), "broken": refuted}, severity)


# ---- help -------------------------------------------------------------------------------------------------------


def _compared(
    better: Reached, its_name: str, other: Reached, other_name: str, share: float = SHARE, slack: float = 0.05
) -> Seen:
    """Whether one attack outdoes another, which by rights it should not: in samples broken, or in headway."""
    new, rows = int((better.broken & ~other.broken).sum()), len(other.broken)
    far, near = (float(found.headway.double().mean()) for found in (better, other))
    raised = new >= max(LEAST, share * rows) or far > 1.25 * near + slack
    why = (
        f"{its_name} breaks {new} of {rows} samples that {other_name} leaves, and takes away {far:.0%} of the "
        f"margin on average instead of {near:.0%}."
    )
    return Seen(raised, _sentence(why), {"newly_broken": new, "headway": far, "headway_of_the_other": near})


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _still_training(model: nn.Module) -> int:
    """How many layers stay in train mode when the model is told to evaluate."""
    overridden = (nn.Module.train, nn.Module.eval)
    if all(
        (type(m).train, type(m).eval) == overridden and not {"train", "eval"} & vars(m).keys() for m in model.modules()
    ):
        return 0
    # On a copy: what an overridden method does beyond flags could not be undone.
    return sum(
        module.training for module in copy.deepcopy(model).train().eval().modules() if not list(module.children())
    )


class _Backwards(TorchFunctionMode):
    """Counts what asks autograd for gradients; nothing is patched, so nothing has to be put back."""

    calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))


def _line_up(stages: Stages | None) -> list[tuple[str, bool, Mapping[str, Any]]]:
    """Name, whether it needs gradients, and known settings of each attack, in order."""
    if stages is None:
        return []
    if isinstance(stages, Mapping):
        return [(name, bool(gradient), {}) for name, gradient in stages.items()]
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _kinds(Attack)}  # type: ignore[type-abstract]
    found = []
    for stage in stages:
        settings = stage.get("settings") or {}
        kind = kinds.get(settings.get("class_path", ""))
        found.append((stage["name"], kind is None or kind.needs_gradient, settings.get("init_args", {})))
    return found


def _kinds(base: type[Attack]) -> Iterator[type[Attack]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def _gravity_of_scale(subject: Subject) -> Severity:
    """Large logits deceive a line-up that relies on probabilities; beside a scale-free loss they are a warning."""
    scale_free = (losses.margin_loss, losses.unsaturated_margin_loss, losses.dlr_loss)
    safe = {f"{loss.__module__}.{loss.__qualname__}" for loss in scale_free}
    return "doubt" if any(own.get("loss") in safe for _, _, own in _line_up(subject.stages)) else "masked"


def _gravity_of_chance(subject: Subject) -> Severity:
    """Random outputs deceive attacks that follow one draw's gradient; if any averages draws, they are a warning."""
    return "doubt" if any(own.get("draws", 1) > 1 for _, _, own in _line_up(subject.stages)) else "masked"
