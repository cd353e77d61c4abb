"""Continuous batching: the driver of an evaluation, which keeps its batches full of rows that still search.

An evaluation consists of jobs: each restart and each target of an attack, on each sample, until one is a success. A
`Schedule` keeps `batch_size` of them active. A job that has succeeded or finished leaves at once and the next waiting
sample takes its place, so that no query is spent on samples that are already adversarial, and the last batch is as full
as the first.

The jobs of a sample run in the fixed order of `restarts.jobs_of`, one after the other or several in parallel, and every
job has noise of its own. Of parallel jobs, the first in that order that succeeds counts: later ones are cancelled, and
it waits for earlier ones to end. So which job succeeds, where, and at what cost is the same for any batch size, order
of the samples and number of processes, and however often the evaluation was interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from wideberth.attacks.base import Attack
from wideberth.attacks.restarts import inputs_of_jobs
from wideberth.attacks.state import AttackInputs, AttackState, Rows

REFILL = 8
"""Places are refilled when one in so many is free: joining rows one by one would cost more than it gains."""

Fetch: TypeAlias = Callable[[Tensor], AttackInputs]
"""The inputs of some samples, given their rows (n,) int64 on the CPU, on the model's device."""


@dataclass(frozen=True)
class Jobs(Rows):
    """Jobs of an attack, each at an iteration of its own.

    Attributes:
        sample: (n,) int64 on the CPU, the sample of each job, as a row of the evaluation.
        job: (n,) int64 on the CPU, which of `restarts.jobs_of`.
        inputs: what they attack, on the model's device.
        state: where they stand.
    """

    sample: Tensor
    job: Tensor
    inputs: AttackInputs
    state: AttackState

    def __len__(self) -> int:
        return len(self.sample)

    def rows(self, where: Tensor) -> Self:
        """Some of the jobs, `where` (n,) bool on the CPU."""
        there = where.to(self.inputs.y.device)
        inputs, state = self.inputs.rows(there), self.state.rows(there)
        return replace(self, sample=self.sample[where], job=self.job[where], inputs=inputs, state=state)

    def joined(self, other: Self) -> Self:
        """These jobs, followed by those of `other`."""
        if not len(other):
            return self
        if not len(self):
            return other
        sample, job = torch.cat([self.sample, other.sample]), torch.cat([self.job, other.job])
        inputs, state = self.inputs.joined(other.inputs), self.state.joined(other.state)
        return replace(self, sample=sample, job=job, inputs=inputs, state=state)


@dataclass(frozen=True)
class DueJobs:
    """The jobs that N samples are due.

    Attributes:
        fetch: gives the inputs of samples when their jobs begin.
        next_job: (N,) int64 on the CPU, the job that each sample is due next; a sample with none left is not attacked.
            A `Schedule` counts it up in place.
        per_sample: how many jobs a sample is due.
        ranked: (N, >= targets) int64 on the CPU, classes other than the label, the likeliest first, if the attack has
            targets.
    """

    fetch: Fetch
    next_job: Tensor
    per_sample: int
    ranked: Tensor | None = None


class Schedule:
    """The jobs of one attack on many samples.

    Args:
        model: queried on its own device; lent already, or a copy that nobody else uses.
        attack: what is run.
        due: the jobs.
        batch_size: jobs active at a time (a few more, where the parallel jobs of one sample are more); an attack
            without gradients may query about twice as many points.
        parallel_restarts: so many jobs of a sample begin together, at one pace. They keep a batch full where few
            samples are left; samples that succeed early cost more queries.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Attack[Any],
        due: DueJobs,
        *,
        batch_size: int,
        parallel_restarts: int = 1,
    ) -> None:
        self.model, self.attack, self.fetch, self.ranked = model, attack, due.fetch, due.ranked
        self.batch_size, self.parallel_restarts = batch_size, parallel_restarts
        self.jobs, self.next_job = due.per_sample, due.next_job
        self.end = self.next_job.clone()  # of the parallel jobs that a sample is at
        self.waiting = deque((self.next_job < self.jobs).nonzero().squeeze(1).tolist())
        self.active: Jobs | None = None
        self.ended: Jobs | None = None
        self.evaluations = torch.zeros_like(self.next_job)  # that `confirm` has not returned yet

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting) or _count(self.active) > 0

    def step(self) -> Iterator[Jobs]:
        """Refill the batch, update every active job, and yield those that ended; pass each to `confirm` in turn.

        No two jobs that are yielded together belong to one sample.
        """
        self._refill()
        active = self.active
        if active is None or not len(active):
            return
        state = self.attack.update(
            self.model, replace(active.inputs, points_per_row=self._points_per_row()), active.state
        )
        self.active = active = replace(active, state=state)
        # With a radius, the first success ends a job; without one, a minimum-norm attack searches to the end.
        bounded = torch.isfinite(active.inputs.eps)
        over = ((state.iteration >= self.attack.num_steps) | (state.adversarial & bounded)).cpu()
        if not bool(over.any()):
            return
        ended, self.active = active.rows(over), active.rows(~over)
        if self.parallel_restarts == 1:
            yield ended
            return
        self.ended = _joined(self.ended, ended)
        while (waiting := self.ended) is not None and bool((first := self._first_of_each_sample(waiting)).any()):
            self.ended = waiting.rows(~first)
            yield waiting.rows(first)

    def confirm(self, ended: Jobs, refused: Tensor) -> Tensor:
        """Take the verification of jobs that were yielded: a sample whose point is not `refused` (n,) bool is done.

        The others go on: with the same job if that has steps left (a search that queries a copy of the model, or one of
        lower precision, may count as success what is none), else with their next.

        Returns:
            (n,) int64, the evaluations that are complete now: forwards and backwards of all parallel jobs, those of
            cancelled ones included, and a forward for each verification; 0 while one of them is still unverified, since
            all of them begin again after an interruption.
        """
        self.evaluations[ended.sample] += ended.state.evaluations.cpu() + 1
        unfinished = refused & (ended.state.iteration < self.attack.num_steps).cpu()
        if bool(unfinished.any()):
            self.active = _joined(self.active, self._without_success(ended.rows(unfinished)))
        done = ended.sample[~refused]
        self.next_job[done] = self.jobs
        if self.parallel_restarts > 1 and len(done):
            self.active, self.ended = self._cancelled(self.active, done), self._cancelled(self.ended, done)
        over = ~unfinished
        if self.parallel_restarts > 1:  # the last of the parallel ones
            over &= ~torch.isin(ended.sample, torch.cat([_samples(self.active), _samples(self.ended)]))
        samples = ended.sample[over & refused]
        self.next_job[samples] = self.end[samples]
        self.waiting.extend(samples[self.next_job[samples] < self.jobs].tolist())
        complete = torch.where(over, self.evaluations[ended.sample], 0)
        self.evaluations[ended.sample] -= complete
        return complete

    def pending(self) -> int:
        """An upper bound on the updates x jobs that are left, if no other job succeeds."""
        done = int(self.active.state.iteration.sum()) if self.active is not None and len(self.active) else 0
        return int((self.jobs - self.next_job).sum()) * self.attack.num_steps - done

    def _points_per_row(self) -> int:
        # Parallel jobs go at one pace, whatever else is in the batch: how far a cancelled one has come is counted.
        if self.parallel_restarts > 1:
            return 1
        # Without gradients no activations are kept, and twice the points take no more memory.
        room = self.batch_size * (1 if self.attack.needs_gradient else 2)
        return max(1, room // _count(self.active))

    def _without_success(self, jobs: Jobs) -> Jobs:
        """These jobs as if their last success had been none."""
        state = jobs.state
        none = torch.zeros_like(state.evaluations)
        loss = torch.full_like(state.best_loss, float("-inf")) if self.attack.minimum_norm else state.best_loss
        return replace(jobs, state=replace(state, adversarial=none > 0, best_loss=loss, evaluations=none))

    def _cancelled(self, jobs: Jobs | None, samples: Tensor) -> Jobs | None:
        """The jobs that are not of these samples; what the others cost is remembered."""
        if jobs is None:
            return None
        cancelled = torch.isin(jobs.sample, samples)
        if not bool(cancelled.any()):
            return jobs
        lost = jobs.rows(cancelled)
        self.evaluations.index_add_(0, lost.sample, lost.state.evaluations.cpu())
        return jobs.rows(~cancelled)

    def _first_of_each_sample(self, ended: Jobs) -> Tensor:
        """Which of the ended jobs precede all other jobs of their sample that are not over, (n,) bool."""
        lowest = torch.full_like(self.next_job, self.jobs)
        for jobs in (ended, self.active):
            if jobs is not None:
                lowest.scatter_reduce_(0, jobs.sample, jobs.job, "amin")
        return ended.job == lowest[ended.sample]

    def _refill(self) -> None:
        # Jobs that wait for earlier ones may yet go on.
        count = _count(self.active)
        free = self.batch_size - count - _count(self.ended)
        if not self.waiting or (count and free * REFILL < self.batch_size):
            return
        samples: list[int] = []
        jobs: list[int] = []
        while self.waiting and (len(samples) + self.parallel_restarts <= free or not (samples or count)):
            sample = self.waiting.popleft()
            due = int(self.next_job[sample])
            self.end[sample] = min(due + self.parallel_restarts, self.jobs)
            jobs += range(due, int(self.end[sample]))
            samples += [sample] * (len(jobs) - len(samples))
        if not samples:
            return
        rows, job = torch.tensor(samples), torch.tensor(jobs)
        inputs = self.fetch(rows)
        device = inputs.y.device
        ranked = None if self.ranked is None else self.ranked[rows].to(device)
        inputs = inputs_of_jobs(self.attack, inputs, job.to(device), ranked)
        self.active = _joined(self.active, Jobs(rows, job, inputs, self.attack.init(inputs)))


def _count(jobs: Jobs | None) -> int:
    return 0 if jobs is None else len(jobs)


def _samples(jobs: Jobs | None) -> Tensor:
    return torch.zeros(0, dtype=torch.int64) if jobs is None else jobs.sample


def _joined(jobs: Jobs | None, more: Jobs) -> Jobs:
    return more if jobs is None else jobs.joined(more)
