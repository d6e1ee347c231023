"""One row of the table on a GPU: checked, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import decode
from .check import BOUND, worst
from .clock import both, measure
from .draw import Draw, Size, leaves
from .floor import milliseconds_of, work
from .peer import PEERS, timing_only
from .rows import Row, rows


def said(reason: Exception) -> str:
    """An error in a cell."""
    text = str(reason).strip().splitlines() or [""]
    return f"{type(reason).__name__}: {text[0][:100]}".replace("|", "/")


def function(name: str, kind: str, row: Row) -> Callable[..., Any]:
    """Ours, ours compiled with the PyTorch around it, or the peer's."""
    if kind == "peer":
        return PEERS[name]
    if kind == "ours":
        return row.ours
    torch._dynamo.reset()
    return torch.compile(row.ours, fullgraph=True, dynamic=False)


def timed(name: str, kind: str, size: Size, terabytes: float) -> dict[str, Any]:
    """The figures of a row, or under ``wrong`` why there are none."""
    row = rows(size.heads, size.dim)[name]
    found: dict[str, Any] = {"op": name, "kind": kind, "B": size.batch, "T": size.time,
                             "H": size.heads, "D": size.dim}  # fmt: skip
    with timing_only(name) if kind == "peer" else nullcontext() as note:
        f = function(name, kind, row)
        tensors = leaves(row.draw(Draw(size, "cuda", torch.bfloat16)))
        found["error"], found["equal"] = worst(f, row.loop, tensors, size)
        if kind != "peer" and not found["error"] < BOUND:
            return found | {"wrong": f"{found['error']:.1e}: not timed"}
        if kind != "peer" and name != "softmax" and not found["equal"]:
            return found | {"wrong": "two runs differ: not timed"}
        found |= measure(f, tensors)
    found |= work(row.ours, tensors) | ({"note": note} if note else {})
    for way in ("", " both"):
        found[f"floor{way}"] = milliseconds_of(found.pop(f"bytes{way}"), terabytes)
    return found


def once(f: Callable[..., Any], tensors: list[Tensor]) -> float:
    """Seconds of one forward and backward."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    both(f, tensors, torch.ones_like(f(*tensors)[0]))
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def first_call(label: str, sizes: list[Size]) -> dict[str, float | str]:
    """Seconds of the first forward and backward in this process, then those of other sizes."""
    name, _, kind = label.partition(" ")
    if kind == "decode":
        tensors, state = decode.drawn(name, sizes[0]._replace(batch=decode.BATCH, time=1), "cuda")
        begin = time.perf_counter()
        decode.error(name, decode.compiled(name), tensors, state)
        return {"first": time.perf_counter() - begin}
    seconds: list[float] = []
    with timing_only(name) if kind == "peer" else nullcontext():
        for size in sizes:
            row = rows(size.heads, size.dim)[name]
            f = function(name, kind or "ours", row)
            try:
                tensors = leaves(row.draw(Draw(size, "cuda", torch.bfloat16)))
                seconds.append(once(f, tensors))
            except Exception as reason:  # out of memory beside the others: the first was measured
                if not seconds:
                    raise
                return {"first": seconds[0], "others": said(reason)}
    return {"first": seconds[0], "others": sum(seconds[1:])}
