"""Linear maps of few rows, opened into what Inductor makes one pass over each weight, on a CPU.

    y_o = sum_k w_ok x_k

It is as fast as memory gives the weight; libraries take up to three times as long for a matrix
product of one row. They are made for many rows, for each of which this reads the weight again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
Fields = Callable[[Tensor], tuple[Tensor, ...]]

STREAMS = 4  # places of a weight that are read at once: memory gives more to several than to one
LARGE = 2**17  # weights of a matrix from which that is worth its loops, each of which is compiled


def stream_weights(program: ExportedProgram) -> ExportedProgram:
    """Opens the linear maps of a decomposed program, also those of int8 weights by torchao."""
    for node in program.graph.nodes:
        if node.target is aten.mm.default and (weight := _low_bit(node.args[1])) is not None:
            node.target, node.args = aten.linear.default, (node.args[0], weight)
    return program.run_decompositions({aten.linear.default: _linear})


def _low_bit(node: Node) -> Node | None:
    """The int8 weight w of ``w.t().to(dtype)``, which is how torchao multiplies with it."""
    turned = node.args[0] if node.target is aten._to_copy.default else node
    if not isinstance(turned, Node) or turned.target is not aten.t.default:
        return None
    weight: Any = turned.args[0]
    return weight if weight.meta["val"].dtype == torch.int8 else None


def _linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products and sums in fp32 at least; x [..., K], w [O, K]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    count, scale, fields = _fields(w, wide)
    parts = (x.to(wide) * scale).unflatten(-1, (-1, count)).movedim(-1, 0).contiguous()
    parts = parts.as_strided(parts.shape, parts.stride())  # Inductor stores it here, once
    streams = STREAMS if w.numel() >= LARGE and w.shape[0] % STREAMS == 0 else 1
    sums = []
    for rows in w.unflatten(0, (streams, -1)).unbind(0):
        pairs = zip(parts.unsqueeze(-2), fields(rows), strict=True)
        first, *rest = (part * field for part, field in pairs)
        sums.append(sum(rest, first).sum(-1))
    y = torch.cat(sums, -1)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _fields(w: Tensor, wide: torch.dtype) -> tuple[int, float, Fields]:
    """Weights a word, what x is scaled by for it, and w -> the weights at each place of the words.

    Words of 32 bits are read as memory has them, and come apart by a shift or a mask each; loads of
    less than a register, and what widens them, would take longer than memory does.
    """
    count, packed = 4 // w.element_size(), wide == torch.float32 and w.dtype in PACKED
    if packed and w.is_contiguous() and w.shape[1] % count == 0:
        return count, *PACKED[w.dtype]
    return 1, 1.0, lambda w: (w.to(wide),)


def _halves(w: Tensor) -> tuple[Tensor, ...]:
    """Of each word the two bf16, each the upper half of the fp32 that it is."""
    words = w.view(torch.int32)
    return (words << 16).view(torch.float32), (words & -(2**16)).view(torch.float32)


def _quarters(w: Tensor) -> tuple[Tensor, ...]:
    """Of each word the four int8, times 2^24."""
    words, top = w.view(torch.int32), -(2**24)
    return tuple(x.float() for x in (words << 24, words << 16 & top, words << 8 & top, words & top))


PACKED: dict[torch.dtype, tuple[float, Fields]] = {
    torch.bfloat16: (1.0, _halves),
    torch.int8: (2.0**-24, _quarters),
}
