"""Decay and scale of each head from the teacher's statistics, in closed form.

A head that looks back d tokens on average gets a decay whose weights have that mean; then, with
what every head adds to the output held fixed, the scales that bring the layer's output nearest to
the teacher's are a least-squares problem of H unknowns. Neutral gates with unit scales are one of
the candidates, so the result is never worse than them on the calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flacompile.layers import Mixer

STRETCH = (1.0, 2.0, 4.0)  # candidate half-lives, in units of ln 2 times the mean look-back
ROWS = 128  # queries whose attention weights are held at once


@torch.no_grad()
def relative_error(mixer: Mixer, x: Tensor, y: Tensor) -> float:
    """||mixer(x) - y||^2 / ||y||^2, in fp32."""
    got = mixer(x)[0]
    return ((got.float() - y.float()).square().sum() / y.float().square().sum()).item()


@torch.no_grad()
def calibrate(
    mixer: Any, attention: Mapping[str, Tensor], scale: float, x: Tensor, y: Tensor
) -> float:
    """Sets half-lives (where the mixer has them) and head scales; returns the error it reaches.

    Args:
        mixer: a linear mixer that holds the attention's weights; changed in place.
        attention: its "queries" [B, H, T, K] and "keys" [B, H_kv, T, K] on x.
        scale: the attention's factor on q k.
        x: the attention's inputs, [B, T, D].
        y: its outputs, [B, T, D].
    """
    neutral = {k: v.clone() for k, v in mixer.state_dict().items()}
    best, best_error = neutral, relative_error(mixer, x, y)
    candidates: list[Tensor | None] = [None]
    if hasattr(mixer, "set_half_life"):
        distance = look_back(attention["queries"], attention["keys"], scale).clamp_min(1.0)
        candidates += [distance * math.log(2) * stretch for stretch in STRETCH]
    for half_life in candidates:
        mixer.load_state_dict(neutral)
        if half_life is not None:
            mixer.set_half_life(half_life)
        mixer.scale_heads(head_scales(mixer, x, y))
        error = relative_error(mixer, x, y)
        if error < best_error:
            best, best_error = {k: v.clone() for k, v in mixer.state_dict().items()}, error
    mixer.load_state_dict(best)
    return best_error


def look_back(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Mean distance in tokens that each head looks back, [H]; no [T, T] map is held.

    Args:
        q: [B, H, T, K].
        k: [B, H_kv, T, K].
        scale: factor on q k.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    time = torch.arange(q.shape[2], device=q.device)
    total = q.new_zeros(q.shape[1], dtype=torch.float32)
    for rows, queries in zip(time.split(ROWS), q.split(ROWS, 2), strict=True):
        age = rows[:, None] - time
        scores = (queries @ k.mT).float() * scale
        weights = scores.masked_fill(age < 0, -torch.inf).softmax(-1)
        total += (weights * age).sum((0, 2, 3))
    return total / (q.shape[0] * q.shape[2])


def head_scales(mixer: Any, x: Tensor, y: Tensor) -> Tensor:
    """argmin over s [H] of ||sum_h s_h o_h - y||^2, with o_h what head h adds to the output."""
    seen: list[Tensor] = []
    hook = mixer.output_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        mixer(x)
    finally:
        hook.remove()
    heads = mixer.output_heads
    mixed = seen[0].flatten(0, 1).unflatten(-1, (heads, -1)).double()  # [B T, H, V]
    layer = mixer.output_layer
    weight = layer.weight.double().unflatten(1, (heads, -1))  # [D, H, V]
    bias = 0.0 if layer.bias is None else layer.bias.double()
    outputs = torch.einsum("thv,dhv->thd", mixed, weight)
    target = y.flatten(0, 1).double() - bias
    gram = torch.einsum("thd,tgd->hg", outputs, outputs)
    right = torch.einsum("thd,td->h", outputs, target)
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(heads, dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, right + ridge.diagonal())
