"""The search for adversarial points: it runs the stages of an evaluation in order and verifies every point they find.

A stage is one attack of the suite together with the conditions under which it runs. A job is one restart of that
attack, at one target, on one sample. With radii, each stage runs only on samples for which no earlier stage has found
an adversarial point.

The results so far are a `SearchState`, which is written to disk at intervals. An interrupted evaluation continues from
it and reaches the same verdict as without the interruption: jobs that were running begin again and give the same
result, because their noise depends only on the sample and the job.
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
"""Seconds between two saves of the state."""
_COMPARED = 64
"""The number of samples on which an optimised copy of the model must agree with the model."""
_NOT_PER_SAMPLE = ("seconds", "stage_under_way")
"""The fields of `SearchState` that do not have one value per sample."""


@dataclass
class SearchState:
    """The results of the search so far, for N samples.

    Attributes:
        adversarial: (N,) bool, whether a verified adversarial point was found.
        stage: (N,) int64, the position in the line-up of the stage that found the point; -1 if there is no point.
        job: (N,) int64, the number of the job that found the point, among the jobs of its stage on that sample.
        step: (N,) int64, the iteration that this job had reached when it ended.
        adversarial_prediction: (N,) int64, the predicted class of the point; of the clean input if there is no point.
        distance: (N,) float64, the distance of the point from the clean input; infinite if there is no point.
        max_probability_margin: (N,) the largest probability margin loss at the end of a job, -1 before the first. If
            the clean logit margin m of a sample exceeds `losses.SATURATED`, its logits are first divided by
            m / `losses.SATURATED`.
        evaluations: (N,) int64, the number of forwards and backwards, including the forward at the clean input.
        next_job: (N,) int64, the next job of the current stage.
        seconds: (stages,) float64, the time spent on each stage.
        stage_under_way: () int64, the position of the current stage in the line-up.
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
        """Return the state before the first stage; `prediction` (N,) is the class of each clean input."""
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
        """Return the fields that have one value per sample, each (N,)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_PER_SAMPLE}

    def add_unbounded(self, unbounded: SearchState, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Add the adversarial points within eps (N,) that a search without a radius found for other samples.

        A point within a smaller radius is also within every larger radius. Adding these points makes the verdict agree
        with the curve of robust accuracy over the radius.

        Returns:
            The samples whose point was added, (N,) bool, and the smallest known adversarial distance of each sample,
            (N,) float64.
        """
        stages = len(self.seconds)
        new = ~self.adversarial & (unbounded.distance <= eps * (1 + TOLERANCE))
        for name in ("adversarial", "stage", "job", "step", "adversarial_prediction", "distance"):
            own, added = getattr(self, name), getattr(unbounded, name)
            # The stages of the other search are appended to the stages of this one.
            own[new] = added[new] + stages if name == "stage" else added[new]
        margin = unbounded.max_probability_margin.where(new, torch.tensor(-1.0))
        self.max_probability_margin = torch.maximum(self.max_probability_margin, margin)
        self.evaluations += unbounded.evaluations - 1  # both counted the clean forward
        self.seconds = torch.cat([self.seconds, unbounded.seconds])
        return new, torch.minimum(self.distance, unbounded.distance)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the state to `path` atomically; `fingerprint` identifies the evaluation that it belongs to."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}

        def write(file: Path) -> None:
            save_file(tensors, file, {"fingerprint": fingerprint} | checksums.UNSEALED)
            checksums.seal(file)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> SearchState:
        """Read a state that `save` wrote.

        Raises:
            InputError: if the state belongs to a different evaluation, or cannot be read.
        """
        try:
            if not checksums.sound(path):
                raise ValueError("its content does not match the checksum in its header")
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("fingerprint")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dictionary)
            state = cls(**tensors) if found == fingerprint else None
        except Exception as error:
            raise InputError(
                f"{str(path)!r}: cannot be read as a state to resume ({error}); delete it to begin anew"
            ) from error
        if state is None:
            raise InputError(
                f"{str(path)!r}: the state belongs to a different evaluation (a different model, data, eps, suite or "
                "seed); delete it to begin anew"
            )
        return state


@dataclass(frozen=True)
class Search:
    """The stages of a line-up on N samples.

    Attributes:
        model: the model under evaluation, in any mode; its modes and flags are restored after the search.
        samples: the samples. With infinite radii (`Samples.unbounded`), minimum-norm attacks search for the smallest
            perturbation.
        line_up: the stages by name, in order.
        protocol: norm, box, seed and batch size.
        points: the file for the adversarial points, row i for sample i; None: the points are not kept.
        watch: called after every step, to show the progress.
        save: called with the state every `SAVE_EVERY` seconds, and when an exception ends the search (including
            Ctrl-C).
    """

    model: nn.Module
    samples: Samples
    line_up: Mapping[str, Stage]
    protocol: Protocol
    points: RowFile | None
    watch: Watch
    save: Callable[[SearchState], None]

    def run(self, state: SearchState) -> None:
        """Run the stages that the state does not record as finished, and update the state in place."""
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
        """Return an optimised copy of the model for each precision of the line-up, by the name of the precision."""
        compared = self.samples.inputs(torch.arange(min(_COMPARED, len(self.samples)))).to(self.samples.device)
        copies = {"float32": optimised_copy(self.model, compared)}
        if any(stage.precision == "bfloat16" for stage in self.line_up.values()):
            copies["bfloat16"] = optimised_copy(copies["float32"], compared, "bfloat16")
        return copies

    def _run_stage(self, name: str, stage: Stage, copy: nn.Module, state: SearchState) -> None:
        """Run the current stage: the attack queries `copy`, and the points are verified on the model itself."""
        position, start_time = int(state.stage_under_way), time.monotonic()
        earlier_seconds, save_time = float(state.seconds[position]), start_time
        with lent(self.model):
            schedule = self._schedule(name, stage, copy, state)
            while schedule.busy:
                for ended in schedule.step():
                    unfinished = self._verify(stage.attack, ended, state)
                    # `confirm` returns the numbers of evaluations of the jobs that are complete; 0 for the others.
                    state.evaluations[ended.sample] += schedule.confirm(ended, unfinished)
                now = time.monotonic()
                state.seconds[position] = earlier_seconds + now - start_time
                self.watch(state.adversarial, name, schedule.pending())
                if now - save_time > SAVE_EVERY:
                    self.save(state)
                    save_time = now

    def _schedule(self, name: str, stage: Stage, copy: nn.Module, state: SearchState) -> Schedule:
        """Return the schedule of the remaining jobs of a stage, on the samples that satisfy its conditions."""
        samples, attack = self.samples, stage.attack
        jobs = len(jobs_of(attack, samples.classes))
        # Within radius 0 the only point is the clean input, which is classified correctly.
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
        """Verify the points of n jobs that ended, and record the adversarial ones in `state`.

        Returns:
            (n,) bool, the samples on which the search continues: with radii, those whose point is not adversarial;
            without, all samples.
        """
        rows, samples, inputs = ended.sample, self.samples, ended.inputs
        points, y = attack.result(ended.state), inputs.y
        eps = samples.eps[rows].to(points.device)
        checked = check_points(self.model, inputs.x, y, points, eps, self.protocol.norm, self.protocol.box)
        adversarial = checked.adversarial.cpu()
        # Divide the logits by a temperature, so that the probability margin does not saturate.
        clean_margin = samples.logit_margin[rows].to(points.device)
        scaled_logits = checked.logits / (clean_margin / losses.SATURATED).clamp_min(1)[:, None]
        margin = losses.probability_margin_loss(scaled_logits, y).where(checked.allowed, -1.0).float().cpu()
        state.max_probability_margin[rows] = torch.maximum(state.max_probability_margin[rows], margin)
        distance = checked.distance.cpu()
        closer = adversarial & (distance < state.distance[rows])
        closer_rows = rows[closer]
        if self.points is not None:
            self.points.write(closer_rows, points.cpu()[closer])
        state.adversarial[closer_rows] = True
        state.stage[closer_rows], state.job[closer_rows] = state.stage_under_way, ended.job[closer]
        state.step[closer_rows] = ended.state.iteration.cpu()[closer]
        state.adversarial_prediction[closer_rows] = losses.predictions(checked.logits).cpu()[closer]
        state.distance[closer_rows] = distance[closer]
        return ~adversarial if samples.bounded else torch.ones_like(adversarial)
