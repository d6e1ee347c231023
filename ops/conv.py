"""A short causal filter for every channel; its state is the last inputs.

    y_t = bias + sum_i weight_i x_{t-W+1+i}        i = 0..W-1, the last tap at the current token

x_0, x_{-1}, ... are the W - 1 inputs of the state: a tap that would reach into the sequence before
takes those of its own. The gradient runs the filter back in time, over the outputs and then the
W - 1 inputs that went into the new state:

    dx_t = sum_i weight_i dy_{t+W-1-i} + dfinal_{t+W-1-T}

Convolutions of mixers, between projection and recurrence, and the token shift of RWKV's kind.
"""

from typing import Any

import torch
from torch import Tensor

from flacompile.ops import context
from flacompile.ops.define import define
from flacompile.ops.validate import check_conv, expect

Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Pair:
    """y_t = bias + sum_i weight[:, i] x_{t-W+1+i}, without an activation.

    Under autocast x and the state are taken in the autocast dtype; sums are fp32 always.

    Args:
        x: [B, T, C].
        weight: [C, W], the last tap is that of the current token.
        bias: [C].
        state: the W - 1 inputs before the first token, [N, W - 1, C] in the dtype of x; None is
            zero. N is B, or the number of packed sequences.
        cu_seqlens: bounds of the packed sequences, [N + 1], int32 or int64, first 0, last T; then
            B is 1. Sequences may be empty.

    Returns:
        y [B, T, C] in the dtype of x, and the last W - 1 inputs of each sequence [N, W - 1, C].
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, state = x.to(dtype), None if state is None else state.to(dtype)
    check_conv(x, weight, bias, state, cu_seqlens)
    if state is None:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = x.new_zeros(sequences, weight.shape[1] - 1, x.shape[2])
    if context.active():
        context.whole_sequences(cu_seqlens)
        state = inputs_before(x, state)
    return _forward(x, weight, bias, state, cu_seqlens)


def inputs_before(x: Tensor, state: Tensor) -> Tensor:
    """The W - 1 inputs before x [B, T, C], those at the end of the rank before if there is one.

    Args:
        state: [B, W - 1, C], those before the sequence.
    """
    if not context.active():
        return state
    reach = state.shape[1]
    expect(x.shape[1] >= reach, "x", f"at least {reach} tokens in context_parallel", x.shape[1])
    return context.incoming(state, x[:, x.shape[1] - reach :], None)


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor) -> Pair:
    """One token of ``conv`` in plain PyTorch.

    Args:
        x: [B, C].
        weight: [C, W].
        bias: [C].
        state: [B, W - 1, C] in the dtype of x.

    Returns:
        y [B, C] in the dtype of x, and the new state.
    """
    window = torch.cat((state, x[:, None]), 1)  # [B, W, C]
    y = (_wide(window) * weight.T).sum(1)
    return (y if bias is None else y + bias).to(x.dtype), window[:, 1:]


def _wide(x: Tensor) -> Tensor:
    """x in the dtype of sums: fp32, float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def filtered(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Pair:
    """y and final of one sequence a row, in W shifted products."""
    time = x.shape[1]
    joined = torch.cat((state, x), 1)
    wide, weight = _wide(joined), _wide(weight)
    y = wide.new_zeros(()) if bias is None else bias.to(wide.dtype)
    for i, w in enumerate(weight.unbind(1)):
        y = torch.addcmul(y, wide[:, i : i + time], w)
    return y.to(x.dtype), joined[:, time:].contiguous()


def _filtered_backward(
    x: Tensor, weight: Tensor, state: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight (fp32) and dstate of ``filtered``."""
    time = x.shape[1]
    wide, weight, dy = _wide(torch.cat((state, x), 1)), _wide(weight), _wide(dy)
    dweight = [(wide[:, i : i + time] * dy).sum((0, 1)) for i in range(weight.shape[1])]
    djoined = torch.zeros_like(wide)
    djoined[:, time:] = dfinal
    for i, w in enumerate(weight.unbind(1)):
        djoined[:, i : i + time].addcmul_(dy, w)
    dstate, dx = djoined.to(x.dtype).split((state.shape[1], time), 1)
    return dx, torch.stack(dweight, 1), dstate


def _by_sequence(cu_seqlens: Tensor | None, tokens: Tensor, state: Tensor) -> list[Pair]:
    """(tokens, state) of the rows of a batch together, or of each sequence of a pack."""
    if cu_seqlens is None:
        return [(tokens, state)]
    lengths = cu_seqlens.diff().tolist()
    return list(zip(tokens.split(lengths, 1), state.split(1), strict=True))


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None
) -> Pair:
    """The op on a CPU."""
    parts = [filtered(x, weight, bias, s) for x, s in _by_sequence(cu_seqlens, x, state)]
    y, final = zip(*parts, strict=True)
    return torch.cat(y, 1), torch.cat(final)


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None,
    dy: Tensor, dfinal: Tensor,
) -> Gradients:  # fmt: skip
    """Gradients of x, weight, bias (empty without one) and state, on a CPU."""
    inputs, outputs = _by_sequence(cu_seqlens, x, state), _by_sequence(cu_seqlens, dy, dfinal)
    parts = [
        _filtered_backward(x, weight, s, dy, dfinal)
        for (x, s), (dy, dfinal) in zip(inputs, outputs, strict=True)
    ]
    dx, dweight, dstate = zip(*parts, strict=True)
    dbias = dy.new_empty(0) if bias is None else _wide(dy).sum((0, 1)).to(bias.dtype)
    return torch.cat(dx, 1), torch.stack(dweight).sum(0).to(weight.dtype), dbias, torch.cat(dstate)


def decomposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None
) -> Pair:
    """The op as a fixed number of aten operations, for exporters; not for packed sequences."""
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None in an exported graph, got packed sequences")
    return filtered(x, weight, bias, state)


def _forward_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None
) -> Pair:
    from flacompile.ops.kernels import conv as kernels

    return kernels.conv_forward(x, weight, bias, state, cu_seqlens)


def _backward_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None,
    dy: Tensor, dfinal: Tensor,
) -> Gradients:  # fmt: skip
    from flacompile.ops.kernels import conv as kernels

    return kernels.conv_backward(x, weight, bias, state, cu_seqlens, dy, dfinal)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None
) -> Pair:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _backward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None,
    dy: Tensor, dfinal: Tensor,
) -> Gradients:  # fmt: skip
    dbias = dy.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, state.new_empty(state.shape)


_forward = define(conv_forward, _forward_cuda, _forward_fake)
_backward = define(conv_backward, _backward_cuda, _backward_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_op(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpoint gives them no second time
    dx, dweight, dbias, dstate = _backward(*saved, dy, dfinal)
    return dx, dweight, None if saved[2] is None else dbias, dstate, None


def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A multiply-add, two, for each tap of each output."""
    batch, time, channels = x
    return 2 * batch * time * channels * weight[-1]


_forward.differentiate(_setup, _backward_of_op, _flops)
