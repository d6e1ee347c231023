"""Times of every op on a GPU: forward, forward + backward, peak memory and the first call.

    python tests/bench/speed.py [--op NAME ...] [--shape B,T ...] [--peer] [--json speed.json]

One row an op and shape, H = 16 heads of K = V = 128 channels in bf16, medians of many runs. floor:
each input read once and each output written once at the speed of a copy measured in the same run;
a backward reads the inputs and the output's gradient and writes the inputs' gradients. An op whose
values differ from the float64 token loop is not timed. With ``--peer``, flash-linear-attention's
op on the same tensors stands beside ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile import ops
from flacompile.layers import MIXERS
from flacompile.ops import spec

HEADS, DIM = 16, 128
SHAPES = ((8, 2048), (1, 32768))
BOUND = 2e-2  # relative norm of an error, in bf16, of o and of each gradient


class Draw:
    """Tensors of one shape on the GPU."""

    def __init__(self, batch: int, time: int, heads: int, dim: int, dtype: torch.dtype):
        self.rows, self.heads, self.dim, self.dtype = (batch, time), heads, dim, dtype
        torch.manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*self.rows, *shape, device="cuda").to(self.dtype)

    def head(self, dim: int | None = None) -> Tensor:
        return self.normal(self.heads, dim or self.dim)

    def decay(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        g = F.logsigmoid(torch.randn(*self.rows, *shape, device="cuda") + 2) / 4
        return g.to(dtype or torch.float32)


class Row(NamedTuple):
    """An op to time: its tensors, ours, the token loop and the peer's; each gives o first."""

    draw: Callable[[Draw], list[Tensor]]
    ours: Callable[..., Any]
    loop: Callable[..., Any]
    peer: Callable[..., Any] | None = None


def qkv(d: Draw, *more: Tensor) -> list[Tensor]:
    k = F.normalize(d.head().float(), dim=-1).to(d.dtype)
    return [d.head(), k, d.head(), *more]


def fla(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"fla.ops.{module}"), name)


def delta(d: Draw, g: Tensor) -> list[Tensor]:
    return qkv(d, g, d.normal(d.heads).float().sigmoid())


def dplr(d: Draw) -> list[Tensor]:
    kappa = F.normalize(d.head().float(), dim=-1)
    g = -0.6 * torch.sigmoid(torch.randn(*d.rows, d.heads, d.dim, device="cuda") - 2)
    a, b = -kappa.to(d.dtype), (kappa * d.head().float().sigmoid()).to(d.dtype)
    return [d.head(), d.head() * 0.1, d.head(), g, a, b]


def selective(d: Draw) -> list[Tensor]:
    width = d.heads * d.dim
    A = -torch.rand(width, 16, device="cuda") * 8 - 1
    dt = F.softplus(torch.randn(*d.rows, width, device="cuda") - 4)
    return [d.normal(width), dt, A, d.normal(1, 16), d.normal(1, 16)]


def mamba2(C: Tensor, B: Tensor, x: Tensor, g: Tensor, f: Callable[..., Any]) -> Any:
    """One group of B and C for all heads, [B, T, 1, N]."""
    heads = x.shape[2]
    return f(C.expand(-1, -1, heads, -1), B.expand(-1, -1, heads, -1), x, g)


def rwkv6_loop(r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Any:
    """Reads before it writes: r of the next token, its decay undone, is a plain read."""
    early = F.pad(r[:, 1:], (0, 0, 0, 0, 0, 1))
    o, final = spec.linear_attn(early, k, v, w, scale=1.0)
    return F.pad(o[:, :-1], (0, 0, 0, 0, 1, 0)), final


def rwkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Any:
    mixer: Any = object.__new__(MIXERS["rwkv6"])
    mixer.__dict__["scale"] = 1.0
    return mixer.mix((r, k, v, w), None, None)


def by_head(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: f(*tensors, scale=DIM**-0.5)


linear, decayed = by_head(ops.linear_attn), by_head(spec.linear_attn)
ROWS: dict[str, Row] = {
    "linear_attn": Row(qkv, linear, decayed,
                       lambda q, k, v: fla("linear_attn", "chunk_linear_attn")(
                           q, k, v, scale=DIM**-0.5, normalize=False)),
    "simple_gla": Row(lambda d: qkv(d, d.decay(d.heads)), linear, decayed,
                      lambda q, k, v, g: fla("simple_gla", "chunk_simple_gla")(q, k, v, g)),
    "gla": Row(lambda d: qkv(d, d.decay(d.heads, d.dim)), linear, decayed,
               lambda q, k, v, g: fla("gla", "chunk_gla")(q, k, v, g)),
    "rwkv6": Row(lambda d: qkv(d, d.decay(d.heads, d.dim)), rwkv6, rwkv6_loop),
    "mamba2": Row(lambda d: [d.normal(1, d.dim), d.normal(1, d.dim), d.head(), d.decay(d.heads)],
                  partial(mamba2, f=linear), partial(mamba2, f=decayed)),
    "gated_delta_rule": Row(lambda d: delta(d, d.decay(d.heads)), by_head(ops.delta_rule),
                            by_head(spec.delta_rule),
                            lambda q, k, v, g, beta: fla(
                                "gated_delta_rule", "chunk_gated_delta_rule")(q, k, v, g, beta)),
    "kda": Row(lambda d: delta(d, d.decay(d.heads, d.dim)), by_head(ops.delta_rule),
               by_head(spec.delta_rule),
               lambda q, k, v, g, beta: fla("kda", "chunk_kda")(q, k, v, g, beta)),
    "rwkv7": Row(dplr, by_head(ops.dplr), by_head(spec.dplr),
                 lambda q, k, v, g, a, b: fla("rwkv7", "chunk_rwkv7")(
                     q, g, k, v, a, b, scale=DIM**-0.5)),
    "hgrn": Row(lambda d: [d.decay(d.heads * d.dim), d.normal(d.heads * d.dim)], ops.scan,
                spec.scan, lambda g, x: fla("hgrn", "fused_recurrent_hgrn")(x, g)),
    "mamba": Row(selective, ops.selective_scan, spec.selective_scan),
    "conv": Row(lambda d: [d.normal(d.heads * d.dim),
                           torch.randn(d.heads * d.dim, 4, device="cuda").to(d.dtype)],
                ops.conv, spec.conv),
}  # fmt: skip


def softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def both(f: Callable[..., Any], tensors: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """Gradients of one forward and backward."""
    return torch.autograd.grad(f(*tensors)[0], tensors, do)


def worst(row: Row, f: Callable[..., Any], time: int) -> float:
    """Largest relative error of o and the gradients at a few heads, against float64."""
    args = leaves(row.draw(Draw(1, time, 2, DIM, torch.bfloat16)))
    wide = leaves([x.double() for x in args])
    got, want = f(*args)[0], row.loop(*wide)[0]
    do = torch.randn_like(got)
    ours = (got, *torch.autograd.grad(got, args, do))
    exact = (want, *torch.autograd.grad(want, wide, do.double()))
    pairs = zip(ours, exact, strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def measure(f: Callable[..., Any], tensors: list[Tensor]) -> dict[str, float]:
    """Milliseconds, and MiB of peak above what was there before."""
    from triton.testing import do_bench

    begin = time.perf_counter()
    o = f(*tensors)[0]
    do = torch.randn_like(o)
    del o
    both(f, tensors, do)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(f, tensors, do)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        forward = do_bench(lambda: f(*tensors), return_mode="median")
    whole = do_bench(lambda: both(f, tensors, do), return_mode="median")
    return {"forward": forward, "both": whole, "MiB": peak, "first": first}


def copy_speed() -> float:
    """Bytes a millisecond, read and written."""
    from triton.testing import do_bench

    x = torch.empty(2**30, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / do_bench(lambda: y.copy_(x), return_mode="median")


def floors(tensors: list[Tensor], o: Tensor, speed: float) -> tuple[float, float]:
    inputs = sum(x.numel() * x.element_size() for x in tensors)
    output = o.numel() * o.element_size()
    return (inputs + output) / speed, (3 * inputs + 2 * output) / speed


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--op", action="append", choices=[*ROWS, "softmax"], help="default all")
    options.add_argument("--shape", action="append", help="B,T; default 8,2048 and 1,32768")
    options.add_argument("--peer", action="store_true", help="time flash-linear-attention too")
    options.add_argument("--json", type=Path, help="also write the rows here")
    options = options.parse_args()
    shapes = [tuple(map(int, s.split(","))) for s in options.shape or ()] or SHAPES
    speed = copy_speed()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {speed / 1e9:.2f} TB/s")
    print("| op | B x T | error | forward ms | / floor | both ms | / floor | MiB | first call s |")
    print("|---" * 9 + "|", flush=True)
    found = []
    for name in options.op or [*ROWS, "softmax"]:
        row = ROWS.get(name) or Row(qkv, softmax, softmax)
        candidates = {"": row.ours} | ({"peer": row.peer} if options.peer and row.peer else {})
        for (kind, f), (batch, length) in ((c, s) for c in candidates.items() for s in shapes):
            label = f"{name} {kind}".strip()
            try:
                error = worst(row, f, 1000)
                if not kind and not error < BOUND:
                    print(f"| {label} | {batch} x {length} | {error:.1e}: wrong, not timed |")
                    continue
                tensors = leaves(row.draw(Draw(batch, length, HEADS, DIM, torch.bfloat16)))
                got = measure(f, tensors)
                low, high = floors(tensors, tensors[-1] if name == "x" else f(*tensors)[0], speed)
            except Exception as reason:  # the peer's, which refuse some shapes; ours, out of memory
                print(f"| {label} | {batch} x {length} | {type(reason).__name__}: {reason} |"[:200])
                continue
            print(f"| {label} | {batch} x {length} | {error:.1e} | {got['forward']:.3f} "
                  f"| {got['forward'] / low:.1f} | {got['both']:.3f} | {got['both'] / high:.1f} "
                  f"| {got['MiB']:.0f} | {got['first']:.1f} |", flush=True)  # fmt: skip
            found.append({"op": label, "B": batch, "T": length, "error": error,
                          "floor": low, "floor both": high, **got})  # fmt: skip
            del tensors
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
