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
        q, k: [B, T, G, K], each group for H / G heads.
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
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
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


def quadratic_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 0.5),
    eps: float = 1e-12,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Means of v under weights of second order, w(a) = c0 + c1 a + c2 a² with a = q_t·k_s.

    S_t = e^gk_t S_{t-1} + φ(k_t) (v_t, 1)^T,   (o, z) = ψ(q_t) S_t,   o_t = o / (z + eps)

    ψ(x) is x_i² for every channel, x_i x_{i+j} for j = 1, 2, .. with indices modulo K, each product
    once, and if c0 or c1 is not zero x and 1; φ counts them c2, 2 c2, c1 and c0 times.

    Args:
        q, k, v: as in `linear_attn`.
        gk: natural-log decay, [B, T, H]; default none.
        weights: c0, c1, c2.
        eps: added to the sum of the weights.
        state: [B, H, F, V + 1]; default zero.
        mask: [B, T], φ(k_t) = 0 where it is false.
    """
    (c0, c1, c2), K = weights, q.shape[-1]
    both = [(i, (i + j) % K) for j in range(K // 2 + 1) for i in range(K)][: K * (K + 1) // 2]
    i, j = zip(*both, strict=True)
    psi, phi = q[..., i] * q[..., j], k[..., i] * k[..., j] * c2
    phi = torch.cat([phi[..., :K], 2 * phi[..., K:]], -1)
    if c0 or c1:
        psi = torch.cat([psi, q, torch.ones_like(q[..., :1])], -1)
        phi = torch.cat([phi, c1 * k, c0 * torch.ones_like(q[..., :1])], -1)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    phi = phi if mask is None else phi * mask[:, :, None, None]
    o, S = linear_attn(psi, phi, v, gk, None, 1.0, state)
    return o[..., :-1] / (o[..., -1:] + eps), S


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule.

    S = diag(e^g_t) S_{t-1},   S_t = S + beta_t k_t (v_t - k_t S)^T,   o_t = scale * q_t S_t

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        g: natural-log decay, [B, T, H] or [B, T, H, K]; default none.
        beta: [B, T, H].
        scale, state: as in `linear_attn`.

    Returns:
        o [B, T, H, V] and the final state [B, H, K, V].
    """
    q, k, beta = (x.to(torch.promote_types(q.dtype, torch.float32)) for x in (q, k, beta))
    b = beta.unsqueeze(-1) * k
    a = -_per_channel(g, q).exp() * k
    return dplr(q, b, v, g, a, b, scale, state)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A transition that is diagonal plus low rank.

    S_t = (diag(e^g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T,   o_t = scale * q_t S_t

    Args:
        q, k, a, b: [B, T, H, K].
        v: [B, T, H, V].
        g: natural-log decay, [B, T, H] or [B, T, H, K]; default none.
        scale, state: as in `linear_attn`.

    Returns:
        o [B, T, H, V] and the final state [B, H, K, V].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, a, b = (x.to(dtype) for x in (q, k, v, a, b))
    g = _per_channel(g, q)
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(dtype)
    o = [v.new_zeros(B, H, v.shape[-1])] * T
    for t in range(T):
        u = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        S = g[:, t, :, :, None].exp() * S + b[:, t, :, :, None] * u[:, :, None]
        S = S + k[:, t, :, :, None] * v[:, t, :, None]
        o[t] = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    o = torch.stack(o, 1) if T else torch.zeros_like(v)
    return o * (K**-0.5 if scale is None else scale), S


def scan(g: Tensor, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = e^g_t h_{t-1} + x_t for every channel: g, x [B, T, D], state [B, D]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype) if state is None else state.to(dtype)
    out = []
    for g_t, x_t in zip(g.to(dtype).unbind(1), x.to(dtype).unbind(1), strict=True):
        h = g_t.exp() * h + x_t
        out.append(h)
    return torch.stack(out, 1) if out else x.to(dtype), h


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = e^(dt_t A) h_{t-1} + dt_t u_t B_t^T,   y_t = h_t C_t.

    Args:
        u, dt: [B, T, D].
        A: [D, N], < 0.
        B, C: [B, T, G, N], each group for D / G channels.
        state: [B, D, N]; default zero.

    Returns:
        y [B, T, D] and the final state.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, dt, A, B, C = (x.to(dtype) for x in (u, dt, A, B, C))
    B, C = (x.repeat_interleave(u.shape[2] // x.shape[2], 2) for x in (B, C))  # [B, T, D, N]
    h = u.new_zeros(u.shape[0], *A.shape) if state is None else state.to(dtype)
    y = []
    for t in range(u.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt * u)[:, t, :, None] * B[:, t]
        y.append((h * C[:, t]).sum(-1))
    return torch.stack(y, 1) if y else torch.zeros_like(u), h


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_i weight[:, i] x_{t - W + 1 + i}, a filter of W taps for every channel.

    Args:
        x: [B, T, C].
        weight: [C, W], the last tap is that of the current token.
        bias: [C].
        state: the W - 1 inputs before the first, [B, W - 1, C]; default zero.

    Returns:
        y [B, T, C] and the last W - 1 inputs.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    W, T = weight.shape[1], x.shape[1]
    past = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if state is None else state.to(x.dtype)
    x = torch.cat((past, x), 1)
    y = sum(x[:, i : i + T].to(dtype) * weight[:, i].to(dtype) for i in range(W))
    return y if bias is None else y + bias.to(dtype), x[:, T:]
