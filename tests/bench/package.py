"""A decoded token by a package, beside the model in eager mode and one reading of its weights.

    python tests/bench/package.py --layers 4 --dtype float32 --mixer simple_gla
        [--quantize ternary|int8]

The model has the shape of SmolLM2-135M and random weights; quantised, they are ternary, or int8 by
torchao, but in the embedding, which is the head's. Only ``decode`` is compiled. Times are the
smallest of many, wall and CPU, on one thread; the reading is a dot product of all weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from smollm2 import converted
from ternary import parts_of
from torch._inductor.package import load_package, package_aoti
from torchao.quantization import Int8WeightOnlyConfig

import flacompile
from flacompile.export.processor import compile_options
from flacompile.export.programs import Step, all_mixers, trace
from flacompile.passes.stream_weights import stream_weights

QUANTIZE = {"ternary": flacompile.Ternary(), "int8": Int8WeightOnlyConfig()}


def smallest(call: Callable[[], object], repeats: int) -> str:
    """The smallest wall time and the smallest CPU time of a call."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return f"{1e3 * min(walls):.1f} ms, CPU {1e3 * min(cpus):.1f} ms"


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--mixer", default="simple_gla")
    options.add_argument("--quantize", choices=QUANTIZE, help="projections")
    options.add_argument("--decode-for", choices=["one", "many"], default="one")
    options.add_argument("--package", type=Path, help="keep it here, and use it if it is there")
    options.add_argument("--batch", type=int, nargs="+", default=[1])
    options.add_argument("--repeats", type=int, default=40)
    options = options.parse_args()
    torch.set_num_threads(1)
    model = converted(options.mixer, options.layers, options.dtype)
    if options.quantize:
        flacompile.quantize_(model, QUANTIZE[options.quantize])
    parts = [part.flatten() for p in model.parameters() for part in parts_of(p)]
    words = torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float32).nan_to_num()
    with all_mixers(model), tempfile.TemporaryDirectory() as folder:
        step = Step(model, 2048)
        path = options.package or Path(folder) / "decode.pt2"
        if not path.exists():
            program = trace(model, 2048, ["decode"])["decode"]
            if options.decode_for == "one":
                program = stream_weights(program)
            args, kwargs = program.example_inputs
            inductor = {"aot_inductor.package": True, **compile_options()}
            files = torch._inductor.aot_compile(program.module(), args, kwargs, options=inductor)
            package_aoti(str(path), {"decode": files})
        calls = {"package": load_package(str(path), "decode"), "eager": step}
        sizes = [f"{size / 1e6:.0f} MB" for size in (words.nbytes, path.stat().st_size)]
        print(
            "{} layers of {}, weights {}, package {}".format(options.layers, options.mixer, *sizes)
        )
        print("read", smallest(lambda: words.dot(words), options.repeats))
        for batch, (name, call) in product(options.batch, calls.items()):
            ids, states = torch.ones(batch, 1, dtype=torch.long), step.begin(batch)
            took = smallest(lambda: call(ids, states), options.repeats)  # noqa: B023
            print(f"{name}, {batch} sequences: {took}")


if __name__ == "__main__":
    main()
