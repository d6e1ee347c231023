"""Triton kernel of one token: the state is read once and written once.

u = S^T a        S' = diag(e^gk) S diag(e^gv) + b u^T + k v^T        o = scale S'^T q

Grid: one program a (sequence, head, block of BV value channels). Columns of the state do not meet,
so that a program needs no other. A state of more rows than BK is walked in blocks of rows, and with
a twice: the second time it is in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.tiles import _load_row, _load_state, _store_state

WIDTH = 32  # value channels of a program: 128 bytes of a row of the state
ROWS = 256  # of a state that registers hold


@triton.jit
def _kernel(
    q, k, v, gk, gv, a, b, state, o, after, scale, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """GK and GV are how many decays a head has on either side: 1, or K and V.

    SHARE heads in a row have one q and k.
    """
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    NV: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // NV).to(tl.int64)
    here = head >= 0
    vv = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    v_t = _load_row(v, head, here, vv, V)

    u = tl.zeros([BV], tl.float32)
    if a is not None:
        for first in range(0, K, BK):
            kk = first + tl.arange(0, BK)
            a_t = _load_row(a, head, here, kk, K)
            u += tl.sum(_load_state(state, head, kk, vv, K, V) * a_t[:, None], 0)
    if b is None:
        v_t += u

    o_t = tl.zeros([BV], tl.float32)
    for first in range(0, K, BK):
        kk = first + tl.arange(0, BK)
        S = _load_state(state, head, kk, vv, K, V)
        if gk is not None:
            S *= tl.exp(_load_row(gk, head, here, kk if GK > 1 else kk * 0, GK))[:, None]
        if gv is not None:
            S *= tl.exp(_load_row(gv, head, here, vv if GV > 1 else vv * 0, GV))[None, :]
        if b is not None:
            S += _load_row(b, head, here, kk, K)[:, None] * u[None, :]
        S += _load_row(k, head // SHARE, here, kk, K)[:, None] * v_t[None, :]
        o_t += tl.sum(S * _load_row(q, head // SHARE, here, kk, K)[:, None], 0)
        _store_state(S, after, head, kk, vv, K, V)
    tl.store(o + head * V + vv, (scale * o_t).to(o.dtype.element_ty), mask=vv < V)


def tiles(K: int, V: int) -> dict[str, int]:
    """Rows and columns of the state that a program holds."""
    BK, BV = min(ROWS, triton.next_power_of_2(K)), min(WIDTH, triton.next_power_of_2(V))
    return {"BK": BK, "BV": BV, "num_warps": 4}


def step(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, a: Tensor | None,
    b: Tensor | None, state: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, H, V] in the dtype of v, and the next state.

    Args:
        q, k: [B, G, K], each for H / G heads.
        a, b: [B, H, K]; without b, u is written at k.
        v: [B, H, V].
        gk, gv: natural-log decays, [B, H], or [B, H, K] and [B, H, V].
        state: [B, H, K, V] fp32.
        scale: factor of the output.
    """
    (B, H, V), K = v.shape, q.shape[-1]
    inputs = [x if x is None else x.contiguous() for x in (q, k, v, gk, gv, a, b, state)]
    o, after = v.new_empty(B, H, V), state.new_empty(B, H, K, V)
    meta = {"SHARE": H // q.shape[1], **tiles(K, V)}
    meta |= {
        f"G{side}": 1 if g is None or g.ndim == 2 else g.shape[2]
        for side, g in (("K", gk), ("V", gv))
    }
    grid = (B * H * triton.cdiv(V, meta["BV"]),)
    launch(_kernel, grid, *inputs, o, after, scale, K=K, V=V, **meta)
    return o, after
