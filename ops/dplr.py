"""A state transition that is diagonal plus low rank.

    S_t = (diag(e^g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T        o_t = scale q_t S_t

The primitive behind RWKV-7 (Peng et al. 2025). With u_t = S_{t-1}^T a_t it is two writes, b u^T
and k v^T. On a GPU: ``kernels/dplr`` and ``kernels/dplr_backward``. The CPU form has the single
write of ``delta_rule`` as well: without b, u_t = v_t + S_{t-1}^T a_t and

    S_t = diag(e^g_t) S_{t-1} + k_t u_t^T
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flacompile.ops import context
from flacompile.ops.chunked_dplr import CHUNK, LONGEST, chunked_sweep, folds, loop
from flacompile.ops.chunked_reads import chunked_reads
from flacompile.ops.define import define
from flacompile.ops.dplr_gradients import by_early_reads, forward, gradients
from flacompile.ops.start import filled
from flacompile.ops.step import step
from flacompile.ops.validate import check_dplr, check_log_decay

Triple = tuple[Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = scale q_t S_t with S_t = (diag(e^g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T.

    Under autocast all but g and the state are taken in the autocast dtype; sums are fp32 always.

    Args:
        q, k: [B, T, H, K], one floating dtype for q, k and v.
        v: [B, T, H, V].
        g: natural-log decay, <= 0, fp32: [B, T, H] (one number a head), [B, T, H, K] or None.
        a, b: [B, T, H, K], each in any floating dtype. a reads the state before the decay.
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
        q, k, v, a, b = (x.to(dtype) for x in (q, k, v, a, b))
    check_dplr(q, k, v, g, {"a": a, "b": b}, state, cu_seqlens)
    g, state, scale = filled(q, v, g, state, cu_seqlens, scale)
    if context.active():
        context.whole_sequences(cu_seqlens)
        values, start = context.with_identity(k, v, state)
        _, final, _ = _forward(q, k, values, g, a, b, start, None, scale)
        left, transition = final.split((v.shape[3], k.shape[3]), -1)
        state = context.incoming(state, left, transition, torch.matmul)
    o, final, _ = _forward(q, k, v, g, a, b, state, cu_seqlens, scale)
    return o, final


def dplr_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of ``dplr``.

    Args:
        q, k, a, b: [B, H, K].
        v: [B, H, V].
        g: [B, H], [B, H, K] or None.
        scale: factor on the output; None is K^-0.5.
        state: [B, H, K, V] fp32.

    Returns:
        o [B, H, V] in the dtype of v, and the new state.
    """
    return step(q, k, v, g, None, a, b, state, scale)


def decomposed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    """The op as a fixed number of aten operations, for exporters; not for packed sequences."""
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None in an exported graph, got packed sequences")
    torch._check(q.shape[1] <= LONGEST, lambda: f"T: expected at most {LONGEST} in an export")

    def sweep(*args: Any) -> Any:
        """``chunked_sweep`` in a number of chunks that grows with T, combined by ``folds``."""
        num_chunks = q.shape[1] // CHUNK + 2  # never one: a compiler would count on it
        return chunked_sweep(*args[:8], across=folds, num_chunks=num_chunks)

    late = partial(by_early_reads, sweep)
    o, final, u = forward(late, q, k, v, g, a, b, state, None, scale)
    # A strided output would reach a package's next call, which reads it as if it were contiguous.
    o, final, u = (
        x.clone(memory_format=torch.contiguous_format)
        for x in (o.to(q.dtype), final, u.to(q.dtype))
    )
    return o, final, u


def _each_sequence(
    run: Callable[..., Any], tensors: list[Any], state: Tensor,
    cu_seqlens: Tensor | None, reverse: bool,
) -> list[Any]:  # fmt: skip
    """``run(*tensors, state)``, which gives outputs over time and a state, of every sequence."""
    bounds = [0, tensors[0].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    states = [state] if cu_seqlens is None else state.split(1)
    results = []
    for (first, last), start in zip(pairwise(bounds), states, strict=True):
        span = [x if x is None else x[:, first:last] for x in tensors]
        *outputs, final = run(*[x if x is None or not reverse else x.flip(1) for x in span], start)
        results.append([x if x is None or not reverse else x.flip(1) for x in outputs] + [final])
    *outputs, finals = zip(*results, strict=True)
    return [x[0] if x[0] is None else torch.cat(x, 1) for x in outputs] + [torch.cat(finals)]


def _chunk(time: int) -> int:
    return min(CHUNK, 1 << max(time - 1, 0).bit_length())


def _early_cpu(
    a: Tensor, b: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor | None, c: Tensor | None,
    g: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, reverse: bool,
) -> Any:  # fmt: skip
    """u, o (None without q) and the final state: ``chunked_sweep`` of every sequence."""

    def run(*args: Any) -> Any:
        """``chunked_sweep`` of one sequence, in chunks no longer than it."""
        time, chunk = args[0].shape[1], _chunk(args[0].shape[1])
        return chunked_sweep(*args, across=loop, num_chunks=-(-time // chunk), chunk=chunk)

    return _each_sequence(run, [a, b, q, k, v, c, g], state, cu_seqlens, reverse)


_sweep_cpu = partial(by_early_reads, _early_cpu)


def _read_cpu(
    queries: list[Tensor], writes: list[tuple[Tensor, Tensor]], g: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, reverse: bool,
) -> list[Tensor]:  # fmt: skip
    def run(x: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> Any:
        """``chunked_reads`` of one sequence; backwards, a decay belongs to the token before."""
        if reverse and g is not None:
            g = torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], 1)
        return chunked_reads(x, k, v, g, state, _chunk(x.shape[1]))

    k, v = (torch.stack([x.to(state.dtype) for x in side], 3) for side in zip(*writes, strict=True))
    o, _ = _each_sequence(run, [torch.stack(queries, 3), k, v, g], state, cu_seqlens, reverse)
    return [x.clone(memory_format=torch.contiguous_format) for x in o.unbind(3)]


@torch.autocast("cpu", enabled=False)  # sums are fp32, whatever the caller's context
def forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    """One write or two. The sign of g is checked here, where reading it costs no sync."""
    check_log_decay("g", g)
    o, final, u = forward(_sweep_cpu, q, k, v, g, a, b, state, cu_seqlens, scale)
    return o.to(q.dtype), final, u.to(q.dtype)


def dplr_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    """The op on a CPU."""
    return forward_cpu(q, k, v, g, a, b, state, cu_seqlens, scale)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    from flacompile.ops.kernels import dplr as kernels

    return kernels.dplr_forward(q, k, v, g, a, b, state, cu_seqlens, scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> Triple:  # fmt: skip
    return q.new_empty(v.shape), state.new_empty(state.shape), q.new_empty(v.shape)


@torch.autocast("cpu", enabled=False)
def backward_cpu(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, u: Tensor, final: Tensor, do: Tensor, dfinal: Tensor,
) -> Seven:  # fmt: skip
    """Gradients of every input, with one write or two."""
    inputs = (q, k, v, g, a, b, state, cu_seqlens, scale, u, final, do, dfinal)
    return gradients(_sweep_cpu, _read_cpu, *inputs)


def dplr_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, u: Tensor, final: Tensor, do: Tensor, dfinal: Tensor,
) -> Seven:  # fmt: skip
    """Gradients of every input of the op, on a CPU."""
    return backward_cpu(q, k, v, g, a, b, state, cu_seqlens, scale, u, final, do, dfinal)


def _backward_cuda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, u: Tensor, final: Tensor, do: Tensor, dfinal: Tensor,
) -> Seven:  # fmt: skip
    from flacompile.ops.kernels import dplr_backward as kernels

    dq, dk, dv, dg, da, db, dstate = kernels.dplr_backward(
        q, k, v, g, a, b, state, cu_seqlens, scale, u, do, dfinal
    )
    if g is None:
        dg = dstate.new_empty(0)
    elif g.ndim == 3:
        dg = dg.sum(-1)
    return dq, dk, dv, dg, da, db, dstate


def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, scale: float, u: Tensor, final: Tensor, do: Tensor, dfinal: Tensor,
) -> Seven:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        """The gradient of x; empty where there is no x."""
        return state.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(g), like(a), like(b), like(state)


_forward = define(dplr_forward, _forward_cuda, _forward_fake)
_backward = define(dplr_backward, _backward_cuda, _backward_fake)


def save(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    """What the backward takes; u is no result of the op for anybody else."""
    *tensors, scale = inputs
    _, final, u = output
    ctx.save_for_backward(*tensors, u, final)
    ctx.mark_non_differentiable(u)
    ctx.scale = scale


def _backward_of_op(ctx: Any, do: Tensor, dfinal: Tensor, du: Any) -> tuple[Tensor | None, ...]:
    *tensors, u, final = ctx.saved_tensors
    dq, dk, dv, dg, da, db, dstate = _backward(*tensors, ctx.scale, u, final, do, dfinal)
    return dq, dk, dv, None if tensors[3] is None else dg, da, db, dstate, None, None


def _flops(q: Any, k: Any, v: Any, g: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of the recurrence, two each: S a and S q read, k v^T and b u^T written."""
    batch, time, heads, key_dim = q
    return 8 * batch * time * heads * key_dim * v[-1]


_forward.differentiate(save, _backward_of_op, _flops)
