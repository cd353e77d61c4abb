"""The samples of an evaluation: what is known of each before any attack, and the table of what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import pandas as pd
import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses, margins
from wideberth.attacks import AttackInputs
from wideberth.checks import InputError
from wideberth.data import Readable, batches, collect, read
from wideberth.evaluation.evidence import as_bytes
from wideberth.evaluation.protocol import Protocol
from wideberth.randomness import Noise
from wideberth.verification import verification_mode


@dataclass(frozen=True)
class Samples:
    """N samples of a data set and what the model says about them; inputs stay where they are and are read when needed.

    Attributes:
        source: where the inputs are.
        device: of the model.
        classes: how many the model tells apart.
        position: (N,) int64, in the source.
        index: (N,) int64, what the source calls each sample: it names the sample's random stream.
        y: (N,) int64 labels.
        eps: (N,) float64 radii; infinite where minimum-norm attacks look for the smallest.
        prediction: (N,) int64, the class of the clean input.
        logit_margin: (N,) of the clean input.
        ranked_classes: (N, T) int64, the likeliest classes other than the label.
        clean_hash: (N,) int64, of the input's bytes.
        shape: of one input.
        dtype: of the inputs.
        measures: further columns of the table, (N,) each.
    """

    source: Readable
    device: torch.device
    classes: int
    position: Tensor
    index: Tensor
    y: Tensor
    eps: Tensor
    prediction: Tensor
    logit_margin: Tensor
    ranked_classes: Tensor
    clean_hash: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    measures: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def correct(self) -> Tensor:
        """(N,) bool, classified correctly as they are."""
        return self.logit_margin > 0

    @property
    def bounded(self) -> bool:
        """Whether there are radii to stay within, so that a sample is done with once it is adversarial."""
        return bool(torch.isfinite(self.eps).all())

    def unbounded(self) -> Samples:
        """The same samples with infinite radii, for the search of the smallest."""
        return replace(self, eps=torch.full_like(self.eps, float("inf")))

    def inputs(self, rows: Tensor) -> Tensor:
        """The clean inputs of these rows (B,), as (B, ...) on the CPU.

        Raises:
            InputError: where the source gives another input than it did before.
        """
        x = read(self.source, self.position[rows])[0].cpu()
        changed = (row_hashes(x) != self.clean_hash[rows]).nonzero().flatten()
        if len(changed):
            place = int(self.position[rows][changed[0]])
            raise InputError(
                f"data: sample {place} is not what it was when it was first read; must be the same each time, "
                "without random augmentation"
            )
        return x

    def attack_inputs(self, rows: Tensor, seed: int) -> AttackInputs:
        """What an attack needs to know of these rows (B,), on the model's device."""
        x = self.inputs(rows).to(self.device)
        noise = Noise(self.index[rows].to(self.device), seed)
        return AttackInputs(x, self.y[rows].to(self.device), geometry.per_sample(self.eps[rows].to(x.device), x), noise)


def row_hashes(x: Tensor) -> Tensor:
    """A hash of the bytes of each row of x (B, ...), (B,) int64."""
    rows = as_bytes(x).numpy()
    hashes = [int.from_bytes(blake2b(row.data, digest_size=8).digest(), "little", signed=True) for row in rows]
    return torch.tensor(hashes, dtype=torch.int64)


def read_samples(
    model: nn.Module, source: Readable, positions: Tensor, eps: Tensor, protocol: Protocol, device: torch.device
) -> Samples:
    """Read the samples at these positions (n,) once: check them, and record what the model says about each.

    Raises:
        InputError: for inputs, labels or logits that cannot be used.
    """
    first = first_classes = None

    def described(x: Tensor, y: Tensor, index: Tensor) -> dict[str, Tensor]:
        nonlocal first, first_classes
        checks.valid_inputs(x, protocol.box)
        first, hashes = x[:0].clone() if first is None else first, row_hashes(x)
        x, y = x.to(device), y.to(device)
        with verification_mode(model, x):
            logits = model(x)
        checks.valid_logits(logits, len(x))
        checks.valid_labels(y, len(x), logits.shape[1])
        first_classes = logits.shape[1] if first_classes is None else first_classes
        held = _described(logits.cpu(), y.cpu(), protocol.most_targets(first_classes))
        held |= {"y": y, "index": index, "clean_hash": hashes}
        if protocol.margin:
            held["effective_margin"], held["effective_weight_norm"], _ = margins.measure(model, x, y, protocol.norm)
        return held

    known = collect((described(*batch) for batch in batches(source, positions, protocol.batch_size)), len(positions))
    if first is None or first_classes is None:
        raise InputError("data: holds no samples")
    return Samples(
        source=source,
        device=device,
        classes=first_classes,
        position=positions,
        index=known["index"],
        y=known["y"],
        eps=eps,
        prediction=known["prediction"],
        logit_margin=known["logit_margin"],
        ranked_classes=known["ranked_classes"],
        clean_hash=known["clean_hash"],
        shape=tuple(first.shape[1:]),
        dtype=first.dtype,
        measures={name: known[name] for name in ("effective_margin", "effective_weight_norm") if name in known},
    )


def _described(logits: Tensor, y: Tensor, targets: int) -> dict[str, Tensor]:
    """What is kept of logits (B, K): nothing that grows with K."""
    # A copy: the slice would hold on to all K ranks.
    ranked = (
        losses.likeliest(logits, y)[:, :targets].clone() if targets else torch.zeros((len(y), 0), dtype=torch.int64)
    )
    return {
        "prediction": losses.predictions(logits),
        "logit_margin": losses.logit_margin(logits, y),
        "ranked_classes": ranked,
    }


def sample_table(samples: Samples, columns: Mapping[str, Tensor], attacks: Sequence[str]) -> pd.DataFrame:
    """One row per sample.

    Args:
        samples: N samples.
        columns: what the search found, (N,) each: adversarial, stage, job, step, adversarial_prediction, distance,
            max_probability_margin, evaluations, and maybe radius.
        attacks: names of the stages.
    """
    correct, adversarial = samples.correct, columns["adversarial"]
    table = {
        "position": samples.position,
        "index": samples.index,
        "label": samples.y,
        "eps": samples.eps,
        "clean_prediction": samples.prediction,
        "adversarial_prediction": columns["adversarial_prediction"],
        "clean_correct": correct,
        "robust": correct & ~adversarial,
        "logit_margin": samples.logit_margin,
        "distance": torch.where(adversarial, columns["distance"], torch.where(correct, float("nan"), 0.0)),
        "max_probability_margin": torch.where(correct, columns["max_probability_margin"], float("nan")),
        "evaluations": columns["evaluations"],
        **samples.measures,
    }
    if "radius" in columns:
        table["radius"] = torch.where(correct, columns["radius"], 0.0)
    frame = pd.DataFrame({name: value.numpy() for name, value in table.items()})
    names = [attacks[stage] if stage >= 0 else "" for stage in columns["stage"].tolist()]
    frame["attack"] = [name if right else "clean" for name, right in zip(names, correct.tolist(), strict=True)]
    for name in ("job", "step"):
        frame[name] = pd.array(columns[name].tolist(), dtype="Int64")
        frame.loc[~adversarial.numpy(), name] = pd.NA
    return frame
