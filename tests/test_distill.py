"""Distillation: bounds, losses, and a run that may be killed at any step."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, VOCAB, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import flacompile
from flacompile.data import read
from flacompile.distill import DataOptions, Recipe, Stage, objectives
from flacompile.files import write_atomically
from flacompile.passes.swap_attention import routed, student_state, swapped

pytestmark = pytest.mark.xdist_group("distill")  # its fixtures are long in the making

TEACHER = Path(__file__).parent / "teacher"
TINY = Recipe(
    align=Stage(steps=3),
    logits=Stage(steps=3, mixer_lr=1e-3, rest_lr=3e-4),
    sequence_length=16,
    batch_size=2,
    eval_tokens=64,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)


def teacher(mixer: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True).eval()
    return flacompile.convert(model, mixer)


@functools.cache
def converted(name: str) -> torch.nn.Module:
    return flacompile.convert(MODELS[name]().model, "gla", init="neutral")


def student(name: str = "llama") -> torch.nn.Module:
    return copy.deepcopy(converted(name))


def stream(count: int = 800) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(0))


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path, stage: str) -> list[float]:
    return [r["loss"] for r in records(out) if r["stage"] == stage]


def test_attention_itself_closes_everything(tokenizer, tmp_path):
    recipe = Recipe(align=Stage(steps=0), logits=Stage(steps=0), eval_tokens=512)
    metrics = flacompile.distill(
        teacher("attn"), TEACHER / "train.txt", recipe, tokenizer=tokenizer, out=tmp_path
    )
    assert metrics.share_closed == pytest.approx(1, abs=1e-4)
    for score in (metrics.teacher, metrics.fresh, metrics.student):
        assert score.kl == pytest.approx(0, abs=1e-5)
        assert score.top1 == 1 and score.nll == pytest.approx(metrics.teacher.nll, abs=1e-4)
    assert metrics.zero.nll > metrics.teacher.nll + 1 and metrics.zero.kl > 1
    half = (metrics.zero.nll + metrics.teacher.nll) / 2
    middle = dataclasses.replace(metrics.student, nll=half)
    assert dataclasses.replace(metrics, student=middle).share_closed == pytest.approx(0.5)
    floor = dataclasses.replace(metrics, student=metrics.zero)
    assert floor.share_closed == 0


LEARN = {
    "align": Recipe(align=Stage(steps=16, mixer_lr=3e-4), logits=Stage(steps=0)),
    "logits": Recipe(align=Stage(steps=0), logits=Stage(steps=10, mixer_lr=1e-3, rest_lr=3e-4)),
}


@pytest.mark.parametrize("stage", LEARN)
def test_stage_learns(stage, tokenizer, tmp_path):
    recipe = dataclasses.replace(
        LEARN[stage], sequence_length=64, batch_size=8, eval_tokens=512, heldout=0.1
    )
    tokens = read(TEACHER / "train.txt", tokenizer).tokens[:20_000].long()
    rows = tokens[-1024:].view(16, 64)
    model = teacher("gla")
    kept = [p.clone() for s in swapped(model).values() for p in s.original.parameters()]
    before = mean_error(model, rows)
    metrics = flacompile.distill(model, tokens, recipe, out=tmp_path)
    if stage == "align":
        assert mean_error(model, rows) < 0.95 * before
    assert len(losses(tmp_path, stage)) == len(records(tmp_path)) > 0
    assert metrics.student.kl < 0.95 * metrics.fresh.kl
    assert metrics.share_closed < 1 and metrics.student.nll < metrics.fresh.nll
    after = [p for s in swapped(model).values() for p in s.original.parameters()]
    assert all(a.equal(b) for a, b in zip(kept, after, strict=True))
    text = (tmp_path / "distill.md").read_text()
    assert f"{metrics.share_closed:.3f}" in text and f"{metrics.student.nll:.4f}" in text
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def mean_error(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Relative squared error of the mixers on their attentions' own inputs."""
    layers = swapped(model)
    with torch.no_grad():
        return sum(
            objectives.relative_error(layers[path].mixer(x)[0], y).item()
            for path, (x, y) in objectives.attention_io(model, rows).items()
        ) / len(layers)


@pytest.mark.parametrize("rows", [1, 5, 1024])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_kl_is_the_full_one(rows, bias, monkeypatch):
    monkeypatch.setattr(objectives, "ROWS", rows)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    s = objectives.Hidden(leaf(2, 6, 8), leaf(32, 8), leaf(32) if bias else None)
    t = objectives.Hidden(leaf(2, 6, 8), leaf(32, 8), leaf(32) if bias else None)
    log_q = F.log_softmax(F.linear(*s), -1).flatten(0, 1)
    log_p = F.log_softmax(F.linear(*t), -1).flatten(0, 1).detach()
    want = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    target = objectives.Hidden(*(None if x is None else x.detach() for x in t))
    got = objectives.kl_divergence(s, target)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    leaves = [x for x in s if x is not None]
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


SHORT = dataclasses.replace(TINY, align=Stage(steps=1), logits=Stage(steps=0))


class Killed(Exception):
    """Stands for the end of the process."""


RECIPES = {
    "plain": TINY,
    "everything": dataclasses.replace(
        TINY,
        logits=dataclasses.replace(TINY.logits, accumulate=2, patience=30),
        long=Stage(steps=3, rest_lr=1e-4, sequence_length=32, schedule="wsd", target="data"),
        data=DataOptions(documents=True, separator=0),
        activation_checkpointing=True,
        precision="bf16",
    ),
}


def run(out: Path, name: str = "llama", recipe: Recipe = TINY, **arguments):
    model = student(name)
    flacompile.distill(model, stream(), recipe, out=out, **arguments)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and weights of an uninterrupted run, by model."""

    @functools.cache
    def get(name: str, recipe: str = "plain"):
        out = tmp_path_factory.mktemp(name)
        return out, student_state(run(out, name, RECIPES[recipe]))

    return get


KILLS = [
    *(("llama", "plain", call) for call in (1, 2, 3, 4, 5, 6)),
    *(("gpt2", "plain", call) for call in (2, 5)),
    *(("llama_tied", "everything", call) for call in (5, 8)),
]


@pytest.mark.parametrize(("name", "recipe", "call"), KILLS)
def test_killed_and_resumed_is_the_uninterrupted_run(
    call, name, recipe, whole, monkeypatch, tmp_path
):
    """gpt2 has dropout in its config, llama does not."""
    uncut, want = whole(name, recipe)
    calls, step = [], torch.optim.AdamW.step

    def kill(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", kill)
    with pytest.raises(Killed):
        run(tmp_path / "cut", name, RECIPES[recipe])
    monkeypatch.undo()
    if (log := tmp_path / "cut" / "log.jsonl").exists():
        with log.open("a") as file:
            file.write('{"stage": "al')  # a line torn by the kill
    torch.manual_seed(1)  # another process has another random state
    got = student_state(run(tmp_path / "cut", name, RECIPES[recipe]))
    assert got.keys() == want.keys()
    assert all(v.equal(want[k]) for k, v in got.items())
    steps = [(r["stage"], r["step"], r["loss"]) for r in records(tmp_path / "cut")]
    expected = [(r["stage"], r["step"], r["loss"]) for r in records(uncut)]
    assert steps == expected and len(steps) == (6 if recipe == "plain" else 9)


def test_killed_process_resumes(whole, tmp_path):
    """The kernel's own kill, wherever it strikes after the second step."""
    command = f"from test_distill import *; run(Path({str(tmp_path)!r}))"
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", command], env=os.environ | {"PYTHONPATH": path}
    )
    log = tmp_path / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 2):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    got = student_state(run(tmp_path))
    assert all(v.equal(whole("llama")[1][k]) for k, v in got.items())
    assert len(records(tmp_path)) == 6


def test_finished_run_is_only_read_again(tmp_path):
    want = student_state(run(tmp_path))
    log = (tmp_path / "log.jsonl").read_text()
    got = student_state(run(tmp_path))
    assert all(v.equal(want[k]) for k, v in got.items())
    assert (tmp_path / "log.jsonl").read_text() == log


def checkpoint_in(out: Path) -> Path:
    (folder,) = out.glob("checkpoint-*")
    return folder


BROKEN = {
    "cut": ("run.pt", lambda data: data[: len(data) // 2]),
    "empty": ("run.pt", lambda data: b""),
    "text": ("run.pt", lambda data: b"not a checkpoint"),
    "no sizes": (".metadata", lambda data: b""),
    "cut tensors": ("__0_0.distcp", lambda data: data[: len(data) // 2]),
}


@pytest.mark.parametrize(("name", "damage"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoint_is_named_and_left(name, damage, tmp_path):
    run(tmp_path, recipe=SHORT)
    file = checkpoint_in(tmp_path) / name
    data = damage(file.read_bytes())
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint: expected .*checkpoint-.* move it away"):
        run(tmp_path, recipe=SHORT)
    assert file.read_bytes() == data


def test_foreign_tensors_are_no_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-0-0000001"
    folder.mkdir()
    torch.save({"progress": {}, "weights": torch.ones(2)}, folder / "run.pt")
    with pytest.raises(ValueError, match=r"checkpoint: expected .*checkpoint-0-0000001"):
        run(tmp_path)


def test_checkpoint_of_another_run(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"recipe: expected that of .*checkpoint-.*another folder"):
        run(tmp_path, recipe=dataclasses.replace(TINY, seed=1))
    with pytest.raises(ValueError, match=r"data: expected the tokens .*another folder"):
        flacompile.distill(student(), stream(900), TINY, out=tmp_path)
    other = flacompile.convert(llama(num_hidden_layers=3)().model, "gla", init="neutral")
    with pytest.raises(ValueError, match="expected the tensors of this model"):
        flacompile.distill(other, stream(), TINY, out=tmp_path)


DATA = {
    "no file": ("missing.txt", None, "data: expected a text file, got .*missing.txt"),
    "a folder": (".", None, "data: expected a text file"),
    "binary": ("a.txt", b"\xff\xfe\x00\x80", "data: expected UTF-8 text in .*a.txt"),
    "too short": ("a.txt", b"Two words", "data: expected at least 16 train tokens"),
    "empty": ("a.txt", b"\n", "data: expected text in .*a.txt"),
}


@pytest.mark.parametrize(("name", "content", "message"), DATA.values(), ids=DATA)
def test_bad_data_file(name, content, message, tokenizer, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        flacompile.distill(
            student(), tmp_path / name, TINY, tokenizer=tokenizer, out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


TENSORS = {
    "floats": (torch.ones(500), "data: expected a vector of token ids, got torch.float32"),
    "rows": (torch.ones(50, 10, dtype=torch.long), r"got torch.int64 \(50, 10\)"),
    "no held-out row": (stream(100), "data: expected at least 16 heldout tokens .* got 5"),
}


@pytest.mark.parametrize(("data", "message"), TENSORS.values(), ids=TENSORS)
def test_bad_tokens(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        flacompile.distill(student(), data, TINY, out=tmp_path)


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        flacompile.distill(student(), TEACHER / "train.txt", TINY, out=tmp_path)


@pytest.mark.parametrize("prepare", [flacompile.finalize, None], ids=["finalized", "unconverted"])
def test_model_without_teacher(prepare, tmp_path):
    model = prepare(student()) if prepare else llama()().model
    with pytest.raises(ValueError, match="still has its teacher"):
        flacompile.distill(model, stream(), TINY, out=tmp_path)


def test_report_without_matplotlib_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"matplotlib.*install flacompile\[distill\]"):
        run(tmp_path)
    assert not any(tmp_path.iterdir())


def test_handwritten_model_is_told_what_it_lacks(tmp_path):
    case = MODELS["handwritten"]()
    model = flacompile.convert(case.model, "gla", example_inputs=case.inputs)
    with pytest.raises(ValueError, match=r"expected a language model with get_output_embeddings"):
        flacompile.distill(model, stream(), TINY, out=tmp_path)


def test_diverging_run_stops(tmp_path):
    model = student()
    with torch.no_grad():
        next(iter(swapped(model).values())).mixer.o_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="align: expected a finite loss, got nan at step 0"):
        flacompile.distill(model, stream(), TINY, out=tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_teacher_pass_and_student_pass_share_nothing():
    """The frozen teacher stays what it was while the rest of the model trains."""
    from flacompile.distill import frozen_teacher

    model, ids = student(), stream(32).view(2, 16)
    with torch.no_grad():
        with routed(model, "original"):
            want = model(ids).logits
        fixed = frozen_teacher(model)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert fixed(ids).logits.equal(want)
    assert not any(p.requires_grad for p in fixed.parameters())


def test_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise Killed

    with pytest.raises(Killed):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    write_atomically(file, lambda temporary: temporary.write_text("new"))
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
