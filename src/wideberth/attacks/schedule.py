"""Continuous batching: a batch that is always full of rows which still have something to find.

An evaluation is a heap of runs: every sample is due each restart and each target of an attack, until one succeeds. A
`Schedule` keeps `batch_size` of them going. A row that has succeeded or finished leaves at once and the next waiting
sample takes its slot, so nobody pays for samples that are already broken, and the last batch is as full as the first.

A sample's runs go in the fixed order of `Attack.runs`, one after the other or so many parallel_restarts, and every run has noise
of its own. Of runs parallel_restarts, the first in that order which succeeds is what counts: the others are cancelled, or wait
for those before them to end. Which run breaks a sample, where, and what that cost is therefore the same whatever the
batch size, the order of the samples, the number of processes, and however often the evaluation was interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wideberth.attacks.base import Attack
from wideberth.attacks.state import AttackInputs, AttackState

REFILL = 8
"""Slots are refilled when one in so many is free: joining rows one by one would cost more than it brings."""


@dataclass(frozen=True)
class Left:
    """Runs that have ended, or seem to have succeeded.

    Attributes:
        rows: (n,) int64, which samples.
        run: (n,) int64, which of `Attack.runs`.
        part: what they were attacking.
        state: their last state.
    """

    rows: Tensor
    run: Tensor
    part: AttackInputs
    state: AttackState


class Schedule:
    """The runs of one attack on many samples.

    Args:
        model: asked on its own device; lent already, or a copy that nobody else uses.
        attack: what is run.
        inputs: all N samples, on any device; parts of it are moved to the model's. All else here is on the CPU.
        runs: how many runs a sample is due.
        batch_size: rows under way at a time (a few more, where the runs parallel_restarts of one sample are more); an attack
            without gradients may ask the model about twice as many points.
        likely: (N, K - 1) classes other than the label, the likeliest first, if the attack aims at targets.
        run: (N,) int64, the run that each sample is due next; one with none left is not attacked. Counted up in place.
        parallel_restarts: so many runs of a sample begin together, and ask together. They keep a batch full where few samples are
            left; of a sample that breaks early, more was asked than would have been.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Attack,
        inputs: AttackInputs,
        *,
        runs: int,
        batch_size: int,
        likely: Tensor | None = None,
        run: Tensor | None = None,
        parallel_restarts: int = 1,
    ) -> None:
        self.model, self.attack, self.inputs, self.likely = model, attack, inputs, likely
        self.runs, self.batch_size, self.parallel_restarts = runs, batch_size, parallel_restarts
        self.run = torch.zeros(len(inputs.y), dtype=torch.int64) if run is None else run
        self.end = self.run.clone()  # of the runs parallel_restarts that a sample is at
        self.device = next((p.device for p in model.parameters()), inputs.x.device)
        self.waiting = deque((self.run < runs).nonzero().squeeze(1).tolist())
        self.going = _Going()
        self.ended = _Going()
        self.spent = torch.zeros_like(self.run)  # and not accounted for

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting) or len(self.going) > 0

    def step(self) -> Iterator[Left]:
        """Refill, ask the model about every row under way, and hand out what has ended, to be `judged` each time.

        No two rows handed out together are of one sample.
        """
        self._refill()
        going = self.going
        # Of runs parallel_restarts that are cancelled it counts how far they had come: they go at one pace, whoever is there.
        # Without gradients nothing is kept of a forward, and twice the points take no more memory.
        room = self.batch_size * (1 if self.attack.needs_gradient else 2) if self.parallel_restarts == 1 else len(going)
        attack = self.attack.fitted(len(going), room)
        going.state = attack.step(self.model, going.part, going.state)
        # A minimum-norm attack that has come within its radius has shown what a verdict asks; without a radius, it
        # looks for the smallest one to the end.
        bounded = torch.isfinite(going.part.eps)
        over = (going.state.iteration >= self.attack.num_steps) | (going.state.broken & bounded)
        if not bool(over.any()):
            return
        out = going.take(over.cpu(), over)
        if self.parallel_restarts == 1:
            yield out.left()
            return
        self.ended.join(out)
        while bool((first := self._first()).any()):
            yield self.ended.take(first, first.to(self.device)).left()

    def judged(self, left: Left, held: Tensor) -> Tensor:
        """What a judge made of runs that left: samples that are not `held` (n,) bool are broken, and done with.

        The others go on: with the same run if that has not ended (a search that asks a copy of the model, or in lower
        precision, may take for success what is none), else with their next.

        Returns:
            (n,) int64, the evaluations that are accounted for now: forwards and backwards of all runs parallel_restarts, also of
            those cancelled, and a forward for each judgement; 0 while one of them is still to be judged, since an
            interruption would have all of them begin anew.
        """
        self.spent[left.rows] += left.state.spent.cpu() + 1
        early = held & (left.state.iteration < self.attack.num_steps).cpu()
        if bool(early.any()):
            where = early.to(self.device)
            state = left.state.rows(where)
            value = torch.full_like(state.value, float("-inf")) if self.attack.minimum_norm else state.value
            none = torch.zeros_like(state.spent)
            state = replace(state, broken=none > 0, value=value, spent=none)
            self.going.join(_Going(left.rows[early], left.run[early], left.part.rows(where), state))
        broken = left.rows[~held]
        self.run[broken] = self.runs
        if self.parallel_restarts > 1 and len(broken):
            for group in (self.going, self.ended):
                self._cancel(group, torch.isin(group.rows, broken))
        over = ~early
        if self.parallel_restarts > 1:  # the last of those parallel_restarts
            over &= ~torch.isin(left.rows, torch.cat([self.going.rows, self.ended.rows]))
        rows = left.rows[over & held]
        self.run[rows] = self.end[rows]
        self.waiting.extend(rows[self.run[rows] < self.runs].tolist())
        settled = torch.where(over, self.spent[left.rows], 0)
        self.spent[left.rows] -= settled
        return settled

    def _cancel(self, group: _Going, which: Tensor) -> None:
        if bool(which.any()):
            lost = group.take(which, which.to(self.device))
            self.spent.index_add_(0, lost.rows, lost.state.spent.cpu())

    def _first(self) -> Tensor:
        """Which of the ended runs come before all others of their sample that are not over, (n,) bool."""
        lowest = torch.full_like(self.run, self.runs)
        for group in (self.going, self.ended):
            lowest.scatter_reduce_(0, group.rows, group.run, "amin")
        return self.ended.run == lowest[self.ended.rows]

    def _refill(self) -> None:
        # Runs that wait for those before them may yet have to go on.
        free = self.batch_size - len(self.going) - len(self.ended)
        if not self.waiting or (len(self.going) and free * REFILL < self.batch_size):
            return
        rows: list[int] = []
        run: list[int] = []
        while self.waiting and (len(rows) + self.parallel_restarts <= free or not (rows or len(self.going))):
            row = self.waiting.popleft()
            due = int(self.run[row])
            self.end[row] = min(due + self.parallel_restarts, self.runs)
            run += range(due, int(self.end[row]))
            rows += [row] * (len(run) - len(rows))
        if not rows:
            return
        new, at = torch.tensor(rows), torch.tensor(run)
        likely = None if self.likely is None else self.likely[new].to(self.device)
        part = self.attack.prepared(self.inputs.rows(new).to(self.device), at.to(self.device), likely)
        self.going.join(_Going(new, at, part, self.attack.init(part)))

    def pending(self) -> int:
        """An upper bound on the rounds x rows that are left, if nothing more is broken."""
        done = int(self.going.state.iteration.sum()) if len(self.going) else 0
        return int((self.runs - self.run).sum()) * self.attack.num_steps - done


class _Going:
    """Runs at some stage: which samples' they are, which of their runs, and where they stand."""

    def __init__(
        self, rows: Tensor | None = None, run: Tensor | None = None, part: Any = None, state: Any = None
    ) -> None:
        none = torch.zeros(0, dtype=torch.int64)
        self.rows, self.run = none if rows is None else rows, none if run is None else run
        self.part: AttackInputs = part
        self.state: AttackState = state

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, other: _Going) -> None:
        """Take these in too."""
        if not len(self):
            self.rows, self.run, self.part, self.state = other.rows, other.run, other.part, other.state
        elif len(other):
            self.rows, self.run = torch.cat([self.rows, other.rows]), torch.cat([self.run, other.run])
            self.part, self.state = self.part.joined(other.part), self.state.joined(other.state)

    def take(self, which: Tensor, where: Tensor) -> _Going:
        """Take these out, (n,) bool: on the CPU, and where the states are."""
        taken = _Going(self.rows[which], self.run[which], self.part.rows(where), self.state.rows(where))
        self.rows, self.run = self.rows[~which], self.run[~which]
        self.part, self.state = self.part.rows(~where), self.state.rows(~where)
        return taken

    def left(self) -> Left:
        """As they are handed out."""
        return Left(self.rows, self.run, self.part, self.state)
