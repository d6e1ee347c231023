"""A linear layer whose weights are -1, 0 or 1 times one number, two bits each (arXiv 2402.17764).

    y = s r (X W^T)        X = clip(round(x / max(r, 1e-5)), -128, 127),   r = max |x| / 127

W [N, K] in {-1, 0, 1} and its scale s are given; X and r, one a token, are taken from x. The sums
of X W^T are those of integers, exact on every path. Rounding and order are those of torchao's
BitNet training, so that in fp32 the values are its forward's bit for bit.

Four weights a byte: K is padded to P, a multiple of 64, and byte i of a row holds the weights at
i, i + P/4, i + P/2, i + 3P/4 as W + 1, the first in the lowest two bits. So one shift and one mask
turn four bytes, taken as a word, into four neighbouring weights, and rows begin at 16 bytes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.ops.define import define
from flacompile.ops.validate import bytes_of_ternary, check_ternary_linear, expect

SMALLEST = 1e-5  # of a scale that is divided by
BLOCK = 2**19  # unpacked bytes that stay in a CPU's cache
FEW = 4  # rows for which unpacking costs more than their products
EXACT = 2**16  # inputs whose products, at most 254 each, fp32 adds without rounding
FIELDS = 0x03030303  # the lowest two bits of each byte of a word


def ternary_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = s r (X W^T) + bias, with X and r the int8 rounding of each token of x.

    The gradient of x passes the rounding as if it were not there; the weights have none. Under
    autocast x is taken in the autocast dtype.

    Args:
        x: [..., K].
        packed: [N, P / 4] uint8, as ``pack_ternary`` makes it.
        scale: s, fp32, of no dimensions.
        bias: [N].

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by name.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    check_ternary_linear(x, packed, scale, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _forward(rows, packed, scale).reshape(*x.shape[:-1], packed.shape[0])
    return y if bias is None else (y + bias).to(x.dtype)


def pack_ternary(codes: Tensor) -> Tensor:
    """Weights [N, K] of -1, 0 and 1, in any dtype, as bytes [N, P / 4]."""
    expect(codes.ndim == 2, "codes", "shape [N, K]", tuple(codes.shape))
    K = codes.shape[1]
    codes = F.pad(codes.to(torch.int8), (0, 4 * bytes_of_ternary(K) - K)) + 1
    fields = codes.to(torch.uint8).unflatten(1, (4, -1)).unbind(1)
    return sum((field << 2 * j for j, field in enumerate(fields)), torch.zeros_like(fields[0]))


def unpack_ternary(packed: Tensor) -> Tensor:
    """Bytes [N, P / 4] as weights [N, P] of -1, 0 and 1, int8: zeros after the first K."""
    return _fields(packed) - 1


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> X, whole numbers in fp32, and r [M, 1] in the dtype of x."""
    r = x.abs().amax(1, keepdim=True) / 127
    X = x.float() * (1 / r.float().clamp(min=SMALLEST))
    return X.round().clamp(-128, 127), r


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [N, K], int8 -1, 0 or 1, and its scale s, fp32: the mean size of the weights."""
    s = weight.float().abs().mean()
    return (weight.float() / s.clamp(min=SMALLEST)).round().clamp(-1, 1).to(torch.int8), s


def _fields(packed: Tensor) -> Tensor:
    """[N, P / 4] -> W + 1, [N, P] int8."""
    words = packed.view(torch.int32)
    fields = torch.cat([(words >> 2 * j) & FIELDS for j in range(4)], 1)
    return fields.view(torch.int8)


def _padded(X: Tensor, packed: Tensor) -> Tensor:
    return F.pad(X, (0, 4 * packed.shape[1] - X.shape[1]))


def _scaled(total: Tensor, scale: Tensor, r: Tensor) -> Tensor:
    """Sums of X W^T -> y."""
    return (total * scale * r).to(r.dtype)


def ternary_linear_forward(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The op on a CPU: weights unpacked block by block, and a product of int8 matrices."""
    X, r = round_rows(x)
    X = _padded(X, packed).to(torch.int8)
    blocks = packed.split(max(1, BLOCK // max(1, X.shape[1])))
    total = torch.cat([torch._int_mm(X, _fields(block).t()) for block in blocks], 1)
    return _scaled(total - X.sum(1, keepdim=True, dtype=torch.int32), scale, r)


def decomposed(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The op as compilers and exporters see it; right for any number of rows.

    Which form it takes follows the number of rows, or that of the example where it is symbolic.
    """
    X, r = round_rows(x)
    X = _padded(X, packed)
    if _example_of(x.shape[0]) <= FEW and X.shape[1] <= EXACT:
        total = _sum_of_few(X, packed) - X.sum(1, keepdim=True)
    else:
        X = X.to(torch.int8)
        total = torch._int_mm(X, _fields(packed).t()) - X.sum(1, keepdim=True, dtype=torch.int32)
    return _scaled(total, scale, r)


def _sum_of_few(X: Tensor, packed: Tensor) -> Tensor:
    """X (W + 1)^T in fp32 as one loop over the packed words, which are read once a row.

    Field j of a word's byte c is the weight at j P/4 + 4 i + c. It is left where the mask finds it
    in the byte, at 4^j times its value, and X is given 4^-j of its own: no shift, and still exact.
    """
    words = packed.view(torch.int32)  # [N, P / 16]
    X = X.unflatten(1, (4, -1, 4)).transpose(2, 3)  # [M, j, c, i]
    X = torch.stack([X[:, j] * 0.25**j for j in range(4)], 1)
    X = X.as_strided(X.shape, X.stride())  # Inductor stores here what it would compute a row
    total: Any = 0
    for c in range(4):
        fields = words >> 8 * c
        for j in range(4):
            total = total + X[:, j, c, None] * (fields & 3 << 2 * j).float()
    return total.sum(-1)


def _example_of(size: int | torch.SymInt) -> int:
    """A size, or where it is symbolic that of the example, without a guard on it."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return FEW + 1 if hint is None else int(hint)


def _forward_cuda(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    from flacompile.ops.kernels import ternary as kernels

    return kernels.ternary_linear_forward(x, packed, scale)


def _forward_fake(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


_forward = define(ternary_linear_forward, _forward_cuda, _forward_fake, visible=decomposed)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.K = inputs[0].shape[1]


def _backward_of_op(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale = ctx.saved_tensors
    weight = unpack_ternary(packed)[:, : ctx.K].to(dy.dtype)
    return (dy @ weight * scale).to(dy.dtype), None, None


def _flops(x: Any, packed: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A multiply-add, two, for each weight of each row."""
    return 2 * x[0] * x[1] * packed[0]


_forward.differentiate(_setup, _backward_of_op, _flops)
