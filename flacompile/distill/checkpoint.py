"""Where a distillation stands, and the file that brings a new process there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flacompile.distill.log import read_json_lines, write_json_lines
from flacompile.distill.recipe import STAGES, Recipe
from flacompile.files import write_atomically
from flacompile.passes.swap_attention import student_state

PARTS = {"progress", "tokens", "recipe", "model", "optimizer"}
PROGRESS = ("stage", "step", "steps", "notes", "trend")


@dataclass
class Run:
    """Where a distillation stands; everything that a checkpoint must hold besides tensors.

    Attributes:
        out: folder of the log, the checkpoint and the report.
        tokens: what names the data (see ``Corpus.fingerprint``).
        stage: name of the stage in progress, or "done".
        step: steps of it that are done.
        steps: number of steps of each stage, once fixed.
        notes: figures measured before training.
        trend: of the loss in this stage (see ``stop.Trend``).
    """

    out: Path
    tokens: str
    stage: str = STAGES[0]
    step: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    trend: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.out / "log.jsonl"

    @property
    def file(self) -> Path:
        return self.out / "checkpoint.pt"

    def next_stage(self) -> None:
        """The stage in progress is over."""
        self.stage = (*STAGES, "done")[STAGES.index(self.stage) + 1]
        self.step, self.trend = 0, {}


def save(run: Run, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes ``run.file``: whole, or as it was."""
    state = {
        "progress": {name: getattr(run, name) for name in PROGRESS},
        "tokens": run.tokens,
        "recipe": asdict(recipe),
        "model": student_state(model),
        "optimizer": optimizer.state_dict(),
    }
    write_atomically(run.file, lambda temporary: torch.save(state, temporary))


def restore(run: Run, recipe: Recipe, model: nn.Module) -> dict[str, Any] | None:
    """Brings run and model to the checkpoint in ``run.out``; returns the optimizer's state.

    Raises:
        ValueError: the checkpoint is broken, of another recipe, other data or another model.
    """
    if not run.file.exists():
        return None
    state = _load(run.file)
    if state["recipe"] != asdict(recipe):
        raise ValueError(
            f"recipe: expected that of {run.file}, {state['recipe']}, got {asdict(recipe)}"
        )
    if state["tokens"] != run.tokens:
        raise ValueError(f"data: expected the tokens that {run.file} was trained on, got others")
    want = {k: tuple(v.shape) for k, v in student_state(model).items()}
    got = {k: tuple(v.shape) for k, v in state["model"].items()}
    if want != got:
        other = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
        raise ValueError(
            f"checkpoint: expected the tensors of this model, got another's in {run.file}; "
            f"the first that differs is {other[0]}"
        )
    model.load_state_dict(state["model"], strict=False)
    for name in PROGRESS:
        setattr(run, name, state["progress"][name])
    _forget_steps_after(run)
    return state["optimizer"]


def _load(path: Path) -> dict[str, Any]:
    """Reads what ``save`` wrote; a file that is not that is left as it is."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports a broken file by half a dozen types
        raise ValueError(
            f"checkpoint: expected a file written by flacompile.distill, got {path}, which does "
            f"not load ({type(error).__name__}: {str(error)[:200]}); move it away to start anew"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise ValueError(
            f"checkpoint: expected a file written by flacompile.distill, got {path}; move it away "
            "to start anew"
        )
    return state


def _forget_steps_after(run: Run) -> None:
    """Drops what a killed run logged after its last checkpoint, a torn line included."""
    done = {name: steps for name, steps in run.steps.items() if name != run.stage}
    done[run.stage] = run.step
    records = read_json_lines(run.log)
    write_json_lines(run.log, [r for r in records if r["step"] <= done.get(r["stage"], 0)])
