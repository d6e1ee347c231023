"""Times of every op: forward, forward + backward, peak memory, the first call, a decoding step.

    python tests/bench/speed.py --cold --json speed.json          # on a GPU: the whole table
    python tests/bench/speed.py --shape 1,131072 --json long.json
    python tests/bench/speed.py --shape 16,1024 --shape 4,4096 --shape 2,8192 --shape 1,16384 \
        --op simple_gla --op softmax --json curve.json
    python tests/bench/speed.py --no-table --cold --decode --json decode.json
    python tests/bench/speed.py --device cpu --json cpu.json
    python tests/bench/report.py *.json                           # docs/performance.md

One row an op and shape, bf16, medians of ``triton.testing.do_bench`` in ms, as the call is made
and as a CUDA graph of it (``kernels``). floor: each input read once and each output written once,
at the speed of a copy measured in the same run; the columns after it are the kernels' shares of
that copy and of a matmul, forward and backward. An op whose values differ from the float64
definition, or from its own in a second run, is not timed. Compiling stands apart: with ``--cold``
every op is first called in a process of its own, whose seconds are the cold start. Beside ours
stand the peer's published times, or with ``--peer`` its ops in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from timing.draw import Size
from timing.measure import first_call
from timing.peer import PEERS
from timing.results import PUBLISHED, Results
from timing.rows import rows
from timing.run import on_cpu, on_gpu

SHAPES = {"cuda": ["8,2048", "1,32768"], "cpu": ["1,2048"]}
WIDTH = {"cuda": (16, 128), "cpu": (8, 64)}
ROWS = rows(1, 16)


def parsed() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--op", action="append", choices=ROWS, help="default all")
    add("--shape", action="append", help="B,T; default 8,2048 and 1,32768; on a CPU 1,2048")
    add("--heads", type=int, help="default 16; on a CPU 8")
    add("--dim", type=int, help="channels of a head; default 128; on a CPU 64")
    add("--cold", "--warm", action="store_true", help="first calls in parallel processes, before")
    add("--compile", action="store_true", help="also ops with PyTorch around, by torch.compile")
    add("--peer", action="store_true", help="time the peers' ops too")
    add("--peer-json", type=Path, default=PUBLISHED, help="the peer's published times")
    add("--decode", action="store_true", help="also one token of every recurrent op")
    add("--no-table", action="store_true", help="leave the table of forward and backward out")
    add("--limit", type=float, default=3600.0, help="seconds after which no row is begun")
    add("--commit", help="stated in the JSON; default git's")
    add("--json", type=Path, help="also write the rows here, as they come")
    add("--first-call", help=argparse.SUPPRESS)
    found = options.parse_args()
    heads, dim = WIDTH[found.device]
    found.op = found.op or list(ROWS)
    found.sizes = [
        Size(*map(int, shape.split(",")), found.heads or heads, found.dim or dim)
        for shape in found.shape or SHAPES[found.device]
    ]
    return found


def chosen(options: argparse.Namespace) -> list[tuple[str, str, Size]]:
    """(op, kind, size) of every row: ours first, so that a limit cuts the others."""
    names = {
        "ours": [] if options.no_table else options.op,
        "compiled": [name for name in options.op if options.compile and ROWS[name].around],
        "peer": [name for name in options.op if options.peer and name in PEERS],
    }
    return [(n, kind, size) for kind in names for size in options.sizes for n in names[kind]]


def main() -> None:
    options = parsed()
    if options.first_call:
        print(json.dumps(first_call(options.first_call, options.sizes)))
        return
    results = Results(options.device, options.json, options.commit)
    print(", ".join(f"{name} {text}" for name, text in results.header.items()), flush=True)
    if options.device == "cpu":
        on_cpu(options.op, options.sizes, results)
    else:
        on_gpu(
            chosen(options), options.op if options.decode else [], options.sizes, results,
            cold=options.cold, limit=options.limit, peer_json=options.peer_json,
        )  # fmt: skip


if __name__ == "__main__":
    main()
