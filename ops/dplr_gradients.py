"""The forward and the backward of dplr and delta_rule on a CPU, each in sweeps over time.

A sweep goes forward, or with ``reverse`` from the last token to the first:

    u_t = S_{t-1}^T a_t + c_t                    D_t = S_{t+1} + k_t v_t^T
    S_t = diag(e^g_t) S_{t-1}                    u_t = D_t^T a_t + c_t        o_t = D_t^T q_t
          + b_t u_t^T + k_t v_t^T                S_t = diag(e^g_t) D_t + b_t u_t^T
    o_t = S_t^T q_t

The first is dplr. With D_t the gradient of its S_t, w_t = D_t^T b_t that of u_t and
dv_t = D_t^T k_t, what D hands to the token before is diag(e^g_t) D_t + a_t w_t^T: the second, with
the writes (q_t, do_t) and (a_t, w_t). With u and w known, S is a linear_attn state with the writes
(b, u) and (k, v), D one back in time with (q_t, do_t) and (a_{t+1}, w_{t+1}):

    dq_t = S_t do_t        da_t = S_{t-1} w_t        dk_t = D_t v_t        db_t = D_t u_t
    dg_t = dg_{t+1} + q_t dq_t + a_{t+1} da_{t+1} - b_t db_t - k_t dk_t

and dg_{T+1} = sum_v S_T dS_T. Without b there is one write: c = v, b = k, and no k and v.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.ops.closed_backward import decay_gradient

Sweep = Callable[..., tuple[Tensor, Any, Tensor]]
Read = Callable[..., list[Tensor]]


def forward(
    sweep: Sweep, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor | None,
    state: Tensor, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the final state and u."""
    if b is None:
        u, o, final = sweep(a, k, q, None, None, v, g, state, cu_seqlens, scale, False)
    else:
        u, o, final = sweep(a, b, q, k, v, None, g, state, cu_seqlens, scale, False)
    return o, final, u


def gradients(
    sweep: Sweep, read: Read,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor | None,
    state: Tensor, cu_seqlens: Tensor | None, scale: float,
    u: Tensor, final: Tensor, do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dg, da, db, dstate; dg and db are empty without g and b.

    Args:
        sweep: ``sweep(a, b, q, k, v, c, g, state, cu_seqlens, scale, reverse)``.
        read: ``read(queries, writes, g, state, cu_seqlens, reverse)``, S_t x_t [B, T, H, K] of
            each query x [B, T, H, V], S the decayed sum of k v^T over the writes (k, v); reverse as
            in ``linear_attn``: position t takes the decay of t + 1.
        u, final: what the forward returned.
        do, dfinal: gradients of o and of the final state.
    """
    seed = dfinal / scale  # every gradient is linear in do and dfinal: all here are 1 / scale of it
    read_k, write = (None, k) if b is None else (k, b)
    w, dv, dstate = sweep(write, a, read_k, q, do, None, g, seed, cu_seqlens, 1.0, True)
    next_a, next_w = _next(a, cu_seqlens), _next(w, cu_seqlens)
    into_s = [(k, u)] if b is None else [(k, v), (b, u)]
    into_d = [(q, do), (next_a, next_w)]
    values = [value for _, value in into_s]
    dq, next_da = read([do, next_w], into_s, g, state, cu_seqlens, False)
    dk, *rest = read(values, into_d, g, seed, cu_seqlens, True)
    da = _previous(next_da, _at_first(w, state, cu_seqlens), cu_seqlens)
    dg, db = dstate.new_empty(0), dstate.new_empty(0)  # an op's outputs must not be one tensor
    minus = [(k, dk)]
    if b is not None:
        minus.append((b, rest[0]))
        db = (scale * rest[0]).to(b.dtype)
    if g is not None:
        plus, end = [(q, dq), (next_a, next_da)], (final * seed).sum(-1)
        dg = scale * decay_gradient(plus, minus, end, g, cu_seqlens)
    dv = w if dv is None else dv
    dq, dk, dv, da = (
        (scale * x).to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v), (da, a))
    )
    return dq, dk, dv, dg, da, db, scale * dstate


def by_early_reads(
    sweep: Sweep, a: Tensor, b: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor | None,
    c: Tensor | None, g: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, scale: float,
    reverse: bool,
) -> tuple[Tensor, Any, Tensor]:  # fmt: skip
    """A sweep by one that reads a and q before the decay and both writes, in either direction."""
    if reverse:
        assert k is not None and v is not None
        seen = _dot(a, k, state) * v
        u, o, final = sweep(
            a, b, q, _decayed(k, g), v, seen if c is None else seen + c, g, state, cu_seqlens, True
        )
        return u, None if q is None else scale * (o + _dot(q, k, state) * v), final
    u, o, final = sweep(
        a, b, None if q is None else _decayed(q, g), k, v, c, g, state, cu_seqlens, False
    )
    if q is not None:
        o = o + _dot(q, b, u) * u
        o = scale * (o if k is None else o + _dot(q, k, u) * v)
    return u, o, final


def _decayed(q: Tensor, g: Tensor | None) -> Tensor:
    if g is None:
        return q
    return q.to(g.dtype) * (g if g.ndim == 4 else g[..., None]).exp()


def _dot(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    return (x.to(like.dtype) * y.to(like.dtype)).sum(-1, keepdim=True)


def _is_first(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token of a pack [T]: the number of its sequence, and whether it begins one."""
    time = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(cu_seqlens, time, right=True) - 1
    return sequence, cu_seqlens[sequence] == time


def _next(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x_{t+1} of the same sequence, 0 at its end: [B, T, H, X]."""
    if cu_seqlens is not None:
        x = torch.where(_is_first(x, cu_seqlens)[1][:, None, None], 0.0, x)
    return F.pad(x[:, 1:], (0, 0, 0, 0, 0, min(x.shape[1], 1)))


def _previous(x: Tensor, first: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x_{t-1} of the same sequence, ``first`` [N, H, X] at its start: [B, T, H, X]."""
    if cu_seqlens is None:
        return torch.cat([first[:, None][:, : x.shape[1]], x[:, :-1]], 1)
    sequence, is_first = _is_first(x, cu_seqlens)
    return torch.where(is_first[:, None, None], first[sequence], x.roll(1, 1))


def _at_first(w: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """S_0 w_1 of each sequence, [N, H, K]; anything for an empty one."""
    if not w.shape[1]:
        return state[..., 0]
    first = w[:, 0] if cu_seqlens is None else w[0, cu_seqlens[:-1].clamp(max=w.shape[1] - 1)]
    return (state @ first.to(state.dtype)[..., None])[..., 0]
