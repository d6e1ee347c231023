"""Tensor and context parallelism and distillation: two processes against one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import parallel_checks
import pytest
from bench.processes import kill_last_rank, torchrun

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


def test_killed_rank_loses_nothing_after_the_last_checkpoint(tmp_path, monkeypatch):
    """Two processes by the user's own command; the second is killed, one process goes on."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out, log = tmp_path / "out", tmp_path / "out" / "log.jsonl"
    errors = tmp_path / "errors.txt"
    command = ["distill", str(TEACHER), str(TEACHER / "heldout.txt"), str(out)]
    command += ["--recipe", str(tmp_path / "recipe.yaml"), "--init", "neutral"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kill_last_rank([*torchrun(2), "-m", "flacompile", *command], log, 3, errors)
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
