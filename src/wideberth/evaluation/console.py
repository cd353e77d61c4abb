"""The progress of an evaluation in a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

_REDRAW_SECONDS = 0.2


def progress_bar(shown: bool) -> Progress:
    """A bar on standard error; one that draws nothing unless it is to be `shown`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)


class Watch:
    """Shows the progress of a stage with the accuracies known so far: an upper bound that only falls.

    Args:
        bar: where it is shown.
        correct: (N,) bool, the samples classified correctly.
    """

    def __init__(self, bar: Progress, correct: Tensor) -> None:
        self.bar, self.name, self.shown, self.most = bar, "", 0.0, 0
        self.clean = float(correct.double().mean())
        self.task = bar.add_task(f"clean {self.clean:.1%}", total=None)

    def __call__(self, adversarial: Tensor, name: str, pending: int) -> None:
        """Show what is known after a step of the stage `name`.

        Args:
            adversarial: (N,) bool, the samples found adversarial so far.
            name: of the stage.
            pending: an upper bound on the steps times rows that are left.
        """
        if name != self.name:
            self.name, self.most = name, pending
            self.bar.reset(self.task)
        now = time.monotonic()
        if now - self.shown < _REDRAW_SECONDS and pending:
            return
        self.shown = now
        robust = self.clean - float(adversarial.double().mean())
        text = f"{name}: clean {self.clean:.1%}, robust at most {robust:.1%}"
        self.most = max(self.most, pending)
        self.bar.update(self.task, total=self.most, completed=self.most - pending, description=text)
