"""Running an attack for a fixed number of steps: what training and a call do; an evaluation uses `schedule`.

With one restart, no target to choose and `check_success=False` there is no host synchronisation and no data-dependent
shape.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from wideberth import losses
from wideberth.attacks.base import Adversarial, Attack, S, SteppedAttack
from wideberth.attacks.restarts import inputs_of_jobs, jobs_of, merged
from wideberth.attacks.state import AttackInputs


def perturb_batch(
    attack: Attack[S], model: nn.Module, inputs: AttackInputs, *, check_success: bool = True
) -> Adversarial:
    """All restarts and targets of an attack on one batch; the model's mode and gradient flags are the caller's.

    Args:
        attack: what is run.
        model: maps (B, ...) to logits (B, K).
        inputs: the batch. With a `loss`, which may be tied to the whole batch, every restart runs all rows.
        check_success: tell whether the returned points are a success, for one more forward where the attack does not
            know. Several restarts are always checked, since only rows without a success run again.
    """
    ranked, jobs = None, attack.restarts
    if attack.targets and inputs.target is None:
        with torch.no_grad():
            ranked = losses.likeliest(model(inputs.x), inputs.y)
        jobs = len(jobs_of(attack, ranked.shape[1] + 1))
    check_success = check_success or jobs > 1
    rows = torch.arange(len(inputs.y), device=inputs.y.device)

    def run(job: int, rows: Tensor) -> S:
        part = inputs.rows(rows)
        if jobs > 1 or ranked is not None:
            part = inputs_of_jobs(attack, part, torch.full_like(rows, job), None if ranked is None else ranked[rows])
        return run_steps(attack, model, part, check_success=check_success)

    found = run(0, rows)
    for job in range(1, jobs):
        if not attack.minimum_norm and inputs.loss is None:
            rows = (~found.adversarial).nonzero().squeeze(1)
            if not len(rows):
                break
        found = merged(attack, found, run(job, rows), rows)
    success = found.adversarial if check_success or attack.knows_success else None
    evaluations = found.evaluations + (ranked is not None)
    num_iterates = torch.full_like(found.steps_survived, jobs * attack.num_steps)
    return Adversarial(found.best.detach(), success, found.steps_survived, evaluations, num_iterates)


def run_steps(attack: Attack[S], model: nn.Module, inputs: AttackInputs, *, check_success: bool = True) -> S:
    """One restart of all rows: `init`, all updates and, where needed, the check of the last point.

    `best` of the returned state is what the attack found.
    """
    if attack.ends_early and inputs.loss is None:
        return _run_until_finished(attack, model, inputs)
    if isinstance(attack, SteppedAttack):
        stepped: SteppedAttack[S] = attack
        return _run_stepped(stepped, model, inputs, check_success)
    state = attack.init(inputs)
    for _ in range(attack.num_steps):
        state = attack.update(model, inputs, state)
    return state


def _run_until_finished(attack: Attack[S], model: nn.Module, inputs: AttackInputs) -> S:
    """Finished rows leave the batch; a look at the device after every step is the price."""
    state, left = attack.init(inputs), torch.arange(len(inputs.y), device=inputs.y.device)
    ended, order = [state.rows(left[:0])], [left[:0]]
    for _ in range(attack.num_steps):
        state = attack.update(model, inputs, state)
        over = state.iteration >= attack.num_steps
        if bool(over.any()):
            ended.append(state.rows(over))
            order.append(left[over])
            state, inputs, left = state.rows(~over), inputs.rows(~over), left[~over]
            if not len(left):
                break
    for more in ended:
        state = more.joined(state)
    return state.rows(torch.cat([*reversed(order), left]).argsort())


def _run_stepped(attack: SteppedAttack[S], model: nn.Module, inputs: AttackInputs, check_success: bool) -> S:
    state = attack.init(inputs)
    if attack.knows_success:
        for _ in range(attack.num_steps):
            state = attack.update(model, inputs, state)
    else:
        state = _moves_then_record(attack, model, inputs, state)
    if not (check_success or attack.knows_success):
        return replace(state, best=state.point)
    survived = state.steps_survived  # of the points that the attack stepped from
    return replace(attack.record(inputs, state, attack.check(model, inputs, state)), steps_survived=survived)


def _moves_then_record(attack: SteppedAttack[S], model: nn.Module, inputs: AttackInputs, state: S) -> S:
    """All queries and moves; how many points each row survived is counted after the last.

    Right after a network, a CPU finds none of the code of a dozen small sums in its caches, and takes as long for them
    as for the step itself.
    """
    outputs: list[Tensor] = []
    cost = 0
    for _ in range(attack.num_steps):
        query = attack.query(model, inputs, state)
        outputs.append(query.logits.clone())  # a model may use the memory of its output again
        cost += query.cost
        state = attack.move(inputs, replace(state, iteration=state.iteration + 1), query)
        del query  # its gradient's memory, still in the cache, is free for the next one
    survived = torch.stack([~inputs.goal_reached(logits) for logits in outputs]).long().cumprod(0).sum(0)
    return replace(state, steps_survived=state.steps_survived + survived, evaluations=state.evaluations + cost)
