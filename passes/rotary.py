"""Rotary embedding out of values: the linear map from a projection to the queries, probed.

Between projection and attention there are only linear operators, so unit vectors say all: at
position t the pair (i, j) of a head goes through factor * [[cos, -sin], [sin, cos]](t * freq_i).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .sites import RotarySite
from .walk import NotProvable


def rotary_from_maps(
    maps: Tensor, candidates: Iterable[Tensor], factors: Iterable[float], tolerance: float
) -> RotarySite | None:
    """The rotation in maps [K_in, T, K_out], None if there is none.

    Args:
        candidates: tensors of the graph that may be the frequencies; the one that agrees with the
            measured ones is taken as it is, being more precise.
        factors: numbers of the graph that may be the attention factor, used likewise.
        tolerance: relative, that of the model's number type.
    """
    maps = maps.double().cpu()
    partners = _partners(maps)
    if not partners:
        return None
    offset = max(abs(i - j) for i, j in partners)
    interleaved = offset == 1 and len(partners) > 2
    pairs = max(i for i, _ in partners) // 2 + 1 if interleaved else offset
    first = [2 * i if interleaved else i for i in range(pairs)]
    if any(i not in first or j != i + offset for i, j in partners if i < j):
        raise NotProvable("dims of a head are mixed in pairs that are no known rotary embedding")
    cos = torch.stack([maps[i, :, i] for i in first])  # [pairs, T]
    sin = torch.stack([maps[i, :, i + offset] for i in first])
    factor = float((cos**2 + sin**2).sqrt()[:, 1].mean())
    near = [f for f in (1.0, *factors) if abs(f / factor - 1) < tolerance]
    factor = min(near, key=lambda f: abs(f / factor - 1), default=factor)
    inv_freq = _best(_frequencies(torch.atan2(sin, cos)), candidates, tolerance)
    return RotarySite(tuple(inv_freq.tolist()), interleaved, factor)


def _partners(maps: Tensor) -> set[tuple[int, int]]:
    """Pairs (in, out) of different dims with a weight at any position."""
    weight = maps.abs().amax(1)
    weight.fill_diagonal_(0)
    return {(int(i), int(j)) for i, j in weight.nonzero()}


def _frequencies(angle: Tensor) -> Tensor:
    """Frequencies from angles [pairs, T]: each doubling of t makes the estimate more precise."""
    freq, t = angle[:, 1], 2
    while t < angle.shape[1]:
        turns = ((freq * t - angle[:, t]) / (2 * math.pi)).round()
        freq = (angle[:, t] + 2 * math.pi * turns) / t
        t *= 2
    return freq


def _best(measured: Tensor, candidates: Iterable[Tensor], tolerance: float) -> Tensor:
    """A candidate or a power law that agrees with the measured frequencies, else these."""
    flat = [c.detach().double().cpu().flatten() for c in candidates]
    close = [c for c in [*flat, *_power_laws(measured)] if _agree(c, measured, tolerance)]
    return close[0] if close else measured


def _power_laws(measured: Tensor) -> list[Tensor]:
    """base^(-i/n) with a whole base, the usual choice, where the measured ones suggest it."""
    n = len(measured)
    if n < 2 or not bool((measured > 0).all()) or abs(float(measured[0]) - 1) > 1e-2:
        return []
    base = round(float(measured[-1]) ** (-n / (n - 1)))
    return [(base ** (-torch.arange(n, dtype=torch.float64) / n)).float().double()]


def _agree(candidate: Tensor, measured: Tensor, tolerance: float) -> bool:
    return candidate.shape == measured.shape and torch.allclose(
        candidate, measured, rtol=tolerance, atol=1e-9
    )
