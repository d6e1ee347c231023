"""A package beside the Transformer that it was converted from: tokens/s and memory.

    python tests/bench/aot.py [--mixer simple_gla] [--layers 30] [--dtype bfloat16]
        [--batch 1,8,64] [--context 2048,32768,131072] [--json aot.json] [--plot aot.png]

The model has the shape of SmolLM2-135M and random weights; on a GPU if there is one. Parts, in this
order, each printed as it comes and then written to the JSON file, to which runs add:

    export   seconds, errors of the gate, size of the package
    decode   greedy tokens/s of the Python runner; with a CUDA graph, and without
    cpp      tokens/s of the C++ runner, and whether its tokens are the Python runner's
    context  tokens/s and memory after as many tokens
    softmax  the same of the Transformer, which has a static cache, is compiled and, on CUDA,
             launched as a graph too. Its keys and values are zeros.
    prefill  tokens/s of the package and of the compiled model
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from smollm2 import converted, transformer
from torch import Tensor

import flacompile
from flacompile.runner import DecodeGraph, Package, generate

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = ("export", "decode", "cpp", "context", "softmax", "prefill")
STEPS = 64  # tokens of which the time is taken
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]

Step = Callable[[Tensor], Tensor]


class Rows:
    """What was measured: printed, and kept in a file that every run adds to."""

    def __init__(self, path: Path | None, common: dict[str, Any]) -> None:
        self._path, self._common = path, common
        self.rows = json.loads(path.read_text()) if path and path.exists() else []

    def add(self, part: str, **row: Any) -> None:
        cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{part}:", ", ".join(cells), flush=True)
        self.rows.append({"part": part, **self._common, **row})
        if self._path:
            self._path.write_text(json.dumps(self.rows, indent=1))


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def memory_in_use() -> float:
    """MiB of the GPU, whoever has them; without one, the most that this process ever had."""
    gc.collect()
    if DEVICE == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def tokens_per_second(step: Step, batch: int) -> float:
    """Of greedy decoding, nothing of which waits for the device."""
    token = torch.full((batch, 1), 3, device=DEVICE)
    begin = 0.0
    for i in range(STEPS + 4):
        if i == 4:
            synchronize()
            begin = time.perf_counter()
        token = step(token).argmax(-1, keepdim=True)
    synchronize()
    return STEPS * batch / (time.perf_counter() - begin)


def plain(package: Package, states: tuple[Tensor, ...]) -> Step:
    """Decodes call by call."""
    held = list(states)

    def step(token: Tensor) -> Tensor:
        logits, *held[:] = package.decode(token, held)
        return logits

    return step


def fastest(package: Package, states: tuple[Tensor, ...]) -> Step:
    return DecodeGraph(package, states).capture() if DEVICE == "cuda" else plain(package, states)


def recorded(step: Step, batch: int) -> Step:
    """The step as a CUDA graph; on a CPU as it is."""
    token = torch.full((batch, 1), 3, device=DEVICE)
    for _ in range(2):
        step(token)
    if DEVICE == "cpu":
        return step
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(token)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = step(token)

    def launch(new: Tensor) -> Tensor:
        token.copy_(new)
        graph.replay()
        return logits

    return launch


def export(rows: Rows, model: Any, path: Path) -> None:
    begin = time.perf_counter()

    def stage(name: str) -> None:
        print(f"export: {name} from {time.perf_counter() - begin:.0f} s", flush=True)

    facts = flacompile.export(model, path, progress=stage)
    seconds, size = time.perf_counter() - begin, path.stat().st_size / 2**20
    rows.add("export", seconds=seconds, MiB=size, **facts["errors"])


def decode(rows: Rows, path: Path, batches: list[int]) -> None:
    package = Package(path)
    for batch in batches:
        prompt = torch.tensor([PROMPT] * batch, device=DEVICE)
        logits, *states = package.prefill(prompt)
        copies = [[x.clone() for x in states] for _ in range(3)]
        token = logits.argmax(-1, keepdim=True)
        want, got = plain(package, copies[0])(token), fastest(package, copies[1])(token)
        found = {"error": ((got - want).norm() / want.norm()).item()}
        found["calls"] = tokens_per_second(plain(package, copies[2]), batch)
        if DEVICE == "cuda":
            found["graph"] = tokens_per_second(fastest(package, states), batch)
        rows.add("decode", batch=batch, **found)


def cpp(rows: Rows, path: Path, build: Path) -> None:
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    flags = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={torch.__path__[0]}"]
    for command in (
        [cmake, "-S", str(ROOT / "runner"), "-B", str(build), *flags],
        [cmake, "--build", str(build), "-j", str(os.cpu_count())],
        [build / "generate", path, "--ids", ",".join(map(str, PROMPT)), "--tokens", str(STEPS)],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
            done.check_returncode()
    got = [int(i) for i in done.stdout.split()]
    package = Package(path)
    want = PROMPT + list(generate(package, PROMPT, tokens=STEPS, stop=package.facts["end"]))
    rows.add("cpp", same_tokens=got == want, says=done.stderr.strip())


@torch.inference_mode()
def context(rows: Rows, path: Path, contexts: list[int], batch: int) -> None:
    free = memory_in_use()
    package = Package(path)
    for tokens in contexts:
        begin = time.perf_counter()
        prompt = torch.full((batch, tokens), 3, device=DEVICE)
        states = package.prefill(prompt)[1:]
        synchronize()
        seconds = time.perf_counter() - begin
        step = fastest(package, states)
        rows.add(
            "context", model="package", batch=batch, tokens=tokens, MiB=memory_in_use() - free,
            kept_MiB=sum(x.nbytes for x in states) / 2**20,
            decode=tokens_per_second(step, batch), prefill=batch * tokens / seconds,
        )  # fmt: skip
        del prompt, states, step


@torch.inference_mode()
def softmax(rows: Rows, model: Any, contexts: list[int], batch: int) -> None:
    free = memory_in_use()
    model = model.to(DEVICE)
    for tokens in contexts:
        _transformer_at(rows, model, tokens, batch, free)


def _transformer_at(rows: Rows, model: Any, tokens: int, batch: int, free: float) -> None:
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=tokens + 2 * STEPS)
    head = config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, head, model.dtype, model.device)
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)
    compiled = torch.compile(
        lambda token: model(input_ids=token, past_key_values=cache).logits[:, -1], fullgraph=True
    )
    begin = time.perf_counter()
    step = recorded(compiled, batch)
    seconds, used = time.perf_counter() - begin, memory_in_use() - free
    kept = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) / 2**20
    rows.add(
        "context", model="transformer", batch=batch, tokens=tokens, MiB=used, kept_MiB=kept,
        decode=tokens_per_second(step, batch), compile_seconds=seconds,
    )  # fmt: skip


@torch.inference_mode()
def prefill(rows: Rows, path: Path, model: Any, tokens: int) -> None:
    package = Package(path)
    ids = torch.full((1, tokens), 3, device=DEVICE)
    compiled = torch.compile(model)
    calls = {
        "package": lambda: package.prefill(ids)[0],
        "compiled": lambda: compiled(input_ids=ids, use_cache=False, logits_to_keep=1).logits,
    }
    found = {}
    for name, call in calls.items():
        call()
        times = []
        for _ in range(5):
            synchronize()
            begin = time.perf_counter()
            call()
            synchronize()
            times.append(time.perf_counter() - begin)
        found[name] = tokens / min(times)
    rows.add("prefill", tokens=tokens, **found)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s and memory over the context; the last row of each point counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = {
        (row["model"], row["mixer"], row["batch"], row["tokens"]): row
        for row in rows
        if row["part"] == "context"
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = ("decode", "kept_MiB")
    titles = ("tokens/s of decode", "MiB that the context takes")
    lines = sorted({(model, model == "package" and mixer, b) for model, mixer, b, _ in points})
    for ax, name, title in zip(axes, names, titles, strict=True):
        for model, mixer, batch in lines:
            line = sorted(
                (tokens, row[name])
                for (kind, own, rows_of, tokens), row in points.items()
                if (kind, rows_of) == (model, batch) and mixer in (False, own)
            )
            ax.plot(*zip(*line, strict=True), "o-", label=f"{mixer or 'softmax'}, batch {batch}")
        ax.set(xscale="log", yscale="log", xlabel="tokens of context", title=title)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mixer", default="simple_gla")
    options.add_argument("--layers", type=int, default=30)
    options.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32")
    options.add_argument("--batch", default="1,8,64", help="of decode; the first also of context")
    options.add_argument("--context", default="2048,32768,131072")
    options.add_argument("--parts", default=",".join(PARTS))
    options.add_argument("--tiny", action="store_true", help="narrow layers, to try this out")
    options.add_argument("--package", type=Path, help="keep it here, and use it if it is there")
    options.add_argument("--build", type=Path, help="keep the C++ runner here, and use it again")
    options.add_argument("--json", type=Path)
    options.add_argument("--plot", type=Path, help="of all that the JSON file has")
    options = options.parse_args()
    batches, contexts = (list(map(int, x.split(","))) for x in (options.batch, options.context))
    parts = options.parts.split(",")
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or "CPU"
    rows = Rows(
        options.json,
        {"mixer": options.mixer, "layers": options.layers, "dtype": options.dtype,
         "device": where, "torch": torch.__version__},
    )  # fmt: skip
    print(
        f"{where}, torch {torch.__version__}, {options.layers} layers, {options.dtype}", flush=True
    )
    with tempfile.TemporaryDirectory() as name:
        path = options.package or Path(name) / "model.pt2"
        sizes = (options.layers, options.dtype)
        if not path.exists() and parts != ["softmax"]:
            export(rows, converted(options.mixer, *sizes, tiny=options.tiny).to(DEVICE), path)
        if "decode" in parts:
            decode(rows, path, batches)
        if "cpp" in parts:
            cpp(rows, path, options.build or Path(name) / "runner")
        if "context" in parts:
            context(rows, path, contexts, batches[0])
        if "softmax" in parts:
            softmax(rows, transformer(*sizes, tiny=options.tiny), contexts, batches[0])
        if "prefill" in parts:
            model = converted(options.mixer, *sizes, tiny=options.tiny).to(DEVICE)
            prefill(rows, path, model, min(contexts))
    if options.plot:
        plot(rows.rows, options.plot)


if __name__ == "__main__":
    main()
