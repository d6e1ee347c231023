"""One token of every recurrent op: the step compiled, under a CUDA graph.

B = 64, H = 16 and states of 128 x 128 in fp32. floor: each state is read and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flacompile import ops
from flacompile.ops import spec

from .check import BOUND
from .clock import captured, milliseconds
from .draw import Draw, Size
from .floor import milliseconds_of
from .rows import rows

BATCH = 64


class Step(NamedTuple):
    ours: Callable[..., Any]
    loop: Callable[..., Any]


STEPS = {
    "linear_attn": Step(ops.linear_attn_step, spec.linear_attn),
    "simple_gla": Step(ops.linear_attn_step, spec.linear_attn),
    "gla": Step(ops.linear_attn_step, spec.linear_attn),
    "gated_delta_rule": Step(ops.delta_rule_step, spec.delta_rule),
    "kda": Step(ops.delta_rule_step, spec.delta_rule),
    "rwkv7": Step(ops.dplr_step, spec.dplr),
}


def drawn(name: str, size: Size, device: str) -> tuple[list[Tensor], Tensor]:
    """The tensors of a token [B, H, *], and a state."""
    draw = Draw(size, device, torch.bfloat16)
    tensors = [x[:, 0] for x in rows(size.heads, size.dim)[name].draw(draw)]
    return tensors, draw.plain(size.batch, size.heads, size.dim, size.dim)


def compiled(name: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(STEPS[name].ours, fullgraph=True, dynamic=False)


@torch.no_grad()
def error(name: str, step: Callable[..., Any], tensors: list[Tensor], state: Tensor) -> float:
    """The larger relative error of o and the next state, against one token in float64."""
    got = step(*tensors, state=state)
    o, last = STEPS[name].loop(*(x[:, None].double() for x in tensors), state=state.double())
    pairs = zip(got, (o[:, 0], last), strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


@torch.no_grad()
def measure(name: str, size: Size, terabytes: float) -> dict[str, Any]:
    """Milliseconds of a step, or what is wrong with it."""
    tensors, state = drawn(name, size, "cuda")
    step = compiled(name)
    row: dict[str, Any] = {"op": name, "error": error(name, step, tensors, state)}
    if not row["error"] < BOUND:
        return row | {"wrong": f"{row['error']:.1e}: not timed"}
    graph = captured(lambda: step(*tensors, state=state))
    floor = milliseconds_of(2 * state.nbytes, terabytes)
    return row | {"ms": milliseconds(graph.replay), "floor": floor}
