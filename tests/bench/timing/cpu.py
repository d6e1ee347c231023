"""Ops on a CPU: the compiled chunked forward beside the token loop, in fp32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .draw import Draw, Size
from .rows import rows

BOUND = 1e-4  # relative norm of an error, in fp32
RUNS = 5
LOOPS = (
    "linear_attn", "simple_gla", "mamba2", "gla", "gated_delta_rule", "kda", "rwkv7", "hgrn",
    "mamba", "conv",
)  # fmt: skip


def milliseconds(call: Callable[[], Any], runs: int) -> float:
    """The median of some runs."""
    spent = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(spent)


@torch.no_grad()
def measure(name: str, size: Size) -> dict[str, Any]:
    """Times of one op, or what is wrong with it."""
    row = rows(size.heads, size.dim)[name]
    tensors = row.draw(Draw(size, "cpu", torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(row.ours, fullgraph=True, dynamic=False)
    first = milliseconds(lambda: compiled(*tensors), 1) / 1e3
    got, want = compiled(*tensors)[0], row.loop(*tensors)[0]
    found: dict[str, Any] = {"op": name, "B": size.batch, "T": size.time, "H": size.heads,
                             "D": size.dim, "first": first}  # fmt: skip
    found["error"] = ((got - want).norm() / want.norm()).item()
    if not found["error"] < BOUND:
        return found | {"wrong": f"{found['error']:.1e}: not timed"}
    found["ms"] = milliseconds(lambda: compiled(*tensors), RUNS)
    found["loop ms"] = milliseconds(lambda: row.loop(*tensors), 1)
    return found
