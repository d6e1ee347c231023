"""Every example of docs/examples and the demo run, on the tests' teacher, for a step or two."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from flacompile.cli import read_model
from flacompile.layers import MIXERS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
TEACHER = ROOT / "tests" / "teacher"
SCRIPTS = {  # file -> arguments, and what it prints
    "op.py": ([], "gradient of v"),
    "custom_mixer.py": ([], "half-life 8.0"),
    "train.py": (["--steps", "2", "--backend", "eager"], "step 1: "),
    "trainer.py": (["--steps", "1", "--out", "out"], "train_loss"),
    "before_after.py": (
        [str(TEACHER), str(TEACHER / "train.txt"), "--mixer", "simple_gla"],
        "| so, but 1 layer in 4 kept |",
    ),
}
STEPS = ["--align-steps", "1", "--logits-steps", "1", "--batch-size", "2", "--length", "32"]
PROGRAMS = {  # command, and what it prints
    "distil.sh": (
        ["distil.sh", TEACHER, "train.txt", "out", "--mixer", "simple_gla", *STEPS],
        "Return the ",
    ),
    "fsdp2.py": (
        ["torchrun", "--nproc-per-node", "2", "fsdp2.py", "--steps", "1"],
        "step 0: ",
    ),
}
ELSEWHERE = {"pte.py"}  # ExecuTorch has an environment of its own


def run(*command: object, cwd: Path) -> str:
    """What a program prints; those of this environment are found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [str(EXAMPLES / word) if word in PROGRAMS else str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_none_is_left_out():
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert there == {*SCRIPTS, *PROGRAMS, "export_cpp.sh"} | ELSEWHERE


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_they_are_short(path):
    if path.is_file():
        assert len(path.read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, tmp_path, monkeypatch, capsys):
    arguments, said = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    torch._dynamo.reset()
    with patch.dict(MIXERS):  # an example may add one
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    """On one layer of the teacher, hardly trained; the package is compiled, the model is not."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    demo = import_module("demo")
    model, tokenizer = read_model(str(TEACHER))
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    monkeypatch.setattr(demo, "read_model", lambda path: (model, tokenizer))
    run_package, written = demo.run_package, []

    def recorded(*args):
        written.append((len(args[1]), *run_package(*args)))
        return written[0][1:]

    monkeypatch.setattr(demo, "run_package", recorded)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--minutes", "0.02", "--out", str(tmp_path)])
    demo.main()
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"Share closed: \*\*-?\d\.\d+\*\*", report)
    said = re.findall(r"\*\*(.*)\*\*\n\n> (.*)\n", report)
    assert [name for name, _ in said][-2:] == ["student", "package, without flacompile"]
    ((start, ids, _),) = written
    assert said[-1][1].strip() == tokenizer.decode(ids).splitlines()[0].strip()
    with torch.no_grad():  # what the student would write, but for a tie that rounding decides
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    chosen = logits.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
    assert len(ids) > start and (logits.amax(1) - chosen < 1e-3).all()
    assert (tmp_path / "model.pt2").exists() and (tmp_path / "losses.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, tmp_path):
    text = (TEACHER / "train.txt").read_text()[:20_000]
    (tmp_path / "train.txt").write_text(text)
    command, said = PROGRAMS[name]
    assert said in run(*command, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("export")
def test_export_and_cpp(package, cpp, tmp_path):
    """The package and the programs are those of other tests: what is there is not made again."""
    ids = run(EXAMPLES / "export_cpp.sh", "none", package, cpp, cwd=tmp_path)
    assert len(ids.split()) == 12
