"""Where a distillation stands, and the folder that brings new processes there, however many.

torch.distributed.checkpoint is imported where it is used: it takes half a second.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from flacompile.distill import processes
from flacompile.distill.log import read_json_lines, write_json_lines
from flacompile.distill.recipe import STAGES, Recipe
from flacompile.passes.swap_attention import student_state

T = TypeVar("T")
RUN = "run.pt"  # beside the tensors, in the folder of a checkpoint
PARTS = {"progress", "tokens", "recipe"}
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
        """A line of JSON for every step."""
        return self.out / "log.jsonl"

    @property
    def folder(self) -> Path:
        """The checkpoint of this stage and step."""
        stage = (*STAGES, "done").index(self.stage)
        return self.out / f"checkpoint-{stage}-{self.step:07}"

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are there, the last one last: most often one."""
        return sorted(self.out.glob("checkpoint-?-???????"))

    def next_stage(self) -> None:
        """The stage in progress is over."""
        self.stage = (*STAGES, "done")[STAGES.index(self.stage) + 1]
        self.step, self.trend = 0, {}


def save(run: Run, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes ``run.folder``, whole, and then removes those before it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    partial, before = run.out / ".checkpoint.partial", run.checkpoints
    if processes.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    processes.wait()
    tensors = {
        "model": student_state(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    with _alone_or_not() as alone:
        dcp.save(tensors, checkpoint_id=partial, no_dist=alone)
    if processes.rank() == 0:
        progress = {name: getattr(run, name) for name in PROGRESS}
        state = {"progress": progress, "tokens": run.tokens, "recipe": asdict(recipe)}
        torch.save(state, partial / RUN)
        os.replace(partial, run.folder)
        for folder in before:
            shutil.rmtree(folder)
    processes.wait()


def restore(run: Run, recipe: Recipe, model: nn.Module) -> bool:
    """Brings run and model to the last checkpoint in ``run.out``, if there is one.

    Raises:
        ValueError: the checkpoint is broken, of another recipe, other data or another model.
    """
    import torch.distributed.checkpoint as dcp

    if not run.checkpoints:
        return False
    folder = run.checkpoints[-1]
    state = _readable(folder, lambda: torch.load(folder / RUN, weights_only=True))
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise ValueError(_message(folder))
    if state["recipe"] != asdict(recipe):
        raise ValueError(
            f"recipe: expected that of {folder}, {state['recipe']}, got {asdict(recipe)}; "
            "take another folder to start anew"
        )
    if state["tokens"] != run.tokens:
        raise ValueError(
            f"data: expected the tokens that {folder} was trained on, got others; take another "
            "folder to start anew"
        )
    found = _readable(folder, lambda: dcp.FileSystemReader(folder).read_metadata())
    sizes = {k: tuple(getattr(v, "size", ())) for k, v in found.state_dict_metadata.items()}
    got = {k[6:]: size for k, size in sizes.items() if k.startswith("model.")}
    want = {k: tuple(v.shape) for k, v in student_state(model).items()}
    if want != got:
        other = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
        raise ValueError(
            f"checkpoint: expected the tensors of this model, got another's in {folder}; "
            f"the first that differs is {other[0]}"
        )
    _load({"model": student_state(model)}, folder)
    for name in PROGRESS:
        setattr(run, name, state["progress"][name])
    if processes.rank() == 0:
        _forget_steps_after(run)
    return True


def restore_optimizer(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Brings the optimizer to the checkpoint that ``restore`` brought the model to."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    folder, state = run.checkpoints[-1], get_optimizer_state_dict(model, optimizer)
    _load({"optimizer": state}, folder)
    set_optimizer_state_dict(model, optimizer, state)


def _load(state: dict[str, Any], folder: Path) -> None:
    """Into the tensors of a state, whatever their parts are."""
    import torch.distributed.checkpoint as dcp

    with _alone_or_not() as alone:
        _readable(folder, lambda: dcp.load(state, checkpoint_id=folder, no_dist=alone))


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether this is the only process, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield processes.size() == 1


def _readable(folder: Path, read: Callable[[], T]) -> T:
    """What ``read`` gives; a folder that cannot be read is left as it is."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        return read()
    except (Exception, CheckpointException) as error:  # broken files: half a dozen types
        why = f"({type(error).__name__}: {str(error)[:200]})"
        raise ValueError(f"{_message(folder)} {why}") from error


def _message(folder: Path) -> str:
    return (
        f"checkpoint: expected a folder written by flacompile.distill, got {folder}, which does "
        "not load; move it away to start anew"
    )


def _forget_steps_after(run: Run) -> None:
    """Drops what a killed run logged after its last checkpoint, a torn line included."""
    done = {name: steps for name, steps in run.steps.items() if name != run.stage}
    done[run.stage] = run.step
    records = read_json_lines(run.log)
    write_json_lines(run.log, [r for r in records if r["step"] <= done.get(r["stage"], 0)])
