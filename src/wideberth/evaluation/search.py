"""The search for adversarial points: attacks in order, each on the samples that are still robust; every find verified.

What is known so far is a `SearchState`: tensors with one row per sample, written to disk now and then, so that an
interrupted evaluation goes on from there to the verdict that it would have reached. Jobs that were under way begin
again and repeat what they did, because their noise depends on the sample and the job alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wideberth import checksums, losses
from wideberth.acceleration import optimised_copy
from wideberth.attacks.base import Attack
from wideberth.attacks.restarts import jobs_of
from wideberth.attacks.schedule import DueJobs, Jobs, Schedule
from wideberth.attacks.suites import Stage
from wideberth.checks import InputError
from wideberth.evaluation.console import Watch
from wideberth.evaluation.evidence import RowFile
from wideberth.evaluation.protocol import Protocol
from wideberth.evaluation.samples import Samples
from wideberth.modes import lent
from wideberth.randomness import fold
from wideberth.runs import write_atomically
from wideberth.verification import TOLERANCE, check_points

SAVE_EVERY = 120.0
"""Seconds between two saved states."""
_COMPARED = 64
"""Samples on which the optimised copy of the model must agree with the model."""


@dataclass
class SearchState:
    """What is known of each of N samples.

    Attributes:
        adversarial: (N,) bool, whether an attack found an adversarial point.
        stage: (N,) int64, the attack that found it, in the order of the line-up; -1 where none did.
        job: (N,) int64, the job of that attack: which of its restarts and targets.
        step: (N,) int64, the step of that job.
        adversarial_prediction: (N,) int64, the class of that point (of the clean input where there is none).
        distance: (N,) float64, of that point; infinite where there is none.
        max_probability_margin: (N,) the largest probability margin loss seen at the end of a job; where the label of
            the sample leads by more than `losses.SATURATED` logits, of logits divided until it leads by no more.
        evaluations: (N,) int64, forwards and backwards spent.
        next_job: (N,) int64, the job of the stage under way that comes next.
        seconds: (stages,) float64, spent so far.
        stage_under_way: () int64.
    """

    adversarial: Tensor
    stage: Tensor
    job: Tensor
    step: Tensor
    adversarial_prediction: Tensor
    distance: Tensor
    max_probability_margin: Tensor
    evaluations: Tensor
    next_job: Tensor
    seconds: Tensor
    stage_under_way: Tensor

    @classmethod
    def empty(cls, prediction: Tensor, stages: int) -> SearchState:
        """Before the first attack; `prediction` (N,) is the class of each clean input."""
        none = torch.zeros(len(prediction), dtype=torch.int64)
        return cls(
            adversarial=none.bool(),
            stage=none - 1,
            job=none.clone(),
            step=none.clone(),
            adversarial_prediction=prediction.clone(),
            distance=torch.full((len(none),), float("inf"), dtype=torch.float64),
            max_probability_margin=torch.full((len(none),), -1.0),
            evaluations=none + 1,
            next_job=none.clone(),
            seconds=torch.zeros(stages, dtype=torch.float64),
            stage_under_way=torch.zeros((), dtype=torch.int64),
        )

    def columns(self) -> dict[str, Tensor]:
        """What there is one value of for each sample."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name).shape == self.job.shape}

    def add_unbounded(self, unbounded: SearchState, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Take over what a search without a radius found within eps (N,).

        A point that is adversarial at a smaller radius is so at every larger one: verdict and curve agree.

        Returns:
            Which samples were taken over, (N,) bool, and each sample's smallest radius known, (N,) float64.
        """
        stages = len(self.seconds)
        new = ~self.adversarial & (unbounded.distance <= eps * (1 + TOLERANCE))
        for name in ("adversarial", "stage", "job", "step", "adversarial_prediction", "distance"):
            mine, other = getattr(self, name), getattr(unbounded, name)
            mine[new] = other[new] + stages if name == "stage" else other[new]
        margin = unbounded.max_probability_margin.where(new, torch.tensor(-1.0))
        self.max_probability_margin = torch.maximum(self.max_probability_margin, margin)
        self.evaluations += unbounded.evaluations - 1  # both counted the clean forward
        self.seconds = torch.cat([self.seconds, unbounded.seconds])
        return new, torch.minimum(self.distance, unbounded.distance)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write all of it, atomically; the fingerprint says which evaluation it belongs to."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}

        def write(file: Path) -> None:
            save_file(tensors, file, {"fingerprint": fingerprint} | checksums.UNSEALED)
            checksums.seal(file)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> SearchState:
        """Read what `save` wrote.

        Raises:
            InputError: where it belongs to another evaluation, or cannot be read.
        """
        try:
            if not checksums.sound(path):
                raise ValueError("it does not match the checksum in its header")
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("fingerprint")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dictionary)
            state = cls(**tensors) if found == fingerprint else None
        except Exception as error:
            raise InputError(f"{str(path)!r}: cannot be read as a state to resume ({error}); delete it") from error
        if state is None:
            raise InputError(
                f"{str(path)!r}: is the state of another evaluation (of another model, data, eps, suite or seed); "
                "delete it to begin anew"
            )
        return state


@dataclass(frozen=True)
class Search:
    """A line-up of attacks on some samples.

    Attributes:
        model: in any mode; lent.
        samples: N samples; without radii (`Samples.unbounded`), minimum-norm attacks look for the smallest.
        line_up: the stages by name, in order.
        protocol: norm, box, seed and batch size.
        points: where the adversarial points go, row i for sample i; None: they are not kept.
        watch: told after every step.
        save: called with the state every `SAVE_EVERY` seconds, and whatever ends the search early (Ctrl-C too).
    """

    model: nn.Module
    samples: Samples
    line_up: Mapping[str, Stage]
    protocol: Protocol
    points: RowFile | None
    watch: Watch
    save: Callable[[SearchState], None]

    def run(self, state: SearchState) -> None:
        """Run the stages that the state has not seen yet on the samples that are still robust; update the state."""
        copies = self._copies()
        try:
            for place, (name, stage) in enumerate(self.line_up.items()):
                if place >= int(state.stage_under_way):
                    self._run_stage(name, stage, copies[stage.precision], state)
                    # In this order: a state that is saved in between repeats the stage, and never skips the next.
                    state.next_job.zero_()
                    state.stage_under_way += 1
        except BaseException:
            self.save(state)
            raise

    def _copies(self) -> dict[str, nn.Module]:
        """The optimised copies of the model that searches of each precision query."""
        few = self.samples.inputs(torch.arange(min(_COMPARED, len(self.samples)))).to(self.samples.device)
        copies = {"float32": optimised_copy(self.model, few)}
        if any(stage.precision == "bfloat16" for stage in self.line_up.values()):
            copies["bfloat16"] = optimised_copy(copies["float32"], few, "bfloat16")
        return copies

    def _run_stage(self, name: str, stage: Stage, copy: nn.Module, state: SearchState) -> None:
        """Run the stage under way; its attack searches on the optimised copy of the model."""
        place, began = int(state.stage_under_way), time.monotonic()
        before, saved = float(state.seconds[place]), began
        with lent(self.model):
            schedule = self._schedule(name, stage, copy, state)
            while schedule.busy:
                for ended in schedule.step():
                    left = self._verify(stage.attack, ended, state)
                    state.evaluations[ended.sample] += schedule.confirm(ended, left)
                now = time.monotonic()
                state.seconds[place] = before + now - began
                self.watch(state.adversarial, name, schedule.pending())
                if now - saved > SAVE_EVERY:
                    self.save(state)
                    saved = now

    def _schedule(self, name: str, stage: Stage, copy: nn.Module, state: SearchState) -> Schedule:
        """The jobs of a stage that are left: of samples that are to be attacked, those from the next one on."""
        samples, attack = self.samples, stage.attack
        jobs = len(jobs_of(attack, samples.classes))
        # The only point within radius 0 is the sample itself.
        wanted = samples.correct & (samples.eps > 0)
        if samples.bounded:
            wanted &= ~state.adversarial
        if stage.margin_threshold is not None:
            wanted &= state.max_probability_margin >= stage.margin_threshold
        state.next_job[~wanted] = jobs
        seed = fold(self.protocol.seed, name)
        ranked = samples.ranked_classes if attack.targets else None
        # The schedule counts `next_job` up in place, so that what it has done is saved with the state.
        due = DueJobs(lambda rows: samples.attack_inputs(rows, seed), state.next_job, jobs, ranked)
        options = {"batch_size": self.protocol.batch_size, "parallel_restarts": stage.parallel_restarts}
        return Schedule(copy, attack, due, **options)

    def _verify(self, attack: Attack[Any], ended: Jobs, state: SearchState) -> Tensor:
        """Check the points of jobs that ended and record those that are adversarial.

        Returns:
            (n,) bool, the samples that are to go on.
        """
        rows, samples, inputs = ended.sample, self.samples, ended.inputs
        points, y = attack.result(ended.state), inputs.y
        eps = samples.eps[rows].to(points.device)
        checked = check_points(self.model, inputs.x, y, points, eps, self.protocol.norm, self.protocol.box)
        adversarial = checked.adversarial.cpu()
        # At a temperature at which the probability margin can tell how far the search has come.
        clean = samples.logit_margin[rows].to(points.device)
        cooled = checked.logits / (clean / losses.SATURATED).clamp_min(1)[:, None]
        margin = losses.probability_margin_loss(cooled, y).where(checked.allowed, -1.0).float().cpu()
        state.max_probability_margin[rows] = torch.maximum(state.max_probability_margin[rows], margin)
        distance = checked.distance.cpu()
        better = adversarial & (distance < state.distance[rows])
        new = rows[better]
        if self.points is not None:
            self.points.write(new, points.cpu()[better])
        state.adversarial[new] = True
        state.stage[new], state.job[new] = state.stage_under_way, ended.job[better]
        state.step[new] = ended.state.iteration.cpu()[better]
        state.adversarial_prediction[new] = losses.predictions(checked.logits).cpu()[better]
        state.distance[new] = distance[better]
        return ~adversarial if samples.bounded else torch.ones_like(adversarial)
