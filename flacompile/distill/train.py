"""The loop that all stages share: rows, gradients, a step of the optimizer, what is left behind."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from flacompile.data.reader import Reader
from flacompile.distill import checkpoint, processes
from flacompile.distill.checkpoint import Run
from flacompile.distill.log import Log
from flacompile.distill.optimizer import parameters, rate, set_rates
from flacompile.distill.recipe import Recipe
from flacompile.distill.stages import Objective
from flacompile.distill.stop import Trend

PROBE = 3  # steps after which a stage with a time limit knows its number of steps
SLOWER = 0.9  # the share of that number below which a machine that slowed down shortens the stage


def fit(
    run: Run,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    reader: Reader,
    objective: Objective,
    *,
    events: Path | None = None,
) -> None:
    """Runs the rest of ``run.stage``.

    Args:
        reader: of the training rows.
        objective: leaves the gradients of one batch.
        events: folder for TensorBoard, or None.
    """
    stage, trend = recipe.stages[run.stage], Trend(**run.trend)
    device = next(model.parameters()).device
    total = run.steps.setdefault(run.stage, stage.steps)
    first, size = run.step, reader.batch_size * reader.sequence_length
    log = Log(run.log, run.stage, run.step, total, size, events)
    try:
        while run.step < run.steps[run.stage]:
            share = (run.step + 1) / run.steps[run.stage]
            set_rates(optimizer, rate(share, stage))
            loss = gradients(objective, reader, run.step, device)
            if not math.isfinite(loss):
                raise ValueError(
                    f"{run.stage}: expected a finite loss, got {loss} at step {run.step}; lower "
                    "mixer_lr or rest_lr"
                )
            limit = stage.clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(parameters(optimizer), limit)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            run.trend = trend.add(loss)
            norm = processes.whole(norm).item()
            figures = {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "norm": norm}
            log.step(run.step, run.steps[run.stage], figures, device)
            if stage.minutes and run.step - first >= PROBE:
                left = stage.minutes * 60 - log.trained
                fits = run.step + processes.of_the_first(max(0, int(left / log.seconds_per_step)))
                if run.step == PROBE or fits < SLOWER * run.steps[run.stage]:
                    run.steps[run.stage] = min(run.steps[run.stage], fits)
            if reason := trend.ends(stage):
                run.steps[run.stage], run.notes[f"{run.stage} ended"] = run.step, reason
            if run.step % recipe.checkpoint_every == 0 or run.step == run.steps[run.stage]:
                checkpoint.save(run, recipe, model, optimizer)
    finally:
        log.close()


def gradients(objective: Objective, reader: Reader, step: int, device: torch.device) -> float:
    """Adds up the gradients of a step's batches; returns the mean loss of all processes."""
    batches = reader.batches(step)
    share = 1 / (len(batches) * processes.size())
    losses = [objective(batch.to(device), share) for batch in batches]
    return processes.mean(torch.stack(losses).mean()).item()
