"""Which restarts and targets a sample is due, and how the results of two of them are merged.

A *job* is one restart of an attack, at one target if it has targets, on one sample. The jobs of a sample have a fixed
order, and every job has noise of its own, so that a result does not depend on who runs it when.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wideberth import geometry
from wideberth.attacks.base import Attack, S
from wideberth.attacks.state import AttackInputs


def jobs_of(attack: Attack[S], classes: int) -> list[tuple[int, int]]:
    """The jobs that a sample is due, in order: (restart, rank of the target), the rank -1 where there is no target."""
    ranks = range(min(attack.targets, classes - 1)) if attack.targets else (-1,)
    return [(restart, rank) for restart in range(attack.restarts) for rank in ranks]


def inputs_of_jobs(attack: Attack[S], inputs: AttackInputs, job: Tensor, ranked: Tensor | None) -> AttackInputs:
    """The inputs of the jobs that these rows are at: with their noise, restart and target.

    Args:
        attack: what is run.
        inputs: the rows.
        job: (B,) int64, which of `jobs_of` each row is at.
        ranked: (B, >= targets) int64, classes other than the label, the likeliest first; needed for targets.
    """
    inputs = replace(inputs, noise=inputs.noise.then(job))
    if not attack.targets or inputs.target is not None or ranked is None:
        return replace(inputs, restart=job)
    ranks = min(attack.targets, ranked.shape[1])
    target = ranked.gather(1, (job % ranks)[:, None]).squeeze(1)
    return replace(inputs, restart=job // ranks, target=target, target_only=False)


def merged(attack: Attack[S], found: S, again: S, rows: Tensor) -> S:
    """What is known after the rows `rows` (n,) of `found` ran once more: the better of two results, the cost of both.

    A success replaces a failure. Of two successes, the earlier stays, except that a minimum-norm attack keeps the
    closer one; of two failures, the earlier stays.
    """
    before = found.rows(rows)
    better = again.adversarial & ~before.adversarial
    if attack.minimum_norm:
        better |= (again.adversarial == before.adversarial) & (again.best_loss > before.best_loss)
    chosen = {}
    for name in ("point", "best", "best_loss", "adversarial"):
        new, old = getattr(again, name), getattr(before, name)
        value = torch.where(geometry.column(better, new), new, old)
        chosen[name] = getattr(found, name).index_copy(0, rows, value)
    return replace(
        found,
        steps_survived=found.steps_survived.index_add(0, rows, again.steps_survived),
        evaluations=found.evaluations.index_add(0, rows, again.evaluations),
        **chosen,
    )
