"""The verdict on a set of samples: attacks in order, each on what is still unbroken; every success seen again.

What is known so far is a `Ledger`: tensors with one row per sample, written to disk now and then, so that an
interrupted evaluation goes on from there to the verdict that it would have reached (runs under way begin anew, and
repeat what they did: their noise is theirs).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wideberth import geometry, losses
from wideberth.acceleration import optimised_copy
from wideberth.attacks.base import Attack
from wideberth.attacks.restarts import jobs_of
from wideberth.attacks.schedule import Jobs, Schedule
from wideberth.attacks.state import AttackInputs
from wideberth.attacks.suites import Stage
from wideberth.checks import Box, InputError, Norm
from wideberth.evaluation.verify import TOLERANCE, inside, judging
from wideberth.modes import lent
from wideberth.randomness import Noise, fold
from wideberth.runs import write_atomically

_COMPARED = 64
"""Samples on which a copy of the model must say what the model says."""


@dataclass
class Ledger:
    """What is known of each of N samples.

    Attributes:
        broken: (N,) bool, by an attack.
        stage: (N,) int64, the attack that broke it, in the order of the line-up; -1 where none did.
        run: (N,) int64, the run of that attack (see `Attack.runs`).
        step: (N,) int64, the step of that run.
        found: (N, ...) the adversarial point, where there is one; else the input.
        predicted: (N,) int64, the class there (of the clean input where it is not broken).
        distance: (N,) float64, of that point; infinite where there is none.
        closest: (N,) the largest probability margin loss that was seen at the end of a run; where the sample itself
            leads by more than `losses.SATURATED` logits, of logits divided until it leads by no more.
        evaluations: (N,) int64, forwards and backwards spent.
        due: (N,) int64, the run of the stage under way that comes next.
        seconds: (stages,) spent so far.
        under_way: () int64, the stage.
    """

    broken: Tensor
    stage: Tensor
    run: Tensor
    step: Tensor
    found: Tensor
    predicted: Tensor
    distance: Tensor
    closest: Tensor
    evaluations: Tensor
    due: Tensor
    seconds: Tensor
    under_way: Tensor

    @classmethod
    def empty(cls, x: Tensor, predicted: Tensor, stages: int) -> Ledger:
        """Before the first attack."""
        none = torch.zeros(len(x), dtype=torch.int64)
        return cls(
            broken=none.bool(),
            stage=none - 1,
            run=none.clone(),
            step=none.clone(),
            found=x.clone(),
            predicted=predicted.clone(),
            distance=torch.full((len(x),), float("inf"), dtype=torch.float64),
            closest=torch.full((len(x),), -1.0),
            evaluations=none + 1,
            due=none.clone(),
            seconds=torch.zeros(stages, dtype=torch.float64),
            under_way=torch.zeros((), dtype=torch.int64),
        )

    def take(self, far: Ledger, eps: float) -> Tensor:
        """Enter what a search without a radius broke within `eps`; returns each sample's smallest radius known, (N,).

        A point broken at a smaller radius is broken at every larger one, so that verdict and curve agree.
        """
        stages = len(self.seconds)
        new = ~self.broken & (far.distance <= eps * (1 + TOLERANCE))
        for name in ("broken", "stage", "run", "step", "found", "predicted", "distance"):
            mine, other = getattr(self, name), getattr(far, name)
            mine[new] = other[new] + stages if name == "stage" else other[new]
        self.closest = torch.maximum(self.closest, far.closest.where(new, torch.tensor(-1.0)))
        self.evaluations += far.evaluations - 1  # both counted the clean forward
        self.seconds = torch.cat([self.seconds, far.seconds])
        return torch.minimum(self.distance, far.distance)

    def save(self, path: Path, about: str) -> None:
        """Write all of it, atomically; `about` says which evaluation it belongs to."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        write_atomically(path, lambda file: save_file(tensors, file, {"about": about}))

    @classmethod
    def load(cls, path: Path, about: str) -> Ledger:
        """Read what `save` wrote.

        Raises:
            InputError: where it belongs to another evaluation, or cannot be read.
        """
        try:
            with safe_open(path, "pt") as file:
                told = (file.metadata() or {}).get("about")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        except Exception as error:
            raise InputError(f"{str(path)!r}: cannot be read as a state to resume ({error}); delete it") from error
        if told != about:
            raise InputError(
                f"{str(path)!r}: is the state of another evaluation (of another model, data, eps, suite or seed); "
                "delete it to begin anew"
            )
        return cls(**tensors)


@dataclass(frozen=True)
class Case:
    """What is judged.

    Attributes:
        model: in any mode; lent.
        x: (N, ...) all samples, where they are stored.
        y: (N,) labels.
        index: (N,) what names each sample's random stream.
        logits: (N, K) of the clean inputs.
        eps: the radius; infinite: minimum-norm attacks look for the smallest.
        norm: "linf", "l2" or "l1".
        box: of the inputs.
        seed: of all randomness.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor
    logits: Tensor
    eps: float
    norm: Norm
    box: Box
    seed: int

    @property
    def bounded(self) -> bool:
        """Whether there is a radius to stay within, and a sample is done with once it is broken."""
        return math.isfinite(self.eps)

    def about(self, stages: Mapping[str, Stage]) -> str:
        """A fingerprint of model, samples and line-up: two evaluations that share it reach the same verdict."""
        parts = sha256()
        for tensor in (*self.model.state_dict().values(), self.x, self.y, self.index):
            parts.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        parts.update(repr((self.eps, self.norm, self.box, self.seed, dict(stages))).encode())
        return parts.hexdigest()


Watch: TypeAlias = Callable[["Ledger", str, int], None]
"""Told after every round: the ledger, the stage's name, and an upper bound of the row-steps that it has left."""


def search(
    case: Case,
    stages: Mapping[str, Stage],
    ledger: Ledger,
    *,
    batch_size: int,
    watch: Watch | None = None,
    save: Callable[[Ledger], None] | None = None,
    save_every: float = 120.0,
) -> Ledger:
    """Run the stages that the ledger has not seen yet on the samples that are still unbroken; returns the ledger.

    Whatever ends it early (Ctrl-C too), what is known is saved first.
    """
    device = next((p.device for p in case.model.parameters()), case.x.device)
    few = case.x[:_COMPARED].to(device)
    asked = {"float32": optimised_copy(case.model, few)}
    if any(stage.precision == "bfloat16" for stage in stages.values()):
        asked["bfloat16"] = optimised_copy(asked["float32"], few, "bfloat16")
    try:
        for place, (name, stage) in enumerate(stages.items()):
            if place < int(ledger.under_way):
                continue
            _run_stage(case, asked[stage.precision], place, name, stage, ledger, batch_size, watch, save, save_every)
            ledger.under_way += 1
            ledger.due.zero_()
    except BaseException:
        if save is not None:
            save(ledger)
        raise
    return ledger


def _run_stage(
    case: Case,
    asked: nn.Module,
    place: int,
    name: str,
    stage: Stage,
    ledger: Ledger,
    batch_size: int,
    watch: Watch | None,
    save: Callable[[Ledger], None] | None,
    save_every: float,
) -> None:
    attack, began, before = stage.attack, time.monotonic(), float(ledger.seconds[place])
    correct = ~losses.misclassified(case.logits, case.y)
    jobs = len(jobs_of(attack, case.logits.shape[1]))
    wanted = correct & ~ledger.broken if case.bounded else correct.clone()
    if stage.margin_threshold is not None:
        wanted &= ledger.closest >= stage.margin_threshold
    ledger.due[~wanted] = jobs
    eps = geometry.per_sample(case.eps, case.x)
    inputs = AttackInputs(case.x, case.y, eps, Noise(case.index, fold(case.seed, name)))
    likely = losses.likeliest(case.logits, case.y) if attack.targets else None
    saved = began
    with lent(case.model):
        device = next((p.device for p in case.model.parameters()), case.x.device)
        schedule = Schedule(
            asked,
            attack,
            lambda rows: inputs.rows(rows).to(device),
            ledger.due,  # shared: what the schedule counts up is what is saved
            jobs=jobs,
            batch_size=batch_size,
            ranked=likely,
            parallel_restarts=stage.parallel_restarts,
        )
        while schedule.busy:
            for left in schedule.step():
                held = _judge(case, place, attack, ledger, left)
                ledger.evaluations[left.sample] += schedule.confirm(left, held)
            now = time.monotonic()
            ledger.seconds[place] = before + now - began
            if watch is not None:
                watch(ledger, name, schedule.pending())
            if save is not None and now - saved > save_every:
                save(ledger)
                saved = now


def _judge(case: Case, place: int, attack: Attack, ledger: Ledger, left: Jobs) -> Tensor:
    """See again what the runs that have ended offer; enter it, and return which are to go on, (n,) bool."""
    rows = left.sample
    points = attack.result(left.state)
    x, y = case.x[rows].to(points.device), case.y[rows].to(points.device)
    with judging(case.model, points):
        logits = case.model(points)
    allowed = inside(x, points, case.eps, case.norm, case.box)
    wrong = (allowed & losses.misclassified(logits, y)).cpu()
    # At a temperature at which the probability margin can tell how far the search has come.
    clean = losses.logit_margin(case.logits[rows].to(logits.device), y)
    cooled = logits / (clean / losses.SATURATED).clamp_min(1)[:, None]
    approach = losses.probability_margin_loss(cooled, y).where(allowed, -1.0).float().cpu()
    ledger.closest[rows] = torch.maximum(ledger.closest[rows], approach)
    distance = geometry.norm(points.double() - x.double(), case.norm).cpu()
    better = wrong & (distance < ledger.distance[rows])
    won = rows[better]
    ledger.broken[won] = True
    ledger.stage[won], ledger.run[won] = place, left.job[better]
    ledger.step[won] = left.state.iteration.cpu()[better]
    ledger.found[won] = points.cpu()[better].to(ledger.found.dtype)
    ledger.predicted[won] = losses.predictions(logits).cpu()[better]
    ledger.distance[won] = distance[better]
    return ~wrong if case.bounded else torch.ones_like(wrong)
