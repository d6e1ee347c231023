"""The gated delta rule.

    S_t = (1 - beta_t k_t k_t^T) diag(e^g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale q_t S_t

The primitive behind DeltaNet (Yang et al. 2024), Gated DeltaNet, DeltaProduct and KDA. On a GPU it
has kernels of its own, ``kernels/delta`` and ``kernels/delta_backward``. On a CPU it is the sweep
of ``dplr`` with a single write: u_t = beta_t v_t + S_{t-1}^T a_t with a_t = -beta_t e^g_t k_t.
"""

from typing import Any

import torch
from torch import Tensor

from flacompile.ops import context
from flacompile.ops.define import define
from flacompile.ops.dplr import backward_cpu, forward_cpu, save
from flacompile.ops.dplr import decomposed as decomposed_dplr
from flacompile.ops.start import filled
from flacompile.ops.step import step
from flacompile.ops.validate import check_delta_rule

Triple = tuple[Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = scale q_t S_t, S_t the decayed state corrected at k_t towards v_t by beta_t.

    Under autocast all but g and the state are taken in the autocast dtype; sums are fp32 always.

    Args:
        q, k: [B, T, H, K], one floating dtype for q, k and v. The state stays bounded where
            beta |k|^2 <= 2: k is normalised as a rule.
        v: [B, T, H, V].
        g: natural-log decay, <= 0, fp32: [B, T, H] (one number a head), [B, T, H, K] or None.
        beta: [B, T, H], any floating dtype.
        scale: factor on the output; None is K^-0.5.
        state: the state before the first token, [N, H, K, V] fp32; None is zero. N is B, or the
            number of packed sequences.
        cu_seqlens: bounds of the packed sequences, [N + 1], int32 or int64, first 0, last T; then
            B is 1. Sequences may be empty.

    Returns:
        o [B, T, H, V] in the dtype of v, and the final state [N, H, K, V].

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the CPU also g > 0.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    check_delta_rule(q, k, v, g, beta, state, cu_seqlens)
    g, state, scale = filled(q, v, g, state, cu_seqlens, scale)
    if context.active():
        context.whole_sequences(cu_seqlens)
        values, start = context.with_identity(k, v, state)
        _, final, _ = _forward(q, k, values, g, beta, start, None, scale)
        left, transition = final.split((v.shape[3], k.shape[3]), -1)
        state = context.incoming(state, left, transition, torch.matmul)
    o, final, _ = _forward(q, k, v, g, beta, state, cu_seqlens, scale)
    return o, final


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of ``delta_rule``.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        g: [B, H], [B, H, K] or None.
        beta: [B, H].
        scale: factor on the output; None is K^-0.5.
        state: [B, H, K, V] fp32.

    Returns:
        o [B, H, V] in the dtype of v, and the new state.
    """
    g = g if g is None else g.to(state.dtype)
    write, erase = _write_and_erase(k, v, g, beta, state)
    o, state = step(q, k, write, g, None, erase, None, state, scale)
    return o.to(v.dtype), state


def _write_and_erase(
    k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """beta_t v_t and a_t = -beta_t e^g_t k_t in the dtype of the state: what dplr takes."""
    wide = beta.to(state.dtype)[..., None]
    erase = -wide * k
    return wide * v, erase if g is None else erase * _per_channel(g, k).exp()


def _per_channel(g: Tensor, k: Tensor) -> Tensor:
    return g if g.ndim == k.ndim else g[..., None]


def decomposed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    """The op as a fixed number of aten operations, for exporters; not for packed sequences."""
    write, a = _write_and_erase(k, v, g, beta, state)
    return decomposed_dplr(q, k, write, g, a, None, state, cu_seqlens, scale)


def delta_rule_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    """The op on a CPU."""
    write, a = _write_and_erase(k, v, g, beta, state)
    return forward_cpu(q, k, write, g, a, None, state, cu_seqlens, scale)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    from flacompile.ops.kernels import delta as kernels

    return kernels.delta_rule_forward(q, k, v, g, beta, state, cu_seqlens, scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    return q.new_empty(v.shape), state.new_empty(state.shape), q.new_empty(v.shape)


def delta_rule_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, u: Tensor, final: Tensor, do: Tensor, dfinal: Tensor,
) -> Six:  # fmt: skip
    """Gradients of every input of the op, on a CPU: those of dplr, through a and beta v."""
    wide = beta.to(state.dtype)[..., None]
    write, a = _write_and_erase(k, v, g, beta, state)
    dq, dk, dw, dg, da, _, dstate = backward_cpu(
        q, k, write, g, a, None, state, cu_seqlens, scale, u, final, do, dfinal
    )
    da_of_k = da if g is None else da * _per_channel(g, k).exp()
    dbeta = (dw * v).sum(-1) - (da_of_k * k).sum(-1)
    if g is not None:
        dg = dg + (a * da).sum(-1) if g.ndim == 3 else dg + a * da
    dk = dk - wide * da_of_k
    return dq, dk.to(k.dtype), (wide * dw).to(v.dtype), dg, dbeta.to(beta.dtype), dstate


def _backward_cuda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, u: Tensor, final: Tensor, do: Tensor, dfinal: Tensor,
) -> Six:  # fmt: skip
    from flacompile.ops.kernels import delta_backward as kernels

    dq, dk, dv, dg, dbeta, dstate = kernels.delta_rule_backward(
        q, k, v, g, beta, state, cu_seqlens, scale, u, do, dfinal
    )
    return dq, dk, dv, state.new_empty(0) if dg is None else dg, dbeta, dstate


def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, u: Tensor, final: Tensor, do: Tensor, dfinal: Tensor,
) -> Six:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        """The gradient of x; empty where there is no x."""
        return state.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(g), like(beta), like(state)


_forward = define(delta_rule_forward, _forward_cuda, _forward_fake)
_backward = define(delta_rule_backward, _backward_cuda, _backward_fake)


def _backward_of_op(ctx: Any, do: Tensor, dfinal: Tensor, du: Any) -> tuple[Tensor | None, ...]:
    *tensors, u, final = ctx.saved_tensors
    dq, dk, dv, dg, dbeta, dstate = _backward(*tensors, ctx.scale, u, final, do, dfinal)
    return dq, dk, dv, None if tensors[3] is None else dg, dbeta, dstate, None, None


def _flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of the recurrence, two each: S k and S q read, k u^T written."""
    batch, time, heads, key_dim = q
    return 6 * batch * time * heads * key_dim * v[-1]


_forward.differentiate(save, _backward_of_op, _flops)
