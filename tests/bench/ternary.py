"""Times of a square linear layer: two-bit weights beside torchao's int8 and int4, bf16 and fp32.

    python tests/bench/ternary.py [--hidden 2048 ...] [--batch 1 ...] [--device cpu] [--threads 2]

One row a device, hidden size, number of rows and kind, all compiled but bf16, fp32 and the eager
one: the best of many runs in microseconds, the bits of a weight with its scales, and how many times
faster than bf16 and fp32. floor, on a GPU: the bytes of the weight, x and y at the speed of a copy
measured in the same run; a CPU has the smaller weights in its caches. A kind whose values are wrong
is not timed: ours must equal sums of integers bit for bit, the others must be near the product in
float64. On a GPU x is bf16, on a CPU fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig

from flacompile import Ternary, quantize_
from flacompile.ops.ternary import round_rows, round_weight

HIDDEN, BATCH = (2048, 4096, 8192), (1, 512)
CONFIGS = {
    "ternary": Ternary(),
    "torchao int8": Int8DynamicActivationInt8WeightConfig(),
    "torchao int4": Int4WeightOnlyConfig(group_size=128),
}
INT4_ON_CPU = PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False)
BOUNDS = {"torchao int8": 0.05, "torchao int4": 0.2, "bf16": 0.02, "fp32": 1e-4}


def best(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Microseconds of the fastest of as many runs as fit, each waited for."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            wait()
            fastest = min(fastest, start.elapsed_time(stop) * 1e3)
        else:
            begin = time.perf_counter()
            call()
            fastest = min(fastest, (time.perf_counter() - begin) * 1e6)
    return fastest


def replayed(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """On a GPU a CUDA graph of the call, so that kernels are timed and not their launches."""
    call()
    if device == "cpu":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_speed() -> float:
    """Bytes a microsecond on the GPU, read and written."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source), "cuda", 1.0)


def stored(weight: Tensor) -> int:
    """Bytes of a weight with its scales."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(stored(getattr(weight, name)) for name in names)


def wrong(kind: str, y: Tensor, x: Tensor, weight: Tensor) -> str | None:
    """What is wrong with the values of a kind, or None."""
    if kind.startswith("ternary"):
        codes, scale = round_weight(weight)
        X, r = round_rows(x)
        want = ((X.double() @ codes.double().T).float() * scale * r).to(x.dtype)
        return None if torch.equal(y, want) else f"{(y - want).abs().max()} off"
    want = x.double() @ weight.double().T
    error = ((y.double() - want).norm() / want.norm()).item()
    return None if error < BOUNDS[kind] else f"relative error {error:.2g}"


def kinds(layer: nn.Linear, device: str) -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Kind -> what makes the layer and the function to time."""

    def quantised(config: Any, compiled: bool) -> tuple[nn.Module, Any]:
        low = quantize_(deepcopy(layer), config)
        return low, torch.compile(low, fullgraph=True, dynamic=False) if compiled else low

    makers: dict[str, Any] = {
        kind: lambda config=config: quantised(config, True) for kind, config in CONFIGS.items()
    }
    if device == "cpu":
        makers["torchao int4"] = lambda: quantised(INT4_ON_CPU, True)
    makers["ternary, eager"] = lambda: quantised(Ternary(), False)
    makers["bf16"] = lambda: (low := deepcopy(layer).bfloat16(), lambda x: low(x.bfloat16()))
    makers["fp32"] = lambda: (wide := deepcopy(layer).float(), lambda x: wide(x.float()))
    return makers


@torch.no_grad()
def measure(device: str, hidden: int, batch: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of one shape."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = nn.Linear(hidden, hidden, bias=False, device=device, dtype=dtype)
    x, found = torch.randn(batch, hidden, device=device).to(dtype), []
    speed = copy_speed() if device == "cuda" else float("inf")
    for kind, make in kinds(layer, device).items():
        torch._dynamo.reset()
        row: dict[str, Any] = {"device": device, "hidden": hidden, "batch": batch, "kind": kind}
        try:
            low, call = make()
            y = call(x)
        except Exception as error:  # of another library: say so in the table
            found.append(row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            continue
        if fault := wrong(kind, y, x, layer.weight):
            found.append(row | {"error": f"not timed: {fault}"})
            continue
        size = stored(low.weight)  # type: ignore[arg-type]
        row |= {"us": best(replayed(lambda call=call: call(x), device), device, seconds)}
        row |= {"bits": 8 * size / layer.weight.numel(), "floor": (size + 2 * x.nbytes) / speed}
        found.append(row)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    times = {row["kind"]: row["us"] for row in rows if "us" in row}
    for row in rows:
        start = "| {device} | {hidden} | {batch} | {kind} |".format(**row)
        if "error" in row:
            print(f"{start} {row['error'][:60]} |", flush=True)
            continue
        ratios = " | ".join(f"{times[k] / row['us']:.2f}x" for k in ("bf16", "fp32"))
        print(f"{start} {row['us']:.0f} | {row['floor']:.1f} | {row['bits']:.3f} | {ratios} |",
              flush=True)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    options.add_argument("--batch", type=int, nargs="+", default=BATCH)
    options.add_argument("--device", choices=["cpu", "cuda"], help="default: both that are there")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--seconds", type=float, default=3.0, help="of runs for each row")
    options.add_argument("--json", type=Path, help="also write the rows here")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    print("| device | hidden | batch | kind | µs | floor | bits | against bf16 | against fp32 |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for device in [options.device] if options.device else there:
        for hidden in options.hidden:
            for batch in options.batch:
                found += (rows := measure(device, hidden, batch, options.seconds))
                show(rows)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
