"""Tensor and context parallelism and distillation: two processes against one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel_checks
import pytest

from flacompile.cli import main
from flacompile.distill.log import read_json_lines

TEACHER = Path(__file__).parent / "teacher"


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return parallel_checks.run(tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("name", parallel_checks.CHECKS)
def test_two_processes(name, failures):
    assert not failures[name], failures[name]


RECIPE = """
align: {steps: 2}
logits: {steps: 4, rest_lr: 0.0003}
sequence_length: 32
batch_size: 2
eval_tokens: 64
checkpoint_every: 1
"""


def workers(launcher: subprocess.Popen) -> list[int]:
    """Its child processes, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def test_killed_rank_loses_nothing_after_the_last_checkpoint(tmp_path):
    """Two processes by the user's own command; the second is killed, one process goes on."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out, log = tmp_path / "out", tmp_path / "out" / "log.jsonl"
    errors = tmp_path / "errors.txt"
    command = ["distill", str(TEACHER), str(TEACHER / "heldout.txt"), str(out)]
    command += ["--recipe", str(tmp_path / "recipe.yaml"), "--init", "neutral"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with errors.open("wb") as stream:
        launcher = subprocess.Popen(
            [*torchrun, "--standalone", "-m", "flacompile", *command],
            stderr=stream,
            env=environment,
        )
    ends = time.monotonic() + 300
    try:
        while not log.exists() or log.read_text().count("\n") < 3:
            assert launcher.poll() is None and time.monotonic() < ends, errors.read_text()
            time.sleep(0.005)
        os.kill(workers(launcher)[1], signal.SIGKILL)
        assert launcher.wait(timeout=60), errors.read_text()
    finally:
        launcher.terminate()
    assert "goes on from the last one by the same command" in errors.read_text()
    done = max(out.glob("checkpoint-?-???????"))
    before = read_json_lines(log)[: 2 * int(done.name[11]) + int(done.name[13:])]
    assert len(before) >= 2
    assert main(command) == 0
    records = read_json_lines(log)
    assert records[: len(before)] == before
    steps = [("align", 1), ("align", 2), *(("logits", i) for i in (1, 2, 3, 4))]
    assert [(r["stage"], r["step"]) for r in records] == steps
    assert (out / "model.safetensors").exists()
