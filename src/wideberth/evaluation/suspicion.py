"""False confidence: signs that a model looks robust because attacks fail on it, not because there is nothing to find.

A robust accuracy is an upper bound; how close it is depends on whether gradients lead anywhere. These checks look for
the known ways in which they do not (Athalye et al. 2018; Carlini et al. 2019; Croce and Hein 2020; Pintor et al.
2022). None of them proves robustness, and a defence made to deceive them would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import pandas as pd
import torch
from torch import Tensor, nn

from wideberth import checks
from wideberth.checks import Box, Norm
from wideberth.data.splits import one_line
from wideberth.evaluation import symptoms
from wideberth.evaluation.subject import NotExamined, Stages, Subject, drawn
from wideberth.evaluation.symptoms import Seen, Severity
from wideberth.modes import untouched

Grade: TypeAlias = Literal["trusted", "doubtful", "masked"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        raised: whether it is a reason not to believe the robust accuracy.
        severity: "doubt": the accuracy may be too high; "masked": attacks by gradients are known to fail.
        why: one sentence with the figures, or why the check was not made.
        advice: one sentence on what to do.
        measured: the figures; empty where the check was not made.
    """

    name: str
    raised: bool
    severity: Severity
    why: str
    advice: str
    measured: Mapping[str, float]


@dataclass(frozen=True)
class Check:
    """One row of the table: a name, what looks, what it means if raised, and what to do then."""

    name: str
    look: Callable[[Subject], Seen]
    severity: Severity
    advice: str


CHECKS = (
    Check(
        "unusable output",
        symptoms.unusable_output,
        "masked",
        "Return finite logits (B, K) with K >= 2; give a binary model with one column z the columns (0, z).",
    ),
    Check(
        "probabilities",
        symptoms.probabilities,
        "doubt",
        "Return the logits, and take the softmax outside of the model: inside, it flattens the gradients.",
    ),
    Check(
        "random outputs",
        symptoms.random_outputs,
        "masked",
        "Attack the mean over many draws (PGD(draws=20)), judge by a mean as well, and also with frozen randomness.",
    ),
    Check(
        "batch dependence",
        symptoms.batch_dependence,
        "masked",
        "Use running statistics instead of the batch's when judging, so that a sample's verdict is its own.",
    ),
    Check(
        "moving state",
        symptoms.moving_state,
        "doubt",
        "Make eval() stop all training behaviour (batch norm, dropout, counters), and let forward change nothing.",
    ),
    Check(
        "autograd in forward",
        symptoms.autograd_in_forward,
        "doubt",
        "Attack the defence through its inner optimisation, and without it by transfer; standard attacks are too weak.",
    ),
    Check(
        "no gradient",
        symptoms.no_gradient,
        "masked",
        "Attack through a smooth stand-in for what is not differentiable (BPDA), and add a gradient-free attack.",
    ),
    Check(
        "saturated loss",
        symptoms.saturated_loss,
        "masked",
        "Use attacks on a loss that the scale of the logits cannot saturate: margin_loss or dlr_loss.",
    ),
    Check(
        "weak cross-entropy",
        symptoms.weak_cross_entropy,
        "masked",
        "Do not rely on attacks on the cross-entropy: use margin_loss or dlr_loss, with targets.",
    ),
    Check(
        "one step ahead",
        symptoms.one_step_ahead,
        "masked",
        "Suspect shattered gradients: average them over noise (draws), smooth the model for the attack, add Square.",
    ),
    Check(
        "not converged",
        symptoms.not_converged,
        "doubt",
        "Give the attacks more steps until neither loss nor accuracy changes any more.",
    ),
    Check(
        "restarts find more",
        symptoms.restarts_find_more,
        "doubt",
        "Give the attacks more restarts and targets until further ones break nothing new.",
    ),
    Check(
        "random points ahead",
        symptoms.random_points_ahead,
        "masked",
        "Look for what hides the gradients (rounding, noise, huge logits), and use gradient-free attacks meanwhile.",
    ),
    Check(
        "better gradients",
        symptoms.better_gradients,
        "masked",
        "Attack with these gradients instead of the model's own (Softened), and judge the points on the model itself.",
    ),
    Check(
        "stays robust",
        symptoms.stays_robust,
        "masked",
        "Make the attack succeed at huge radii before believing it at small ones; check box and units of eps too.",
    ),
    Check(
        "gradient-free ahead",
        symptoms.gradient_free_ahead,
        "doubt",
        "Adapt the attacks by gradients to this model until they break what the gradient-free one breaks.",
    ),
    Check(
        "broken after all",
        symptoms.broken_after_all,
        "doubt",
        "Use a stronger line-up: the robust accuracy that was measured is too high.",
    ),
)
"""All checks, in the order in which they are reported; another one is a function in `symptoms` and a row here."""


def examine(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm,
    box: Box = (0.0, 1.0),
    samples: pd.DataFrame | None = None,
    stages: Stages | None = None,
    seed: int = 0,
    rows: int = 64,
) -> list[Finding]:
    """Look for signs of false confidence on a few samples that the model classifies correctly.

    Costs about 400 forwards and backwards of `rows` samples. The model (flags, gradients, buffers) and the global
    random states are given back as they were, even if its forward changes them.

    Args:
        model: maps (B, ...) in the box to logits (B, K); examined in eval mode where its parameters are.
        x: (N, ...) floating point in the box; the samples that the record is about, or any others.
        y: (N,) int64 labels.
        eps: radius of the evaluation, in units of the input.
        norm: "linf", "l2" or "l1".
        box: of the inputs.
        samples: the record's table (`Evaluation.samples`; columns attack, robust, clean_correct), row i of it about
            row i of x; None: what needs it is not examined.
        stages: the record's line-up (`protocol["attacks"]`), or attack names to whether they need gradients, in order.
        seed: of the checks' own randomness.
        rows: samples to look at, at most.

    Returns:
        One finding per row of `CHECKS`, raised or not.

    Raises:
        InputError: for arguments that cannot be used. A model's unusable output is a finding.
    """
    checks.norm_name(norm)
    checks.valid_box(box)
    checks.valid_eps(eps)
    checks.at_least("rows", rows, 1)
    checks.valid_inputs(x, box)
    device = next((p.device for p in model.parameters()), x.device)
    # What compilation would cost for each kind of pass here exceeds all that is examined; the function is the same.
    model = getattr(model, "_orig_mod", model)
    trained = sum(module.training and isinstance(module, _MODAL) for module in model.modules())
    with untouched(model, device, seed), torch.autocast(device.type, enabled=False):
        where, obstacle = drawn(model, x, y, seed, rows)
        about = Subject(
            model=model,
            x=x[where].detach().to(device),
            y=y[where].to(device),
            where=where,
            obstacle=obstacle,
            trained=trained,
            eps=float(eps),
            norm=norm,
            box=box,
            seed=seed,
            samples=samples,
            stages=stages,
        )
        return [_found(check, about) for check in CHECKS]


_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.dropout._DropoutNd)


def _found(check: Check, about: Subject) -> Finding:
    try:
        seen = check.look(about)
    except NotExamined as reason:
        seen = Seen(False, f"Not examined: {reason}.")
    except (RuntimeError, ValueError) as error:
        # One strange model must not cost its user the whole evaluation that came before.
        seen = Seen(False, f"Not examined, because it failed: {one_line(error)}")
    severity = check.severity if seen.severity is None else seen.severity
    return Finding(check.name, seen.raised, severity, seen.why, check.advice, seen.measured)


def grade(findings: Sequence[Finding], robust_accuracy: float | None = None) -> tuple[Grade, str]:
    """What the findings mean for a robust accuracy, and one sentence why.

    "masked": attacks by gradients are known to fail on this model; "doubtful": the accuracy may be too high;
    "trusted": no check found a reason not to believe it, or it is 0, which no weakness of the attacks explains.
    """
    raised = [finding for finding in findings if finding.raised]
    made = sum(bool(finding.measured) for finding in findings)
    if raised and robust_accuracy == 0:
        return "trusted", f"{len(raised)} of {made} checks were raised, but every sample was seen to break."
    grades: dict[Severity, Grade] = {"masked": "masked", "doubt": "doubtful"}
    for severity, word in grades.items():
        names = [finding.name for finding in raised if finding.severity == severity]
        if names:
            return word, f"{len(raised)} of {made} checks were raised, the gravest: {', '.join(names)}."
    return "trusted", f"None of {made} checks found a sign of false confidence."
