"""Widths of q, k and v that GPUs move well, whatever those of a model are.

A row that does not begin at a multiple of 16 bytes is moved number by number, and tiles are powers
of two: 129 values would take tiles of 256. Columns of the state do not meet, so that v can be taken
in parts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EVEN = 8  # numbers of 16 bits in 16 bytes
TILE = 128  # values of the widest tile that is fast
FEW = 16  # values more that are worth a call of their own


def even(x: Any, axes: int = 1) -> Any:
    """x with zeros up to a multiple of EVEN in its last axes; None is None."""
    if x is None or not any(size % EVEN for size in x.shape[-axes:]):
        return x
    return F.pad(x, [n for size in x.shape[: -axes - 1 : -1] for n in (0, -size % EVEN)])


def cropped(x: Tensor, *sizes: int) -> Tensor:
    """The first of ``sizes`` in x's last axes, contiguous."""
    for axis, size in enumerate(sizes, -len(sizes)):
        x = x.narrow(axis, 0, size)
    return x.contiguous()


def even_decay(g: Tensor | None) -> Tensor | None:
    """The same of a log decay, [B, T, H] or [B, T, H, channels]."""
    return g if g is None or g.ndim == 3 else even(g)


def parts(width: int) -> Sequence[int]:
    """Widths that make it up: a few values beyond whole tiles stand alone."""
    rest = width % TILE
    return (width - rest, rest) if width > TILE and 0 < rest <= FEW else (width,)


def gradients_by_parts(
    backward: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    state: Tensor, cu_seqlens: Tensor | None, scale: float, do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """dq, dk, dv, dg and dstate of ``backward``, a function of the same arguments.

    Those of q, k and g are sums over the columns of v.
    """
    K, V = q.shape[-1], v.shape[-1]
    q, k, g, of_columns = even(q), even(k), even_decay(g), (even(v), even(do))
    of_columns = (*of_columns, even(state, 2), even(dfinal, 2))
    columns = [x.split(parts(of_columns[0].shape[-1]), -1) for x in of_columns]
    found: list[Any] = [
        backward(q, k, v_i, g, state_i, cu_seqlens, scale, do_i, dfinal_i)
        for v_i, do_i, state_i, dfinal_i in zip(*columns, strict=True)
    ]
    dq, dk, dv, dg, dstate = found[0]
    for dq_i, dk_i, dv_i, dg_i, dstate_i in found[1:]:
        dq, dk, dg = dq + dq_i, dk + dk_i, g if g is None else dg + dg_i
        dv, dstate = torch.cat((dv, dv_i), -1), torch.cat((dstate, dstate_i), -1)
    dg = dg if dg is None or dg.ndim == 3 else cropped(dg, K)
    return cropped(dq, K), cropped(dk, K), cropped(dv, V), dg, cropped(dstate, K, V)
