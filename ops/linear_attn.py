"""Linear attention with decay on both sides of the state.

    S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t v_t^T        o_t = scale q_t S_t

q and k may be shared by heads, as Mamba-2's C and B: head h reads group h // (H / G) of G.

The primitive behind linear attention (Katharopoulos et al. 2020), GLA (Yang et al. 2023), Mamba-2
(Dao & Gu 2024), HGRN2, RWKV-6, ABC and LightNet. The backward is ``closed_backward`` on a CPU and
for decays a channel on both sides; else, on a GPU, ``kernels/linear_attn_backward``, or
``kernels/shared_heads`` where heads share q and k.
"""

from typing import Any

import torch
from torch import Tensor

from flacompile.ops import context
from flacompile.ops.chunked import CHUNK, chunked
from flacompile.ops.closed_backward import decay_gradient, gradients
from flacompile.ops.define import define
from flacompile.ops.heads import repeat_heads, sum_heads
from flacompile.ops.start import filled
from flacompile.ops.step import step
from flacompile.ops.validate import check_linear_attn, check_log_decay
from flacompile.ops.widths import cropped, even, even_decay, gradients_by_parts

Pair = tuple[Tensor, Tensor]


def linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Pair:
    """o_t = scale q_t S_t with S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t v_t^T.

    Under autocast q, k and v are taken in the autocast dtype; sums are fp32 always.

    Args:
        q, k: [B, T, H, K], or [B, T, G, K] with G a divisor of H; one floating dtype for q, k, v.
        v: [B, T, H, V].
        gk: natural-log decay of the key side, <= 0, fp32: [B, T, H] (one number a head),
            [B, T, H, K] (where G is H) or None (no decay).
        gv: the same for the value side: [B, T, H], [B, T, H, V] (where G is H) or None.
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
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return recurrence(q, k, v, gk, gv, state, cu_seqlens, scale)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float | None,
) -> Pair:  # fmt: skip
    """``linear_attn`` whatever the autocast dtype."""
    check_linear_attn(q, k, v, gk, gv, state, cu_seqlens)
    gk, state, scale = filled(q, v, gk, state, cu_seqlens, scale)
    gv = gv if gv is None else gv.to(state.dtype)
    if context.active():
        context.whole_sequences(cu_seqlens)
        left = _forward(q, k, v, gk, gv, state, None, scale)[1]
        state = context.incoming(state, left, _decay(gk, gv, state))
    return _forward(q, k, v, gk, gv, state, cu_seqlens, scale)


def _decay(gk: Tensor | None, gv: Tensor | None, state: Tensor) -> Tensor:
    """What all tokens together leave of a state, [B, H, K or 1, V or 1]."""
    total = state.new_zeros(*state.shape[:2], 1, 1)
    for g, axis in ((gk, -1), (gv, -2)):
        if g is not None:
            total = total + (g if g.ndim == 4 else g[..., None]).sum(1).unsqueeze(axis)
    return total.exp()


def linear_attn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor,
) -> Pair:
    """One token of ``linear_attn``.

    Args:
        q, k: [B, H, K] or [B, G, K].
        v: [B, H, V].
        gk: [B, H], [B, H, K] or None.
        gv: [B, H], [B, H, V] or None.
        scale: factor on the output; None is K^-0.5.
        state: [B, H, K, V] fp32.

    Returns:
        o [B, H, V] in the dtype of v, and the new state.
    """
    return step(q, k, v, gk, gv, None, None, state, scale)


def decomposed(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Pair:  # fmt: skip
    """The op as a fixed number of aten operations, for exporters; not for packed sequences."""
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None in an exported graph, got packed sequences")
    o, final = chunked(q, k, v, gk, gv, state, scale=scale)
    # A strided output would reach a package's next call, which reads it as if it were contiguous.
    return o.to(v.dtype), final.clone(memory_format=torch.contiguous_format)


def _sequence(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    scale: float,
) -> Pair:  # fmt: skip
    """``chunked`` with chunk and levels chosen for the T at hand."""
    time = q.shape[1]
    if time == 0:
        return torch.zeros_like(v, dtype=state.dtype), state.clone()
    chunk = min(CHUNK, 1 << (time - 1).bit_length())
    num_chunks = -(-time // chunk)
    levels = (num_chunks > 32) + (num_chunks > 512)
    return chunked(q, k, v, gk, gv, state, scale=scale, chunk=chunk, levels=levels)


@torch.autocast("cpu", enabled=False)  # sums are fp32, whatever the caller's context
def _run_cpu(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, reverse: bool, dtype: torch.dtype,
) -> Pair:  # fmt: skip
    """Every sequence by ``chunked``."""
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    states = [state] if cu_seqlens is None else list(state.split(1))
    outputs, finals = [], []
    for first, last, start in zip(bounds[:-1], bounds[1:], states, strict=True):
        span = [x if x is None else x[:, first:last] for x in (q, k, v, gk, gv)]
        if reverse:  # position t takes the decay of t + 1, the last position none
            span = [x if x is None else x.flip(1) for x in span]
            span[3:] = [x if x is None else _delay(x) for x in span[3:]]
        o, final = _sequence(*span, start, scale)
        outputs.append(o.flip(1) if reverse else o)
        finals.append(final)
    return torch.cat(outputs, 1).to(dtype), torch.cat(finals)


def _delay(g: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], 1)


def _run_cuda(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, reverse: bool, dtype: torch.dtype,
) -> Pair:  # fmt: skip
    """Every sequence by the kernels."""
    from flacompile.ops.kernels import linear_attn as kernels

    K, V = q.shape[-1], v.shape[-1]
    decays, state = (even_decay(gk), even_decay(gv)), even(state, 2)
    o, final = kernels.linear_attn_forward(
        even(q), even(k), even(v), *decays, state, cu_seqlens, scale, reverse, out_dtype=dtype
    )
    return cropped(o, V), cropped(final, K, V)


def linear_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Pair:  # fmt: skip
    """The op on a CPU. The sign of the decays is checked here, where reading them costs no sync."""
    check_log_decay("gk", gk)
    check_log_decay("gv", gv)
    return _run_cpu(q, k, v, gk, gv, state, cu_seqlens, scale, False, v.dtype)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Pair:  # fmt: skip
    return _run_cuda(q, k, v, gk, gv, state, cu_seqlens, scale, False, v.dtype)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Pair:  # fmt: skip
    return torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(
        state, memory_format=torch.contiguous_format
    )


def linear_attn_backward(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, final: Tensor, do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of every input of the op, on a CPU."""
    groups, (q, k) = q.shape[2], (repeat_heads(x, v.shape[2]) for x in (q, k))
    inputs = (q, k, v, gk, gv, state, cu_seqlens, scale, final, do, dfinal)
    dq, dk, *rest = gradients(_run_cpu, decay_gradient, *inputs)
    return sum_heads(dq, groups), sum_heads(dk, groups), *rest


def _backward_cuda(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, final: Tensor, do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """By chunks, where one side at most has a decay a channel; else by calls of the forward."""
    inputs = (q, k, v, gk, gv, state, cu_seqlens, scale, final, do, dfinal)
    if gv is None or gv.ndim == 3:
        return _backward_of_keys(*inputs)
    if gk is None or gk.ndim == 3:
        return _backward_of_values(*inputs)
    from flacompile.ops.kernels import decay_gradient as kernels

    return gradients(_run_cuda, kernels.decay_gradient, *inputs)


def _backward_of_keys(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, final: Tensor, do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of decays of the key side and of heads."""
    from flacompile.ops.kernels.linear_attn_backward import linear_attn_backward
    from flacompile.ops.kernels.shared_heads import shared_heads_backward

    by_chunks = linear_attn_backward if q.shape[2] == v.shape[2] else shared_heads_backward
    g = gk if gv is None else gv if gk is None else gk + (gv if gk.ndim == 3 else gv.unsqueeze(-1))
    dq, dk, dv, dg, dstate = gradients_by_parts(
        by_chunks, q, k, v, g, state, cu_seqlens, scale, do, dfinal
    )
    dgk, dgv = dstate.new_empty(0), dstate.new_empty(0)  # an op's outputs must not be one tensor
    if dg is not None and gv is not None:
        dgv = dg.sum(-1) if dg.ndim == 4 else dg.clone() if gk is not None else dg
    if dg is not None and gk is not None:
        dgk = dg
    return dq, dk, dv, dgk, dgv, dstate


def _backward_of_values(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, final: Tensor, do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of decays of the value side, which is the key side of the transposed state.

    do reads v and k there, so that its own gradient is o, and q's is what it reads.
    """
    g, start = gv if gk is None else gv + gk.unsqueeze(-1), state.mT.contiguous()
    dq, _ = _run_cuda(do, v, k, g, None, start, cu_seqlens, scale, False, q.dtype)
    _o, dv, dk, dgv, _, dstate = _backward_of_keys(
        do, v, k, g, None, start, cu_seqlens, scale, final, q, dfinal.mT.contiguous()
    )
    dgk = dgv.new_empty(0) if gk is None else dgv.sum(-1)
    return dq, dk, dv, dgk, dgv, dstate.mT.contiguous()


def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, final: Tensor, do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        """The gradient of x; empty where there is no x."""
        return q.new_empty(0 if x is None else x.shape, dtype=(state if x is None else x).dtype)

    return like(q), like(k), like(v), like(gk), like(gv), like(state)


_forward = define(linear_attn_forward, _forward_cuda, _forward_fake)
_backward = define(linear_attn_backward, _backward_cuda, _backward_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.scale = scale


def _backward_of_op(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, final = ctx.saved_tensors
    dq, dk, dv, dgk, dgv, dstate = _backward(*tensors, ctx.scale, final, do, dfinal)
    has_gk, has_gv = tensors[3] is not None, tensors[4] is not None
    return dq, dk, dv, dgk if has_gk else None, dgv if has_gv else None, dstate, None, None


def _flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Multiply-adds of the recurrence, two each: k v^T and q S."""
    batch, time, heads, value_dim = v
    return 4 * batch * time * heads * q[-1] * value_dim


_forward.differentiate(_setup, _backward_of_op, _flops)
