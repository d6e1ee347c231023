"""Each recurrence as a token loop: the definition of truth, which no other code is imported into.

Computed in the dtype of `q`, at least fp32: pass float64 to get a reference. Differentiable by
autograd in every tensor argument. Nothing here is meant to be fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_channel(g: Tensor | None, q: Tensor) -> Tensor:
    """A log decay as [B, T, H, 1] or [B, T, H, K]; no decay is zero."""
    if g is None:
        return q.new_zeros(()).expand(*q.shape[:3], 1)
    if g.ndim == 3:
        g = g.unsqueeze(-1)
    return g.to(q.dtype).expand(*q.shape[:3], -1)


def linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay on both sides of the state.

    S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t v_t^T,   o_t = scale * q_t S_t

    With `reverse`, time runs backwards and position t takes the decay of position t + 1:
    D_t = diag(e^gk_{t+1}) D_{t+1} diag(e^gv_{t+1}) + k_t v_t^T, none at the last position.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        gk: natural-log decay of the key dim, [B, T, H], or broadcastable to [B, T, H, K].
        gv: natural-log decay of the value dim, [B, T, H], or broadcastable to [B, T, H, V].
        scale: default K^-0.5.
        state: the state before the first token taken, [B, H, K, V]; default zero.
        reverse: run from the last token to the first.

    Returns:
        o [B, T, H, V] and the state after the last token taken [B, H, K, V].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    gk, gv = _per_channel(gk, q), _per_channel(gv, q)
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(dtype)
    if reverse:
        gk, gv = (F.pad(g[:, 1:], (0, 0, 0, 0, 0, min(T, 1))) for g in (gk, gv))  # g_{t+1}
    o = [v.new_zeros(B, H, v.shape[-1])] * T
    for t in reversed(range(T)) if reverse else range(T):
        S = gk[:, t, :, :, None].exp() * S * gv[:, t, :, None, :].exp()
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o[t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    o = torch.stack(o, 1) if T else torch.zeros_like(v)
    return o * (K**-0.5 if scale is None else scale), S
