"""Where an evaluation keeps what it knows, so that another process can go on from there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wideberth.checks import InputError
from wideberth.evaluation import shards
from wideberth.evaluation.evidence import RowFile
from wideberth.evaluation.search import SearchState


def beyond(path: Path) -> Path:
    """Beside the state of a search within radii, the one of the search for the smallest radii."""
    return path.with_name(f"{path.name}.radii")


@dataclass(frozen=True)
class StateFile:
    """A search's state on disk, each process's own, and the adversarial points beside it.

    Attributes:
        path: what the user calls it.
        fingerprint: of the evaluation that it belongs to.
    """

    path: Path
    fingerprint: str = ""

    @property
    def state_path(self) -> Path:
        """This process's file: it searches its own share of the samples."""
        return shards.own(self.path)

    @property
    def points_path(self) -> Path:
        """This process's adversarial points."""
        return self.state_path.with_name(f"{self.state_path.name}.points")

    def load(self, evidence: bool) -> SearchState | None:
        """The state that was saved, or None where there is none; points without a state are removed.

        Raises:
            InputError: where the state belongs to another evaluation, cannot be read or lacks its points.
        """
        if not self.state_path.exists():
            self.remove()
            return None
        state = SearchState.load(self.state_path, self.fingerprint)
        if evidence and not self.points_path.exists():
            name = self.points_path.name
            raise InputError(f"{str(self.state_path)!r}: {name} is missing beside it; delete the state to begin anew")
        return state

    def save(self, state: SearchState, points: RowFile | None) -> None:
        """Write the state, the points that it counts on first."""
        if points is not None:
            points.flush()
        state.save(self.state_path, self.fingerprint)

    def remove(self) -> None:
        """Remove both files."""
        for path in (self.state_path, self.points_path):
            path.unlink(missing_ok=True)
