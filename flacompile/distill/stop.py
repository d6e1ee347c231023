"""When a stage has learned enough, or no more."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flacompile.distill.recipe import Stage

MEMORY = 0.95  # of the mean loss, a step: about twenty steps


@dataclass
class Trend:
    """The mean loss of a stage so far, in plain numbers that a checkpoint holds.

    Attributes:
        weighted: sum of the losses, each ``MEMORY`` times less a step later.
        weight: the same sum of ones.
        steps: steps seen.
        best: the lowest mean so far.
        best_step: and when that was.
    """

    weighted: float = 0.0
    weight: float = 0.0
    steps: int = 0
    best: float = float("inf")
    best_step: int = 0

    @property
    def mean(self) -> float:
        """The loss over the last steps, later ones weighing more."""
        return self.weighted / self.weight

    def add(self, loss: float) -> dict[str, Any]:
        """After one more step; returns the numbers."""
        self.weighted = MEMORY * self.weighted + (1 - MEMORY) * loss
        self.weight = MEMORY * self.weight + (1 - MEMORY)
        self.steps += 1
        if self.mean < self.best:
            self.best, self.best_step = self.mean, self.steps
        return asdict(self)

    def ends(self, stage: Stage) -> str | None:
        """Why the stage ends before its steps are done, or None."""
        if self.steps < 1 / (1 - MEMORY):  # one lucky batch is no mean
            return None
        if stage.target_loss is not None and self.mean <= stage.target_loss:
            return f"mean loss {self.mean:.4g} reached target_loss {stage.target_loss:.4g}"
        waited = self.steps - self.best_step
        if stage.patience is not None and waited >= stage.patience:
            return f"mean loss has not fallen below {self.best:.4g} for {waited} steps"
        return None
