"""One process against several: the same losses, and a rank killed on the way.

    python tests/bench/processes.py MODEL TEXT OUT [--processes 2] [--steps 50] [--mixer gla]
        [--batch-size 32] [--length 512] [--precision fp32]

Distils by the user's own command three times, half of ``--steps`` in align and half in logits: in
one process that takes a step's rows in as many parts; under torchrun; and under torchrun with the
last rank killed after 60% of the steps and the same command given again. Leaves the three runs,
losses.png and processes.json in OUT: the largest relative difference of a loss and of a norm of
gradients to those of the one process, the steps done twice, tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flacompile.distill.log import read_json_lines

CHECKPOINTS = 5  # of a run, about
PATIENCE = 300  # seconds for the steps before the kill


def workers(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Child processes of torchrun, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def torchrun(processes: int) -> list[str]:
    """The beginning of a command, on this machine alone."""
    number = f"--nproc-per-node={processes}"
    return [sys.executable, "-m", "torch.distributed.run", number, "--standalone"]


def kill_last_rank(command: list[str], log: Path, lines: int, errors: Path) -> None:
    """Starts torchrun, and kills its last process once the log has so many lines."""
    with errors.open("wb") as stream:
        launcher = subprocess.Popen(command, stderr=stream)
    ends = time.monotonic() + PATIENCE
    try:
        while not log.exists() or log.read_text().count("\n") < lines:
            if launcher.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"no {lines} steps before the kill: {errors.read_text()}")
            time.sleep(0.005)
        os.kill(workers(launcher)[-1], signal.SIGKILL)
        if not launcher.wait(timeout=120):
            raise RuntimeError(f"did not notice the kill: {errors.read_text()}")
    finally:
        launcher.terminate()


def write_recipe(path: Path, options: argparse.Namespace, accumulate: int) -> Path:
    """Half of the steps in each of the first two stages."""
    import yaml

    half = {"steps": options.steps // 2, "accumulate": accumulate}
    recipe: dict[str, Any] = {
        "align": half | {"mixer_lr": 1e-3},
        "logits": half | {"mixer_lr": 3e-4, "rest_lr": 1e-4},
        "sequence_length": options.length,
        "batch_size": options.batch_size,
        "eval_tokens": 16 * options.length,
        "checkpoint_every": max(1, options.steps // CHECKPOINTS),
        "precision": options.precision,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def distill(out: Path, recipe: Path, options: argparse.Namespace) -> list[str]:
    """The user's command, less what starts it."""
    command = ["-m", "flacompile", "distill", options.model, options.text, str(out)]
    return [*command, "--recipe", str(recipe), "--mixer", options.mixer]


def largest_difference(got: list[dict[str, Any]], want: list[dict[str, Any]], name: str) -> float:
    """Relative, over the steps of two runs."""
    return max(abs(a[name] / b[name] - 1) for a, b in zip(got, want, strict=True))


def plot(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """The losses of all runs over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, records), style in zip(runs.items(), ("-", "--", ":"), strict=True):
        axes.plot([r["loss"] for r in records], style, label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model")
    options.add_argument("text")
    options.add_argument("out", type=Path)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--steps", type=int, default=50, help="of both stages together")
    options.add_argument("--mixer", default="gla")
    options.add_argument("--batch-size", type=int, default=32, help="rows of a step")
    options.add_argument("--length", type=int, default=512, help="tokens of a row")
    options.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options = options.parse_args()
    out: Path = options.out
    out.mkdir(parents=True)
    together = write_recipe(out / "together.yaml", options, 1)
    in_parts = write_recipe(out / "in_parts.yaml", options, options.processes)
    start, logs = torchrun(options.processes), {}

    print("one process", flush=True)
    subprocess.run([sys.executable, *distill(out / "one", in_parts, options)], check=True)
    print(f"{options.processes} processes", flush=True)
    subprocess.run([*start, *distill(out / "several", together, options)], check=True)
    print("one of them killed, and the same command again", flush=True)
    command, log = [*start, *distill(out / "killed", together, options)], out / "killed/log.jsonl"
    kill_last_rank(command, log, round(0.6 * options.steps), out / "killed.err")
    done = len(read_json_lines(log))
    kept = max((out / "killed").glob("checkpoint-?-???????")).name
    subprocess.run(command, check=True)

    logs = {
        name: read_json_lines(out / name / "log.jsonl") for name in ("one", "several", "killed")
    }
    plot(logs, out / "losses.png")
    one = logs.pop("one")
    found: dict[str, Any] = {
        name: {x: largest_difference(log, one, x) for x in ("loss", "norm")}
        for name, log in logs.items()
    }
    speed = {"one": one} | logs
    found["tokens/s"] = {
        name: statistics.median(r["tokens_per_s"] for r in log) for name, log in speed.items()
    }
    found |= {"steps logged at the kill": done, "gone on from": kept}
    (out / "processes.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
