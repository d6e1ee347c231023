"""What every mixer keeps of a converted Transformer: the project's own teacher, briefly distilled.

    python tests/bench/conversions.py [--mixer NAME ...] [--seconds 150] [--threads 2] [--jobs 1]
        [--keep auto] [--window 16] [--quantize]

One row a mixer: the layers' mean relative error before and after calibration, held-out nll of the
swap and of the student, and the share of the gap closed between no attention at all (0) and the
teacher (1). Every mixer trains in a process of its own with ``--threads`` cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import flacompile
from flacompile.cli import read_keep, read_model
from flacompile.data import read
from flacompile.distill import Recipe, Stage
from flacompile.keep import Keep
from flacompile.layers import MIXERS

TEACHER = Path(__file__).resolve().parents[1] / "teacher"


def measure(
    mixer: str, seconds: float, keep: Keep, window: int | None, quantize: bool
) -> dict[str, Any]:
    """Converts and distils, in this process; a third of the time aligns the mixers."""
    model, tokenizer = read_model(str(TEACHER))
    text = TEACHER / "train.txt"
    calibration = read(text, tokenizer).rows(2048, 128)
    flacompile.convert(
        model, mixer=mixer, keep=keep, window=window, calibration=[calibration],
        quantize=flacompile.BitNet() if quantize else None,
    )  # fmt: skip
    layers = flacompile.report(model).layers
    recipe = Recipe(
        align=Stage(steps=5000, minutes=seconds / 180),
        logits=Stage(steps=5000, minutes=seconds / 90, mixer_lr=1e-3, rest_lr=3e-4),
    )
    with tempfile.TemporaryDirectory() as out:
        metrics = flacompile.distill(model, text, recipe, tokenizer=tokenizer, out=out)
    return {
        "mixer": mixer,
        "before": sum(layer.before for layer in layers) / len(layers),
        "after": sum(layer.after for layer in layers) / len(layers),
        "teacher": metrics.teacher.nll,
        "zero": metrics.zero.nll,
        "fresh": metrics.fresh.nll,
        "student": metrics.student.nll,
        "share": metrics.share_closed,
    }


def in_a_process(mixer: str, arguments: list[str]) -> dict[str, Any]:
    """``measure`` in a new process, under the same arguments; a failure is a row that says so."""
    command = [sys.executable, __file__, *arguments, "--alone", mixer]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"mixer": mixer, "error": run.stderr.strip().splitlines()[-1]}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mixer", action="append", choices=sorted(MIXERS), help="default all")
    options.add_argument("--seconds", type=float, default=150, help="of distillation")
    options.add_argument("--threads", type=int, default=2, help="cores of one mixer")
    options.add_argument("--jobs", type=int, default=1, help="mixers at the same time")
    options.add_argument("--keep", default="", help="as of flacompile convert")
    options.add_argument("--window", type=int, help="tokens of a softmax beside every mixer")
    options.add_argument(
        "--quantize", action="store_true", help="ternary projections in every mixer (BitNet)"
    )
    options.add_argument("--json", type=Path, help="also write the rows here")
    options.add_argument("--alone", help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.alone:
        torch.set_num_threads(options.threads)
        keep = read_keep(options.keep)
        row = measure(options.alone, options.seconds, keep, options.window, options.quantize)
        print(json.dumps(row))
        return
    print("| mixer | layer error | calibrated | swap nll | student nll | share closed |")
    print("|---|---|---|---|---|---|", flush=True)
    found = []
    with ThreadPoolExecutor(options.jobs) as pool:
        names = options.mixer or sorted(MIXERS)
        for row in pool.map(lambda n: in_a_process(n, sys.argv[1:]), names):
            found.append(row)
            if "error" in row:
                print(f"| {row['mixer']} | {row['error']} |", flush=True)
                continue
            print(
                f"| {row['mixer']} | {row['before']:.2f} | {row['after']:.2f} "
                f"| {row['fresh']:.2f} | {row['student']:.2f} | {row['share']:.3f} |", flush=True,
            )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
