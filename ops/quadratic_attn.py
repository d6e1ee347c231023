"""Attention whose weights are polynomials of second order: the primitive of Based and ReBased.

    w_ts = e^(gk_{s+1} + .. + gk_t) (c0 + c1 a + c2 a²)      a = q_t·k_s
    o_t = Σ_{s<=t} w_ts v_s / z_t                            z_t = eps + Σ_{s<=t} w_ts

It is ``linear_attn`` of the features below, with a value of one for z. In memory features are ten
times what they are made of: on a GPU, those of up to WIDEST channels in bf16 without a decay exist
in registers alone (``kernels/quadratic_attn``). The others go by ``linear_attn``: wider ones and
those of fp32 dots do not fit registers, and a decay's gradient needs the states between chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flacompile.ops import context
from flacompile.ops.define import Op, define_cuda
from flacompile.ops.linear_attn import linear_attn_step, recurrence
from flacompile.ops.validate import check_quadratic_attn

WIDEST = 16

Pair = tuple[Tensor, Tensor]
Weights = tuple[float, float, float]


def num_features(key_dim: int, weights: Weights) -> int:
    """F: products of two channels, and those with one, where the polynomial has such terms."""
    return key_dim * (key_dim + 1) // 2 + (key_dim + 1 if weights[0] or weights[1] else 0)


def pairs(x: Tensor) -> Tensor:
    """x ⊗ x without its second half: x_i² and then x_i x_{i+j}, indices modulo K.

    Args:
        x: [..., K].

    Returns:
        [..., K (K + 1) / 2].
    """
    K = x.shape[-1]
    return torch.cat([x * x.roll(-j, -1) for j in range(K // 2 + 1)], -1)[..., : K * (K + 1) // 2]


def features(q: Tensor, k: Tensor, weights: Weights) -> Pair:
    """ψ(q) and φ(k) [..., F] of q, k [..., K]; their product is c0 + c1 q·k + c2 (q·k)².

    ψ(x) is pairs(x), x and 1, and φ counts each as often as it stands in the polynomial.
    """
    c0, c1, c2 = weights
    K = k.shape[-1]
    more = 2 * c2 * pairs(k)
    psi, phi = [pairs(q)], [0.5 * more[..., :K], more[..., K:]]
    if c0 or c1:
        psi += [q, torch.ones_like(q[..., :1])]
        phi += [c1 * k, torch.full_like(k[..., :1], c0)]
    return torch.cat(psi, -1), torch.cat(phi, -1)


def quadratic_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    *,
    weights: Weights,
    eps: float = 1e-12,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Pair:
    """o_t = Σ w_ts v_s / (eps + Σ w_ts) over s <= t, w_ts = c0 + c1 q_t·k_s + c2 (q_t·k_s)².

    Under autocast q, k and v are taken in the autocast dtype; sums are fp32 always.

    Args:
        q, k: [B, T, H, K], one floating dtype for q, k and v.
        v: [B, T, H, V].
        gk: natural-log decay of the weights of earlier tokens, <= 0, fp32: [B, T, H] or None.
        weights: c0, c1 and c2, so that no w is negative: (1, r, r² / 2) is e^a to second order with
            a = r q·k.
        eps: added to the sum of the weights.
        state: Σ φ(k_s) (v_s, 1) of the tokens before, [N, H, F, V + 1] fp32; None is zero.
        mask: [B, T] bool, False at tokens that count nothing.
        cu_seqlens: bounds of packed sequences, as of ``linear_attn``.

    Returns:
        o [B, T, H, V] in the dtype of v, and the final state.

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the CPU also gk > 0.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    F = num_features(q.shape[-1], weights)
    check_quadratic_attn(q, k, v, gk, state, mask, cu_seqlens, F)
    if in_registers(q, gk):
        if state is None:
            sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = q.new_zeros(sequences, q.shape[2], F, v.shape[3] + 1, dtype=torch.float32)
        mask = mask if mask is None else mask.to(torch.uint8)
        return _forward(q, k, v, mask, state, cu_seqlens, [*weights], eps)[:2]
    if device == "cpu":  # where sums are fp32 anyhow
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
    psi, phi = features(q, k, weights)
    if mask is not None:
        phi = torch.where(mask[:, :, None, None], phi, 0.0)
    o, final = recurrence(psi, phi, _with_one(v, q.dtype), gk, None, state, cu_seqlens, 1.0)
    return _divided(o, eps).to(v.dtype), final


def quadratic_attn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    *,
    weights: Weights,
    eps: float = 1e-12,
    state: Tensor,
) -> Pair:
    """One token of ``quadratic_attn``.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        gk: [B, H] or None.
        weights, eps: as of ``quadratic_attn``.
        state: [B, H, F, V + 1] fp32.

    Returns:
        o [B, H, V] in the dtype of v, and the new state.
    """
    psi, phi = features(q.to(state.dtype), k.to(state.dtype), weights)
    o, state = linear_attn_step(psi, phi, _with_one(v, state.dtype), gk, scale=1.0, state=state)
    return _divided(o, eps).to(v.dtype), state


def in_registers(q: Tensor, gk: Tensor | None) -> bool:
    """Whether the kernels take q [B, T, H, K] and a decay; see the module."""
    fits = q.dtype == torch.bfloat16 and q.shape[-1] <= WIDEST and gk is None
    return fits and q.is_cuda and not context.active()


def _with_one(v: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat((v, torch.ones_like(v[..., :1])), -1).to(dtype)


def _divided(o: Tensor, eps: float) -> Tensor:
    return o[..., :-1] / (o[..., -1:] + eps)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, weights: list[float], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the final state, and z [B, T, H], which the backward takes."""
    from flacompile.ops.kernels import quadratic_attn as kernels

    return kernels.quadratic_attn_forward(q, k, v, mask, state, cu_seqlens, weights, eps)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, weights: list[float], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(v.shape[:3])


def _backward_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, weights: list[float], o: Tensor, z: Tensor, do: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from flacompile.ops.kernels import quadratic_attn_backward as kernels

    return kernels.quadratic_attn_backward(
        q, k, v, mask, state, cu_seqlens, weights, o, z, do, dfinal
    )


def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, weights: list[float], o: Tensor, z: Tensor, do: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dstate = (x.new_empty(x.shape) for x in (q, k, v, state))
    return dq, dk, dv, dstate


_forward = Op(define_cuda("quadratic_attn_forward", _forward_cuda, _forward_fake), _forward_cuda)
_backward = Op(
    define_cuda("quadratic_attn_backward", _backward_cuda, _backward_fake), _backward_cuda
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, weights, _eps = inputs
    ctx.save_for_backward(*tensors, output[0], output[2])
    ctx.weights = weights


def _backward_of_op(ctx: Any, do: Tensor, dfinal: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    """z is for the backward alone: nobody else sees it."""
    *tensors, o, z = ctx.saved_tensors
    dq, dk, dv, dstate = _backward(*tensors, ctx.weights, o, z, do, dfinal)
    return dq, dk, dv, None, dstate, None, None, None


def _flops(q: Any, k: Any, v: Any, mask: Any, state: Any, *args: Any, **kwargs: Any) -> int:
    """As ``linear_attn`` of the features: multiply-adds of the recurrence, two each."""
    batch, time, heads, _ = q
    return 4 * batch * time * heads * state[-2] * state[-1]


_forward.differentiate(_setup, _backward_of_op, _flops)
