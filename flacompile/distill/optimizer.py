"""AdamW with rates of their own for the mixers and the rest, and how the rates go."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from flacompile.distill.recipe import Stage
from flacompile.passes.swap_attention import swapped


def make_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW over the mixers and, with a rate, the rest; the teacher's parameters never.

    Weight decay, if any, is of matrices: not of norms, biases and single numbers a head.
    """
    layers = swapped(model).values()
    mixers = {id(p) for layer in layers for p in layer.mixer.parameters()}
    originals = [layer.original for layer in layers if layer.original is not None]
    teachers = {id(p) for original in originals for p in original.parameters()}
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if id(parameter) in teachers:
            continue
        peak = stage.mixer_lr if id(parameter) in mixers else stage.rest_lr
        parameter.requires_grad_(peak > 0)
        decay = stage.weight_decay if parameter.ndim > 1 else 0.0
        if peak > 0:
            parts.setdefault((peak, decay), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": params, "peak": peak, "weight_decay": decay}
        for (peak, decay), params in parts.items()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def rate(share: float, stage: Stage) -> float:
    """Factor on the peak rate after a share of the stage's steps."""
    if share < stage.warmup:
        return share / stage.warmup
    begin = max(stage.warmup, 1 - stage.decay) if stage.schedule == "wsd" else stage.warmup
    done = max(0.0, share - begin) / max(1 - begin, 1e-12)
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "cosine":
        return stage.final + (1 - stage.final) * (1 + math.cos(math.pi * done)) / 2
    return 1 - (1 - stage.final) * done


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate is so much of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All that it moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]
