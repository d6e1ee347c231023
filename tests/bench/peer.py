"""Every mixer against the layer of flash-linear-attention with the same weights, on a GPU.

    python tests/bench/peer.py [--mixer NAME ...] [--jobs 8]

The peer's state_dict is loaded with strict=True; both layers then take the same input in bf16, and
each is compared with ours in float64 on the CPU: ||y - y64|| / ||y64||. Needs
flash-linear-attention; its softmax layers also need flash-attn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flacompile.layers import MIXERS

PUBLISHED = Path(__file__).resolve().parents[1] / "published_layers.json"
BATCH, TIME = 2, 200


def peer_layer(name: str, config: dict[str, Any]) -> nn.Module:
    """The published layer; some ask for arguments that say nothing about it."""
    module = "mamba" if name == "mamba" else name
    cls = getattr(import_module(f"fla.layers.{module}"), MIXERS[name].__name__)
    config = {"layer_idx": 0} | config
    if name in ("based", "rebased"):
        config["num_key_value_heads"] = config.get("num_heads", 12 if name == "based" else 16)
    if name == "based":
        config.pop("layer_idx")
    if name == "rwkv7":
        config = {"num_hidden_layers": 4} | config
    return cls(**config)


def errors(name: str, config: dict[str, Any]) -> tuple[float, float, float]:
    """Ours against float64, the peer's against it, and the two against each other."""
    torch.manual_seed(0)
    peer = peer_layer(name, config).eval()
    ours = MIXERS[name](MIXERS[name].Config(**config)).eval()
    ours.load_state_dict(peer.state_dict(), strict=True)
    x = torch.randn(BATCH, TIME, ours.config.hidden_size).bfloat16()
    peer, ours = peer.bfloat16().cuda(), ours.bfloat16()
    with torch.no_grad():
        truth = ours.double()(x.double())[0]
        got = ours.bfloat16().cuda()(x.cuda())[0].double().cpu()
        theirs = peer(x.cuda())
    theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).double().cpu()
    pairs = ((got, truth), (theirs, truth), (got, theirs))
    a, b, c = (((x - y).norm() / y.norm()).item() for x, y in pairs)
    return a, b, c


def rows(name: str) -> list[str]:
    """A line of the table for each published config, made in a process of its own."""
    command = [sys.executable, __file__, "--alone", "--mixer", name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("|")]
    return lines + [f"| {name} | {run.stderr.splitlines()[-1][:160]} |"] * (run.returncode != 0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mixer", action="append", choices=sorted(MIXERS), help="default all")
    options.add_argument("--jobs", type=int, default=8, help="mixers at the same time")
    options.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = options.parse_args()
    names = options.mixer or sorted(json.loads(PUBLISHED.read_text()))
    if not options.alone:
        print("| mixer | config | ours | peer | ours against peer |\n|---|---|---|---|---|")
        with ThreadPoolExecutor(options.jobs) as pool:
            for done in as_completed(pool.submit(rows, name) for name in names):
                print("\n".join(done.result()), flush=True)
        return
    for entry in json.loads(PUBLISHED.read_text())[names[0]]:
        config = entry["config"] if names[0] != "rwkv7" else entry["config"] | {"layer_idx": 0}
        label = ", ".join(f"{key}={value}" for key, value in entry["config"].items()) or "default"
        try:
            cells = " | ".join(f"{error:.1e}" for error in errors(names[0], config))
        except Exception as error:  # of the peer's kernels, which do not take every shape
            cells = f"{type(error).__name__}: {error}"[:120].replace("\n", " ")
        print(f"| {names[0]} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
