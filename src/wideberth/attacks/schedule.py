"""Continuous batching: a batch that is always full of rows which still have something to find.

An evaluation is a heap of runs: every sample is due each restart and each target of an attack, until one succeeds. A
`Schedule` keeps `batch_size` of them going. A row that has succeeded or finished leaves at once and the next waiting
sample takes its slot, so nobody pays for samples that are already broken, and the last batch is as full as the first.

A sample has one run under way at a time, in the fixed order of `Attack.runs`, and every run has noise of its own.
Which run breaks a sample, and where, is therefore the same whatever the batch size, the order of the samples, the
number of processes, and however often the evaluation was interrupted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wideberth.attacks.base import Attack
from wideberth.attacks.state import Problem, State

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
    part: Problem
    state: State


class Schedule:
    """The runs of one attack on many samples.

    Args:
        model: asked on its own device; borrowed already, or a copy that nobody else uses.
        attack: what is run.
        problem: all N samples, on any device; parts of it are moved to the model's.
        runs: how many runs a sample is due.
        batch_size: rows under way at a time.
        likely: (N, K - 1) classes other than the label, the likeliest first, if the attack aims at targets.
        run: (N,) int64, the run that each sample is due next; one with none left is not attacked.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Attack,
        problem: Problem,
        *,
        runs: int,
        batch_size: int,
        likely: Tensor | None = None,
        run: Tensor | None = None,
    ) -> None:
        self.model, self.attack, self.problem, self.likely = model, attack, problem, likely
        self.runs, self.batch_size = runs, batch_size
        self.run = torch.zeros_like(problem.y) if run is None else run
        self.device = next((p.device for p in model.parameters()), problem.x.device)
        self.waiting = deque((self.run < runs).nonzero().squeeze(1).tolist())
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.part: Problem | None = None
        self.state: State | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting) or len(self.rows) > 0

    def step(self) -> Left | None:
        """Refill, ask the model once about every row under way, and take out what has ended (None: nothing has)."""
        self._refill()
        assert self.part is not None
        assert self.state is not None
        self.state = self.attack.step(self.model, self.part, self.state)
        # A minimum-norm attack that has come within its radius has shown what a verdict asks; without a radius, it
        # looks for the smallest one to the end.
        bounded = torch.isfinite(self.part.eps)
        over = (self.state.iteration >= self.attack.rounds) | (self.state.broken & bounded)
        if not bool(over.any()):
            return None
        gone = over.cpu()
        rows = self.rows[gone]
        left = Left(rows, self.run[rows], self.part.rows(over), self.state.rows(over))
        self.rows, self.part, self.state = self.rows[~gone], self.part.rows(~over), self.state.rows(~over)
        return left

    def judged(self, left: Left, held: Tensor) -> None:
        """What a judge made of runs that left: samples that are not `held` (n,) bool are broken, and done with.

        The others go on: with the same run if that has not ended (a search that asks a copy of the model, or in lower
        precision, may take for success what is none), else with their next.
        """
        early = held & (left.state.iteration < self.attack.rounds).cpu()
        if bool(early.any()):
            where = early.to(self.device)
            state = left.state.rows(where)
            value = torch.full_like(state.value, float("-inf")) if self.attack.minimal else state.value
            none = torch.zeros_like(state.spent)
            self._join(
                left.rows[early], left.part.rows(where), replace(state, broken=none > 0, value=value, spent=none)
            )
        self.run[left.rows[~held]] = self.runs
        rows = left.rows[held & ~early]
        self.run[rows] += 1
        self.waiting.extend(rows[self.run[rows] < self.runs].tolist())

    def _refill(self) -> None:
        free = self.batch_size - len(self.rows)
        if not self.waiting or (len(self.rows) and free * REFILL < self.batch_size):
            return
        new = torch.tensor([self.waiting.popleft() for _ in range(min(free, len(self.waiting)))])
        likely = None if self.likely is None else self.likely[new].to(self.device)
        part = self.problem.rows(new).to(self.device)
        part = self.attack.prepared(part, self.run[new].to(self.device), likely)
        self._join(new, part, self.attack.begin(part))

    def _join(self, rows: Tensor, part: Problem, state: State) -> None:
        if self.part is None or self.state is None or not len(self.rows):
            self.rows, self.part, self.state = rows, part, state
        else:
            self.rows = torch.cat([self.rows, rows])
            self.part, self.state = self.part.joined(part), self.state.joined(state)

    def pending(self) -> int:
        """An upper bound on the rounds x rows that are left, if nothing more is broken."""
        due = int((self.runs - self.run[list(self.waiting)]).sum()) + int((self.runs - self.run[self.rows]).sum())
        done = 0 if self.state is None or not len(self.rows) else int(self.state.iteration.sum())
        return due * self.attack.rounds - done
