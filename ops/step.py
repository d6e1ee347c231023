"""One token of a state [K, V]: what the steps of linear_attn, delta_rule and dplr have in common.

    u = S^T a        S' = diag(e^gk) S diag(e^gv) + b u^T + k v^T        o = scale S'^T q

In plain PyTorch, which compilers fuse and exporters know. On a GPU, where no gradient is wanted, a
kernel that reads and writes the state once.
"""

import torch
from torch import Tensor

from flacompile.ops.define import Op, define_cuda, needs_grad, on_plain_cuda
from flacompile.ops.heads import repeat_heads

Pair = tuple[Tensor, Tensor]


def step(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, a: Tensor | None,
    b: Tensor | None, state: Tensor, scale: float | None,
) -> Pair:  # fmt: skip
    """o and the next state.

    Args:
        q, k: [B, H, K], or [B, G, K], each for H / G heads.
        a, b: [B, H, K]. Without a there is no u, without b it is written at k.
        v: [B, H, V].
        gk, gv: natural-log decays, [B, H], or [B, H, K] and [B, H, V].
        state: [B, H, K, V] fp32.
        scale: factor on the output; None is K^-0.5.

    Returns:
        o [B, H, V] in the dtype of v, and the next state.
    """
    args = (q, k, v, gk, gv, a, b, state, q.shape[-1] ** -0.5 if scale is None else scale)
    by_kernel = state.dtype == torch.float32 and on_plain_cuda(args) and not needs_grad(args)
    return _by_kernel(*args) if by_kernel else _plain(*args)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, a: Tensor | None,
    b: Tensor | None, state: Tensor, scale: float,
) -> Pair:  # fmt: skip
    q, k = (repeat_heads(x[:, None], v.shape[1])[:, 0] for x in (q, k))
    q, k, values = (x.to(state.dtype)[..., None, :] for x in (q, k, v))  # rows
    u = None if a is None else a.to(state.dtype)[..., None, :] @ state
    if gk is not None:
        state = state * gk.to(state.dtype).exp().reshape(*q.shape[:2], -1, 1)
    if gv is not None:
        state = state * gv.to(state.dtype).exp().reshape(*q.shape[:2], 1, -1)
    if u is not None and b is None:
        values = values + u
    elif u is not None and b is not None:
        state = state + b.to(state.dtype)[..., None] * u
    state = state + k.mT * values
    return (scale * (q @ state)[..., 0, :]).to(v.dtype), state


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, a: Tensor | None,
    b: Tensor | None, state: Tensor, scale: float,
) -> Pair:  # fmt: skip
    from flacompile.ops.kernels import step as kernels

    return kernels.step(q, k, v, gk, gv, a, b, state, scale)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, a: Tensor | None,
    b: Tensor | None, state: Tensor, scale: float,
) -> Pair:  # fmt: skip
    return v.new_empty(v.shape), state.new_empty(state.shape)


_by_kernel = Op(define_cuda("step", _cuda, _fake), _cuda)
