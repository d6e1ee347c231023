"""A training step of a whole language model: ours and flash-linear-attention's, eager and compiled.

    python tests/bench/training.py [--model gla --model gated_deltanet] [--peer] [--json FILE]
        [--rows 8] [--tokens 2048] [--width 1024] [--layers 24]

The defaults are the models of 340 million parameters. A step is forward, cross entropy, backward
and fused AdamW; weights in fp32, bf16 autocast on a GPU, fp32 on a CPU. A row a model and way:
thousands of tokens a second (median of the steps after the first three), peak memory, seconds of
the first step, graphs of the compiled step, and the loss after as many steps from equal weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HEADS = {"gla": {"num_heads": 4}, "gated_deltanet": {"num_heads": 4, "head_dim": 256}}
STEPS, WARM = 13, 3


def config_fields(name: str, width: int, layers: int) -> dict[str, Any]:
    fields = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 32000}
    head = HEADS[name].get("head_dim", 0) * width // 1024
    return fields | HEADS[name] | ({"head_dim": head} if head else {})


def build(package: str, name: str, width: int, layers: int) -> nn.Module:
    """``flacompile.lm``'s or ``fla.models``' class of a model type, at random weights."""
    models = import_module({"ours": "flacompile.lm", "peer": "fla.models"}[package])
    stem = {"gla": "GLA", "gated_deltanet": "GatedDeltaNet"}[name]
    torch.manual_seed(0)
    config = getattr(models, f"{stem}Config")(**config_fields(name, width, layers))
    return getattr(models, f"{stem}ForCausalLM")(config)


def measure(model: nn.Module, ids: Tensor, compiled: bool) -> dict[str, Any]:
    """Steps on one batch."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cuda = ids.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=cuda):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    run = torch.compile(loss_of) if compiled else loss_of
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], torch.tensor(0.0)
    for _ in range(STEPS):
        begin = time.perf_counter()
        loss = run(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {
        "thousand tokens/s": ids.numel() / statistics.median(seconds[WARM:]) / 1e3,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
        "first step s": seconds[0],
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "loss": loss.item(),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", action="append", choices=HEADS, help="default both")
    options.add_argument("--peer", action="store_true", help="flash-linear-attention's too")
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--width", type=int, default=1024)
    options.add_argument("--layers", type=int, default=24)
    options.add_argument("--json", type=Path, help="also write the rows here")
    options = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {options.rows} x {options.tokens} tokens")
    found: list[dict[str, Any]] = []
    for name in options.model or HEADS:
        for package in ("ours", "peer") if options.peer else ("ours",):
            for compiled in (False, True):
                model = build(package, name, options.width, options.layers).to(device)
                parameters = sum(p.numel() for p in model.parameters())
                ids = torch.randint(32000, (options.rows, options.tokens), device=device)
                way = "compiled" if compiled else "eager"
                row: dict[str, Any] = {"model": name, "package": package, "way": way}
                try:
                    row |= measure(model, ids, compiled)
                except Exception as reason:  # the peer's, under a compiler it does not know
                    row["error"] = f"{type(reason).__name__}: {str(reason)[:150]}"
                if not found:
                    print("| model | parameters | " + " | ".join(list(row)[1:]) + " |")
                    print("|---" * (len(row) + 1) + "|")
                cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values())
                first, *rest = cells
                print(f"| {first} | {parameters / 1e6:.0f}M | {' | '.join(rest)} |", flush=True)
                found.append(row)
                if options.json:  # now, so that a time limit loses only what comes after
                    options.json.write_text(json.dumps(found, indent=1))
                del model
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
