"""Errors of every op against float64: output, state and each gradient.

    python tests/bench/errors.py [--device cuda] [--jobs 16] [--op NAME ...] [--json errors.json]

With ``--jobs`` each variant of an op and dtype has a process of its own, so many at a time: most
of the time goes into compiling kernels. One row an op, variant, dtype and shape, of relative norms
||x - x64|| / ||x64||, where x64 is the float64 token loop on the same rounded inputs. On a CPU the
same table is of the CPU form.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from op_cases import OPS, Args, Draw, error, function, gradients, leaves, loop, rounded

LENGTHS = (100, 1000)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def errors(name: str, args: Args) -> dict[str, float]:
    """Relative errors by name; NaN counts as infinite."""
    op = OPS[name]
    args, wide = leaves(args), leaves([x if x is None else x.double() for x in args])
    got = function(name)(*args[:-1], **op.options, state=args[-1])
    want = loop(name)(*wide[:-1], **op.options, state=wide[-1])
    found = dict(zip(("output", "final state"), map(error, got, want), strict=True))
    pairs = zip((*op.names, "state"), gradients(got, args), gradients(want, wide), strict=True)
    found |= {f"d {key}": error(a, b) for key, a, b in pairs if b is not None}
    return {key: x if x == x else float("inf") for key, x in found.items()}


def summary(rows: list[dict]) -> list[str]:
    """The largest error of each op and dtype: output, state, gradients, and those of decays."""
    lines = ["| op | dtype | output | state | gradients | gradients of decays |", "|---" * 6 + "|"]
    for name, dtype in itertools.product(OPS, DTYPES.values()):
        found = [r["errors"] for r in rows if (r["op"], r["dtype"]) == (name, str(dtype))]
        decays = {f"d {key}" for key in OPS[name].decays}
        given = {key for errors in found for key in errors} - {"output", "final state"}
        groups = ({"output"}, {"final state"}, given - decays, given & decays)
        cells = [
            f"{max(x for r in found for k, x in r.items() if k in group):.1e}" if group else ""
            for group in groups
            if found
        ]
        lines += [f"| `{name}` | {str(dtype)[6:]} | {' | '.join(cells)} |"] if found else []
    return lines


def in_processes(options: argparse.Namespace) -> None:
    """Each variant and dtype by a process; the summary of all, and the rows of those that ended."""
    ops, dtypes = options.op or OPS, options.dtype or DTYPES
    kinds = [(op, dtype, kind) for op in ops for dtype in dtypes for kind in OPS[op].variants]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:

        def run(kind: tuple[str, str, str]) -> list[dict]:
            path = Path(folder, "-".join(kind))
            command = [sys.executable, __file__, "--device", options.device, "--json", str(path)]
            command += ["--op", kind[0], "--dtype", kind[1], "--variant", kind[2]]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            print(f"{' '.join(kind)}: {found.stderr.splitlines()[-1:] or 'done'}", flush=True)
            return json.loads(path.read_text()) if path.exists() else []

        rows: list[dict] = []
        for done in as_completed([pool.submit(run, kind) for kind in kinds]):
            rows += done.result()
            if options.json:  # now, so that a time limit loses only what comes after
                options.json.write_text(json.dumps(rows, indent=1))
    print("", *summary(rows), sep="\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--op", action="append", choices=OPS, help="default all")
    options.add_argument("--dtype", action="append", choices=DTYPES, help="default all")
    options.add_argument("--variant", action="append", help="default all")
    options.add_argument("--jobs", type=int, default=1, help="processes")
    options.add_argument("--json", type=Path, help="also write the rows here")
    options = options.parse_args()
    if options.jobs > 1:
        return in_processes(options)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}; errors relative to the float64 loop", flush=True)
    rows = []
    for name in options.op or OPS:
        op, head = OPS[name], True
        kinds = itertools.product(options.variant or op.variants, options.dtype or DTYPES)
        for (variant, kind), size, time in itertools.product(kinds, op.sizes, LENGTHS):
            dtype = DTYPES[kind]
            args = rounded(name, op.tensors(variant, Draw(2, time, 0.1, *size)), dtype)
            row = errors(name, [x if x is None else x.to(options.device) for x in args])
            if head:
                names = ("output", "final state", *(f"d {key}" for key in (*op.names, "state")))
                print(f"\n| {name} | dtype | T, sizes | " + " | ".join(names) + " |")
                print("|---" * (3 + len(names)) + "|")
                head = False
            cells = " | ".join(f"{row[key]:.1e}" if key in row else "" for key in names)
            print(f"| {variant} | {str(dtype)[6:]} | {time}, {size} | {cells} |", flush=True)
            rows.append({"op": name, "variant": variant, "dtype": str(dtype), "T": time,
                         "sizes": size, "errors": row})  # fmt: skip
    print("", *summary(rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
