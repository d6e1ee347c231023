"""Prefixes of decayed sums with a fixed number of tensor operations: what CPU forms are built of.

A state that follows ``s_i = e^{g_i} s_{i-1} + z_i`` is a lower-triangular matrix of decays times
the z: ``s_i = sum_{j <= i} e^{g_{j+1} + ... + g_i} z_j``. The exponents are summed directly, never
as a difference of running sums, so a strong decay anywhere costs no precision elsewhere, and none
is positive.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FANOUT = 16  # entries that one level of the tree folds into one


def segment_sums(g: Tensor) -> Tensor:
    """Sums of every segment of the last axis: out[..., i, j] = g_{j+1} + ... + g_i.

    Args:
        g: log decays, [..., n].

    Returns:
        [..., n, n]; -inf where j > i, 0 on the diagonal.
    """
    n = g.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device=g.device).tril()
    terms = g[..., :, None].expand(*g.shape, n).masked_fill(~lower.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)


def decayed_prefix(z: Tensor, g: Tensor, start: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The state before every entry, and after the last one.

    ``s_i = e^{g_i} s_{i-1} + z_i`` with ``s_{-1} = start``. Each level folds FANOUT entries into
    one by one small triangular matrix; the top is one [n, n] matrix.

    Args:
        z: what each entry adds, [..., n, Y].
        g: log decay of each entry, [..., n], <= 0.
        start: [..., Y].
        levels: how many folds before the dense top.

    Returns:
        states before each entry [..., n, Y], state after the last [..., Y].
    """
    if levels == 0:
        z = torch.cat([start[..., None, :], z], dim=-2)
        states = segment_sums(F.pad(g, (1, 0))).exp() @ z
        return states[..., :-1, :], states[..., -1, :]
    n = g.shape[-1]
    folds = (n + FANOUT - 1) // FANOUT
    short = folds * FANOUT - n
    z = F.pad(z, (0, 0, 0, short)).unflatten(-2, (folds, FANOUT))
    g = F.pad(g, (0, short)).unflatten(-1, (folds, FANOUT))
    inside = segment_sums(g).exp() @ z  # [..., folds, FANOUT, Y]
    before, last = decayed_prefix(inside[..., -1, :], g.sum(-1), start, levels - 1)
    # decay from the fold's start to before entry i
    reach = F.pad(g[..., :-1], (1, 0)).cumsum(-1).exp()
    states = F.pad(inside[..., :-1, :], (0, 0, 1, 0)) + reach[..., None] * before[..., None, :]
    return states.flatten(-3, -2)[..., :n, :], last
