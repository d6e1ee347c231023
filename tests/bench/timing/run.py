"""The tables of one run, row by row as they come; no error ends it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import cpu, decode, table
from .clock import ceilings
from .draw import Size
from .measure import said, timed
from .processes import first_calls
from .results import Results, key, peers

Chosen = tuple[str, str, Size]


def guarded(row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what is measured, or with the error; nothing stays on the GPU."""
    try:
        row = row | measure()
    except Exception as reason:  # out of memory, or a peer's: the next row goes on
        row = row | {"wrong": said(reason)}
    gc.collect()
    with suppress(RuntimeError):  # after a failed capture
        torch.cuda.empty_cache()
    return row


def compile_apart(
    labels: Sequence[str], sizes: Sequence[Size], results: Results, timeout: float
) -> None:
    """Every op's first call in a process of its own."""
    arguments = ["--heads", str(sizes[0].heads), "--dim", str(sizes[0].dim)]
    for size in sizes:
        arguments += ["--shape", f"{size.batch},{size.time}"]
    tokens = max(size.batch * size.time for size in sizes)
    print(table.head(table.COLD), flush=True)
    for label, found in first_calls(labels, arguments, tokens, timeout):
        print(table.cold(label, found), flush=True)
        results.add("cold", {"op": label, "D": sizes[0].dim, **found})
    print()


def speeds(chosen: Sequence[Chosen], results: Results, until: float, peer_json: Path) -> None:
    """Forward, and forward and backward."""
    where, published = peers(peer_json)
    copy, matmul = results.header["copy TB/s"], results.header["matmul TFLOP/s"]
    print(f"ms; peer: {where}\n\n{table.head()}", flush=True)
    for name, kind, size in chosen:
        row = {"op": name, "kind": kind, "B": size.batch, "T": size.time, "D": size.dim,
               "matmul": matmul}  # fmt: skip
        if time.monotonic() > until:
            row["wrong"] = "not begun within the limit"
        else:
            row = guarded(row, partial(timed, name, kind, size, copy))
        print(table.speed(row, published.get(key(row))), flush=True)
        results.add("speed", row)


def decodes(names: Sequence[str], size: Size, results: Results) -> None:
    """One token."""
    print(f"\n{table.head(table.DECODE)}", flush=True)
    copy = results.header["copy TB/s"]
    for name in names:
        row = guarded({"op": name, "D": size.dim}, partial(decode.measure, name, size, copy))
        print(table.decode(row), flush=True)
        results.add("decode", row)


def on_gpu(
    chosen: Sequence[Chosen], decoded: Sequence[str], sizes: Sequence[Size], results: Results, *,
    cold: bool, limit: float, peer_json: Path,
) -> None:  # fmt: skip
    """Ceilings, first calls, then what is chosen, then a token of each decoded op."""
    until = time.monotonic() + limit
    results.header.update(ceilings())
    torch.cuda.empty_cache()
    decoded = [name for name in decode.STEPS if name in decoded]
    if cold:
        labels = dict.fromkeys(f"{n} {kind}".removesuffix(" ours") for n, kind, _ in chosen)
        labels |= dict.fromkeys(f"{name} decode" for name in decoded)
        compile_apart(list(labels), sizes, results, limit / 2)
    if chosen:
        speeds(chosen, results, until, peer_json)
    if decoded:
        decodes(decoded, sizes[0]._replace(batch=decode.BATCH, time=1), results)
    print({name: results.header[name] for name in ("copy TB/s", "matmul TFLOP/s")})


def on_cpu(names: Sequence[str], sizes: Sequence[Size], results: Results) -> None:
    """The compiled chunked form beside the token loop."""
    results.header["threads"] = torch.get_num_threads()
    print(f"threads: {torch.get_num_threads()}\n\n{table.head(table.CPU)}", flush=True)
    for size in sizes:
        for name in (name for name in cpu.LOOPS if name in names):
            row = {"op": name, "B": size.batch, "T": size.time, "D": size.dim}
            row = guarded(row, partial(cpu.measure, name, size))
            print(table.cpu(row), flush=True)
            results.add("cpu", row)
