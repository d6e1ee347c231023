"""Times of a square linear layer: two-bit weights beside torchao's int8 and int4, bf16 and fp32.

    python tests/bench/ternary.py [--device cpu] [--hidden 2048 ...] [--batch 1 ...] [--json FILE]

First ours is checked at every shape: it must equal sums of integers bit for bit, twice, in outputs
that were NaN before. Of the others, whose values must be near the product in float64, a kind that
is not is named and not timed.

One row a hidden size, number of rows and kind. Calls go round so many copies of the weight that
none is in a cache, as when a model decodes. On a GPU the first time is of the fastest round as a
CUDA graph, where kernels are timed and not their launches, over its calls; torchao's are compiled
for it, which fuses their rounding, ours are the same kernels either way. On a CPU it is the fastest
call, compiled, ours too. The second time is uncompiled, each call through Python.

bits are those of a weight with its scales. floor is the time for the bytes of the weight, x and y
at the speed of a copy measured in the same run; a launch is what an empty kernel takes in a graph,
which no bytes account for. On a GPU x is bf16, on a CPU fp32. ``--tuned`` lets torchao set Inductor
to tune, which takes minutes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import deterministic
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)

from flacompile import Ternary, quantize_
from flacompile.ops.ternary import round_rows, round_weight

HIDDEN, BATCH = (2048, 4096, 8192), {"cuda": (1, 8, 64, 512), "cpu": (1, 512)}
CACHES = {"cuda": 2**27, "cpu": 2**28}  # bytes, more than any cache holds
BOUNDS = {"int8 dynamic": 0.05, "int8 weights": 0.05, "int4 weights": 0.2, "bf16": 0.02,
          "fp32": 1e-4}  # fmt: skip
HEAD = ("hidden", "batch", "kind", "µs", "eager µs", "bits", "against bf16")
MORE = {"cuda": ("floor µs", "over floor", "over floor and launch"), "cpu": ("against fp32",)}


def configs(device: str, tuned: bool) -> dict[str, Any]:
    """Kind -> config, or the dtype of plain weights; what others are compared with comes first."""
    int4 = Int4WeightOnlyConfig if device == "cuda" else PrototypeInt4WeightOnlyConfig
    layout = {"int4_packing_format": "tile_packed_to_4d"} if device == "cuda" else {}
    return {
        "bf16": torch.bfloat16,
        **({"fp32": torch.float32} if device == "cpu" else {}),
        "ternary": Ternary(),
        "int8 dynamic": Int8DynamicActivationInt8WeightConfig(set_inductor_config=tuned),
        "int8 weights": Int8WeightOnlyConfig(set_inductor_config=tuned),
        "int4 weights": int4(group_size=128, set_inductor_config=tuned, **layout),
    }


def fastest(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Microseconds of the fastest of as many calls as fit, each waited for."""
    found, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            found = min(found, start.elapsed_time(stop) * 1e3)
        else:
            call()
            found = min(found, (time.perf_counter() - begin) * 1e6)
    return found


def graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of the call."""
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    return recorded.replay


@functools.cache
def copy_speed(device: str) -> float:
    """Bytes a microsecond, read and written, on a GPU."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device, 0.5)


@functools.cache
def launch(device: str) -> float:
    """Microseconds from one kernel that does nothing to the next, in a graph."""
    one = torch.zeros(1, device=device)

    def round() -> None:
        for _ in range(100):
            one.add_(1)

    return fastest(graph(round), device, 0.2) / 100


def parts_of(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is stored as."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight.detach()]
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in parts_of(getattr(weight, name))]


def drawn(device: str, hidden: int, batch: int) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = nn.Linear(hidden, hidden, bias=False, device=device, dtype=dtype)
    return layer, torch.randn(batch, hidden, device=device).to(dtype)


def check(device: str, hidden: int, batch: int) -> None:
    """Raises where ours is not the sum of integers."""
    layer, x = drawn(device, hidden, batch)
    codes, scale = round_weight(layer.weight)
    X, r = (part.to(device) for part in round_rows(x.cpu()))  # a GPU divides by multiplying
    want = ((X.double() @ codes.double().T).float() * scale * r).to(x.dtype)
    quantize_(layer, Ternary())
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # with NaN
    first, second = layer(x), layer(x)
    torch.use_deterministic_algorithms(False)
    off = (first.float() - want.float()).abs()
    if not (first.equal(want) and second.equal(want)):
        raise ValueError(
            f"hidden {hidden}, batch {batch}: expected the sums of integers, got "
            f"{int((off != 0).sum())} other values, at most {off.max()} off"
        )


def weights_of(layer: nn.Linear, config: Any) -> Iterator[Tensor]:
    """Copies of a kind's weight."""
    low = deepcopy(layer)
    if isinstance(config, torch.dtype):
        low.to(config)
    else:
        quantize_(low, config)
    while True:
        yield deepcopy(low.weight).detach()


def measure(
    kind: str, config: Any, linear: Any, device: str, hidden: int, batch: int, seconds: float
) -> dict[str, Any]:
    """The times of one kind at one shape, or what is wrong with it."""
    layer, x = drawn(device, hidden, batch)
    try:
        weights = weights_of(layer, config)
        weight = next(weights)
        low = x.to(weight.dtype)
        y = linear(low, weight)
        F.linear(low, weight)
    except Exception as error:  # of another library: say so in the table
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    want = x.double() @ layer.weight.double().T
    off = ((y.double() - want).norm() / want.norm()).item()
    if off > BOUNDS.get(kind, float("inf")):
        return {"error": f"not timed: relative error {off:.2g}"}
    size = sum(part.nbytes for part in parts_of(weight))
    copies = [weight, *itertools.islice(weights, CACHES[device] // size)]

    def round(function: Any = F.linear) -> None:
        for weight in copies:
            function(low, weight)

    if device == "cuda":
        calls = graph(lambda: round(linear)), round
        us, eager = (fastest(call, device, seconds) / len(copies) for call in calls)
    else:
        turn = itertools.cycle(copies)
        us, eager = (
            fastest(lambda function=function: function(low, next(turn)), device, seconds)
            for function in (linear, F.linear)
        )
    row = {"us": us, "eager": eager, "bits": 8 * size / hidden**2}
    if device == "cuda":
        row |= {"floor": (size + low.nbytes + y.nbytes) / copy_speed(device)}
    return row


def text(row: dict[str, Any], rows: list[dict[str, Any]], device: str) -> str:
    """A line of the table; rows are those before it."""
    start = "| {hidden} | {batch} | {kind} | ".format(**row)
    if "error" in row:
        return f"{start}{row['error'][:70]} |"
    same = [r for r in [*rows, row] if (r["hidden"], r["batch"]) == (row["hidden"], row["batch"])]
    times = {r["kind"]: r["us"] for r in same if "us" in r}
    faster = {k: f"{times[k] / row['us']:.2f}x" if k in times else "" for k in ("bf16", "fp32")}
    cells = [f"{row['us']:.2f}", f"{row['eager']:.1f}", f"{row['bits']:.3f}", faster["bf16"]]
    if device == "cuda":
        floors = row["floor"], row["floor"] + launch(device)
        cells += [f"{row['floor']:.2f}", *(f"{row['us'] / floor:.2f}" for floor in floors)]
    else:
        cells.append(faster["fp32"])
    return start + " | ".join(cells) + " |"


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    options.add_argument("--batch", type=int, nargs="+")
    options.add_argument("--kinds", nargs="+", help="default: all")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--seconds", type=float, help="of rounds for each time")
    options.add_argument("--tuned", action="store_true", help="torchao's own Inductor settings")
    options.add_argument("--json", type=Path, help="also write the rows here")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # a graph for each hidden size, and more for few rows
    device, cuda = options.device, options.device == "cuda"
    seconds = options.seconds or (0.05 if cuda else 2.0)
    shapes = list(itertools.product(options.hidden, options.batch or BATCH[device]))
    for shape in shapes:
        check(device, *shape)
    if cuda:
        where = f"{torch.cuda.get_device_name()}, copies at {copy_speed(device) / 1e6:.2f} TB/s, "
        where += f"a launch {launch(device):.2f} µs"
    else:
        where = f"CPU, threads: {options.threads}"
    print(f"{where}; ours exact at {len(shapes)} shapes, twice\n")
    head = (*HEAD, *MORE[device])
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    rows: list[dict[str, Any]] = []
    for kind, config in configs(device, options.tuned).items():
        torch._dynamo.reset()
        plain = isinstance(config, torch.dtype) or (cuda and kind == "ternary")
        linear = F.linear if plain else torch.compile(_linear, fullgraph=True, dynamic=cuda)
        for hidden, batch in shapes if kind in (options.kinds or [kind]) else ():
            row = {"device": device, "hidden": hidden, "batch": batch, "kind": kind}
            row |= measure(kind, config, linear, device, hidden, batch, seconds)
            print(text(row, rows, device), flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


if __name__ == "__main__":
    main()
