"""The checks for false confidence: one table, the examination of a model by it, and the grade that follows.

A robust accuracy is an upper bound; how close it is depends on whether gradients lead to adversarial points. These
checks look for the known ways in which they do not (Athalye et al. 2018; Carlini et al. 2019; Croce and Hein 2020;
Pintor et al. 2022). None of them proves robustness, and a defence that is made to deceive them would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import pandas as pd
import torch
from torch import Tensor, nn

from wideberth import checks
from wideberth.checks import Box, Norm, one_line
from wideberth.evaluation.diagnostics import symptoms
from wideberth.evaluation.diagnostics.probe import Inputs, NotExamined, Probe, Recorded, Stages, Threat, choose_samples
from wideberth.evaluation.diagnostics.symptoms import Observation, Severity
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
    """One row of the table.

    Attributes:
        name: of the check.
        observe: makes it.
        severity: what it means if raised, unless the observation says otherwise.
        advice: one sentence on what to do if raised.
    """

    name: str
    observe: Callable[[Probe], Observation]
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
        "Attack the mean over many draws (PGD(draws=20)), check points by a mean too, and also with frozen randomness.",
    ),
    Check(
        "batch dependence",
        symptoms.batch_dependence,
        "masked",
        "Use running statistics instead of the batch's in eval mode, so that a sample's verdict is its own.",
    ),
    Check(
        "changing state",
        symptoms.changing_state,
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
        "Attack with surrogate gradients for what is not differentiable (BPDA), and add a gradient-free attack.",
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
        "FGSM beats PGD",
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
        "Give the attacks more restarts and targets until further ones find nothing new.",
    ),
    Check(
        "random points beat PGD",
        symptoms.random_points_ahead,
        "masked",
        "Look for what hides the gradients (rounding, noise, huge logits), and use gradient-free attacks meanwhile.",
    ),
    Check(
        "surrogate gradients beat own",
        symptoms.surrogate_gradients_ahead,
        "masked",
        "Attack SurrogateGradients(model) instead of the model, and check the points on the model itself.",
    ),
    Check(
        "robust at huge radii",
        symptoms.robust_at_huge_radii,
        "masked",
        "Make the attack succeed at huge radii before believing it at small ones; check box and units of eps too.",
    ),
    Check(
        "gradient-free attack finds more",
        symptoms.gradient_free_ahead,
        "doubt",
        "Adapt the attacks by gradients to this model until they find what the gradient-free one finds.",
    ),
    Check(
        "record refuted",
        symptoms.record_refuted,
        "doubt",
        "Use a stronger suite: the robust accuracy that was measured is too high.",
    ),
)
"""All checks, in the order in which they are reported; a new one is a function in `symptoms` and a row here."""

_WITH_MODE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.dropout._DropoutNd)
"""Layers that do something else in train mode."""


def examine(
    model: nn.Module,
    x: Tensor | Inputs,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    box: Box = (0.0, 1.0),
    samples: pd.DataFrame | None = None,
    stages: Stages | None = None,
    seed: int = 0,
    rows: int = 64,
) -> list[Finding]:
    """Look for signs of false confidence on a few samples that the model classifies correctly.

    Costs about 400 forwards and backwards of `rows` samples. The model (flags, gradients, buffers) and the states of
    the global random generators are restored, even if a forward pass changes them.

    Args:
        model: maps (B, ...) in the box to logits (B, K); examined in eval mode on the device of its parameters.
        x: (N, ...) floating point in the box; the samples that the record is about, or any others. A tensor, or an
            object that reads the rows that it is indexed by.
        y: (N,) int64 labels.
        eps: one radius, or (N,) radii, in units of the input.
        norm: "linf", "l2" or "l1".
        box: of the inputs.
        samples: the record's table (`Evaluation.samples`; columns attack, robust, clean_correct), row i of it about
            row i of x; None: checks that need it are not made.
        stages: the record's attacks (`protocol["attacks"]`), or a mapping from their names to whether they need
            gradients, in order.
        seed: of the checks' own randomness.
        rows: how many samples to attack at most.

    Returns:
        One finding per row of `CHECKS`, raised or not.

    Raises:
        InputError: for arguments that cannot be used. A model's unusable output is a finding.
    """
    checks.norm_name(norm)
    checks.valid_box(box)
    checks.valid_eps(eps, len(x))
    checks.at_least("rows", rows, 1)
    if isinstance(x, Tensor):
        checks.valid_inputs(x, box)
    device = next((p.device for p in model.parameters()), x.device)
    # To compile for each kind of pass here would cost more than the examination; the function is the same.
    model = getattr(model, "_orig_mod", model)
    came_in_train_mode = sum(module.training and isinstance(module, _WITH_MODE) for module in model.modules())
    with untouched(model, device, seed), torch.autocast(device.type, enabled=False):
        chosen = choose_samples(model, x, y, seed, rows)
        each = isinstance(eps, Tensor) and eps.dim() > 0
        probe = Probe(
            model=model,
            samples=chosen,
            threat=Threat(torch.as_tensor(eps).to(device)[chosen.index.to(device)] if each else float(eps), norm, box),
            recorded=Recorded(samples, stages),
            seed=seed,
            came_in_train_mode=came_in_train_mode,
        )
        return [_finding(check, probe) for check in CHECKS]


def _finding(check: Check, probe: Probe) -> Finding:
    try:
        observed = check.observe(probe)
    except NotExamined as reason:
        observed = Observation(False, f"Not examined: {reason}.")
    except (RuntimeError, ValueError) as error:
        # A check that an unusual model makes fail must not cost its user the evaluation that came before.
        observed = Observation(False, f"Not examined, because it failed: {one_line(error).removesuffix('.')}.")
    severity = check.severity if observed.severity is None else observed.severity
    return Finding(check.name, observed.raised, severity, observed.why, check.advice, observed.measured)


def grade(findings: Sequence[Finding], robust_accuracy: float | None = None) -> tuple[Grade, str]:
    """What the findings mean for a robust accuracy, and one sentence why.

    Args:
        findings: as `examine` returns them.
        robust_accuracy: of the model, in [0, 1], if known.

    Returns:
        "masked": attacks by gradients are known to fail on this model; "doubtful": the accuracy may be too high;
        "trusted": no check found a reason not to believe it, or it is 0, which no weakness of the attacks explains.
    """
    raised = [finding for finding in findings if finding.raised]
    made = sum(bool(finding.measured) for finding in findings)
    if raised and robust_accuracy == 0:
        return "trusted", f"{len(raised)} of {made} checks were raised, but an attack succeeded on every sample."
    grades: dict[Severity, Grade] = {"masked": "masked", "doubt": "doubtful"}
    for severity, word in grades.items():
        names = [finding.name for finding in raised if finding.severity == severity]
        if names:
            return word, f"{len(raised)} of {made} checks were raised, the gravest: {', '.join(names)}."
    return "trusted", f"None of {made} checks found a sign of false confidence."
