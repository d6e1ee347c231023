"""The backward of linear_attn by linear_attn itself, on a CPU or with two decays a channel.

linear_attn is closed under differentiation. With D_t the gradient of S_t,

    D_t  = scale q_t do_t^T + diag(e^gk_{t+1}) D_{t+1} diag(e^gv_{t+1})
    dq_t = scale S_t do_t            dk_t = D_t v_t            dv_t = D_t^T k_t
    dgk_t = dgk_{t+1} + q_t dq_t - k_t dk_t                    dgk_{T+1} = sum_v S_T dS_T
    dgv_t = dgv_{t+1} + o_t do_t - v_t dv_t                    dgv_{T+1} = sum_k S_T dS_T

so the backward is three calls of the forward, two of them back in time, and two sums. The sum for
gv runs over all tokens of o do - v dv, so o is taken anew, unrounded, where there is a gv.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Pairs = list[Pair]


def gradients(
    run: Callable[..., Pair], decay_gradient: Callable[..., Tensor],
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, final: Tensor, do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dgk, dgv, dstate; dgk and dgv are empty without g.

    Args:
        run: the recurrence, ``run(q, k, v, gk, gv, state, cu_seqlens, scale, reverse, dtype)``, o
            in that dtype.
        decay_gradient: the function below, or one that does the same.
        final: the state that the forward returned.
        do, dfinal: the gradients of what it returned.
    """
    wide = state.dtype  # what a decay's gradient sums is not rounded
    of_k, of_v = (wide if gk is not None else q.dtype), (wide if gv is not None else v.dtype)
    dq, _ = run(do, v, k, gv, gk, state.mT.contiguous(), cu_seqlens, scale, False, of_k)
    seed = dfinal / scale  # D / scale is the state of the two calls back in time
    dv, first = run(k, q, do, gk, gv, seed, cu_seqlens, scale, True, of_v)
    dk, _ = run(v, do, q, gv, gk, seed.mT.contiguous(), cu_seqlens, scale, True, of_k)
    dstate = first * scale
    for g, axis in ((gk, -1), (gv, -2)):
        if g is not None:
            dstate = dstate * _first_decay(g, cu_seqlens).unsqueeze(axis)
    end = final * dfinal
    dgk, dgv = end.new_empty(0), end.new_empty(0)  # an op's outputs must not be one tensor
    if gk is not None:
        dgk = decay_gradient([(q, dq)], [(k, dk)], end.sum(-1), gk, cu_seqlens)
    if gv is not None:
        o, _ = run(q, k, v, gk, gv, state, cu_seqlens, scale, False, wide)
        dgv = decay_gradient([(o, do)], [(v, dv)], end.sum(-2), gv, cu_seqlens)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dgk, dgv, dstate


def _first_decay(g: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """e^g of the first token of each sequence, [N, H, X or 1]; 1 for an empty sequence."""
    if g.ndim == 3:
        g = g[..., None]
    if cu_seqlens is None:
        return g[:, 0].exp() if g.shape[1] else torch.ones_like(g.sum(1))
    if not g.shape[1]:
        return g.new_ones(cu_seqlens.shape[0] - 1, *g.shape[2:])
    first, last = cu_seqlens[:-1], cu_seqlens[1:]
    decay = g[0, first.clamp(max=g.shape[1] - 1)].exp()
    return torch.where((first == last)[:, None, None], 1.0, decay)


def decay_gradient(
    plus: Pairs, minus: Pairs, end: Tensor, g: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """dg_t = dg_{t+1} + change_t back from dg_{T+1} = end, in every sequence.

    Args:
        plus, minus: pairs of [B, T, H, X] tensors; change is the sum of the products of plus, less
            that of minus.
        end: [N, H, X].
        g: [B, T, H] or [B, T, H, X]: a decay for all channels sums their gradients.
    """
    change = sum(x * dx for x, dx in plus) - sum(x * dx for x, dx in minus)
    if g.ndim == 3:
        change, end = change.sum(-1, keepdim=True), end.sum(-1, keepdim=True)
    # The terms cancel, so the sum is one of fp64. PyTorch's running sums over the last dim use all
    # of a GPU, over others they do not.
    total = change.double().movedim(1, -1).contiguous().cumsum(-1).movedim(-1, 1)
    if cu_seqlens is None:
        rest = total[:, -1:] - total + change if g.shape[1] else total
        dg = rest + end[:, None]
    else:
        time = torch.arange(g.shape[1], device=g.device)
        sequence = torch.searchsorted(cu_seqlens, time, right=True) - 1
        last = (cu_seqlens[1:] - 1)[sequence]
        dg = total[:, last] - total + change + end[sequence]
    return dg.reshape(g.shape).to(end.dtype).contiguous()
