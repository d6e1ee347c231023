"""The loop that both stages share: schedule, progress, log, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flacompile.distill import checkpoint, data
from flacompile.distill.recipe import Recipe, Stage
from flacompile.passes.swap_attention import student_state

PROBE = 3  # steps after which a stage with a time limit knows its number of steps
SLOWER = 0.9  # the share of that number below which a machine that slowed down shortens the stage


@dataclass
class Run:
    """Where a distillation stands; everything that a checkpoint must hold besides tensors.

    Attributes:
        out: folder of the log, the checkpoint and the report.
        stage: name of the stage in progress, or "done".
        step: steps of it that are done.
        steps: number of steps of each stage, once fixed.
        notes: figures measured before training.
        tokens: what names the data (see ``data.fingerprint``).
    """

    out: Path
    tokens: str
    stage: str = "align"
    step: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.out / "log.jsonl"

    @property
    def file(self) -> Path:
        return self.out / "checkpoint.pt"


def learning_rate(share: float, warmup: float) -> float:
    """Factor on the peak rate after a share of the steps: linear up, cosine down to a tenth."""
    if share < warmup:
        return share / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (share - warmup) / (1 - warmup))


def save(run: Run, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    progress = {"stage": run.stage, "step": run.step, "steps": run.steps, "notes": run.notes}
    checkpoint.save(
        run.file,
        {
            "progress": progress,
            "tokens": run.tokens,
            "recipe": asdict(recipe),
            "model": student_state(model),
            "optimizer": optimizer.state_dict(),
        },
    )


def restore(run: Run, recipe: Recipe, model: nn.Module) -> dict[str, Any] | None:
    """Brings run and model to the checkpoint in ``run.out``; returns the optimizer's state.

    Raises:
        ValueError: the checkpoint is broken, of another recipe, other data or another model.
    """
    if not run.file.exists():
        return None
    state = checkpoint.load(run.file)
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
    for name in ("stage", "step", "steps", "notes"):
        setattr(run, name, state["progress"][name])
    _forget_steps_after(run)
    return state["optimizer"]


def _forget_steps_after(run: Run) -> None:
    """Drops what a killed run logged after its last checkpoint, a torn line included."""
    done = {name: steps for name, steps in run.steps.items() if name != run.stage}
    done[run.stage] = run.step
    records = checkpoint.read_json_lines(run.log)
    checkpoint.write_json_lines(
        run.log, [r for r in records if r["step"] <= done.get(r["stage"], 0)]
    )


def fit(
    run: Run,
    recipe: Recipe,
    stage: Stage,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    objective: Callable[[Tensor], float],
) -> None:
    """Runs the rest of ``run.stage``.

    Args:
        tokens: the training stream, [n].
        objective: takes rows [B, T], leaves gradients, returns the loss.
    """
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    total = run.steps.setdefault(run.stage, stage.steps)
    began, first, size = time.perf_counter(), run.step, recipe.batch_size * recipe.sequence_length
    with tqdm(total=total, initial=run.step, desc=run.stage, unit="step") as bar:
        while run.step < run.steps[run.stage]:
            rate = learning_rate((run.step + 1) / run.steps[run.stage], stage.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            ids = data.batch(
                tokens, run.step, recipe.batch_size, recipe.sequence_length,
                recipe.seed + (run.stage == "logits"),
            )  # fmt: skip
            loss = objective(ids.to(device))
            if not math.isfinite(loss):
                raise ValueError(
                    f"{run.stage}: expected a finite loss, got {loss} at step {run.step}; lower "
                    "mixer_lr or rest_lr"
                )
            torch.nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]], 1.0
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            elapsed = time.perf_counter() - began
            speed = (run.step - first) * size / elapsed
            if stage.minutes and run.step - first >= PROBE:
                left = (stage.minutes * 60 - elapsed) * (run.step - first) / elapsed
                fits = run.step + max(0, int(left))
                if run.step == PROBE or fits < SLOWER * run.steps[run.stage]:
                    run.steps[run.stage] = bar.total = min(run.steps[run.stage], fits)
            bar.set_postfix(loss=f"{loss:.4f}", tokens_per_s=f"{speed:.0f}", refresh=False)
            bar.update()
            record = {"stage": run.stage, "step": run.step, "loss": loss}
            checkpoint.append_json(run.log, record | {"tokens_per_s": round(speed, 1)})
            if run.step % recipe.checkpoint_every == 0 or run.step == run.steps[run.stage]:
                save(run, recipe, model, optimizer)
