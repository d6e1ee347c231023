"""Evaluation: every figure against one found by hand, the page, the command."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import HEADS, LAYERS, MODELS, llama
from test_convert import ids_of, logits
from torch import nn

import flacompile
from flacompile.cli import main
from flacompile.distill import Recipe, Stage, metrics, objectives, report
from flacompile.evaluate import Suite, cost, evaluate
from flacompile.evaluate.harness import run_tasks
from flacompile.evaluate.needle import BEFORE, CUE, NEEDLE, needles, recall
from flacompile.passes.swap_attention import routed, swapped

TEACHER = Path(__file__).parent / "teacher"
SUITE = Suite(length=12, tokens=96, trials=4, contexts=())


@functools.cache
def teacher() -> nn.Module:
    model = llama()().model
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # away from a uniform next token
    return model


@functools.cache
def converted(mixer: str) -> nn.Module:
    return flacompile.convert(copy.deepcopy(teacher()), mixer, init="neutral")


def stream(count: int = 400) -> torch.Tensor:
    return ids_of(5, 1, count)[0]


@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_scores_are_those_of_whole_logits(rows, monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", rows)
    model, ids = converted("gla"), ids_of(0, 5, 9)
    log_q, log_p = (logits(m, ids).double().log_softmax(-1)[:, :-1] for m in (model, teacher()))
    nll = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    top1 = (log_q.argmax(-1) == log_p.argmax(-1)).double()
    want = torch.stack([x.mean(0) for x in (nll, kl, top1)])
    got = metrics.by_position(model, teacher(), ids, batch=2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    alone = metrics.by_position(model, None, ids, batch=2)
    torch.testing.assert_close(alone, want[:1], rtol=1e-5, atol=1e-5)
    score = metrics.score(model, teacher(), ids)
    assert dataclasses.astuple(score) == pytest.approx(want.mean(1).tolist(), abs=1e-5)
    assert metrics.score(model, None, ids) == metrics.Score(pytest.approx(score.nll), None, None)


def test_attention_itself_is_its_teacher():
    found = evaluate(converted("attn"), stream(), SUITE, teacher=teacher())
    assert found.share_closed == pytest.approx(1, abs=1e-4)
    assert found.model.score.kl == pytest.approx(0, abs=1e-5) and found.model.score.top1 == 1
    assert found.model.by_position == pytest.approx(found.teacher.by_position, abs=1e-4)
    assert list(found.layer_errors) == list(swapped(converted("attn")))
    assert max(found.layer_errors.values()) < 1e-6
    assert [r.nll for r in found.model.recall.values()] == pytest.approx(
        [r.nll for r in found.teacher.recall.values()], abs=1e-4
    )


@pytest.mark.parametrize("keep", [(), (0,)])
def test_the_floor_is_the_teacher_without_what_was_converted(keep):
    """Not the student's: what the body learnt must not move it."""
    model = flacompile.convert(copy.deepcopy(teacher()), "gla", keep=keep, init="neutral")
    rows = stream()[:96].view(8, 12)
    with routed(model, "zero"):
        want = F.cross_entropy(logits(model, rows)[:, :-1].transpose(1, 2), rows[:, 1:]).item()
    errors = {
        path: objectives.relative_error(swapped(model)[path].mixer(x)[0], y).item()
        for path, (x, y) in objectives.attention_io(model, rows[:1]).items()
    }
    before = logits(teacher(), rows)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    found = evaluate(model, stream(), SUITE, teacher=teacher())
    assert found.zero.nll == pytest.approx(want, abs=1e-5)
    assert found.layer_errors == pytest.approx(errors, rel=1e-4)
    assert logits(teacher(), rows).equal(before)
    nll = [found.zero.nll, found.model.score.nll, found.teacher.score.nll]
    assert found.share_closed == pytest.approx((nll[0] - nll[1]) / (nll[0] - nll[2]))


def test_positions_go_beyond_a_row():
    """As far as four rows, the model's positions or the data, in buckets of equal size."""
    ends = {}
    for name, count in {"rows": 400, "data": 40, "positions": 2000}.items():
        length = 100 if name == "positions" else 12
        suite = dataclasses.replace(SUITE, length=length, distances=(), tokens=count)
        ends[name] = evaluate(converted("gla"), stream(count), suite).model.by_position
    assert [max(found) for found in ends.values()] == [47, 39, 127]
    assert all(len(found) == 16 for found in ends.values())
    nll = metrics.by_position(converted("gla"), None, stream(2000)[:1920].view(-1, 128))[0]
    assert ends["positions"][8] == pytest.approx(nll[:8].mean().item(), rel=1e-6)
    assert ends["positions"][127] == pytest.approx(nll[-7:].mean().item(), rel=1e-6)


@pytest.mark.parametrize("distance", [NEEDLE, 50])
def test_needles_stand_where_they_should(distance):
    text = stream()
    seen, unseen = needles(text, distance, 6, seed=1)
    assert seen.shape == unseen.shape == (6, BEFORE + distance + NEEDLE)
    first = slice(BEFORE, BEFORE + NEEDLE)
    assert seen[:, first].equal(seen[:, -NEEDLE:]) and not unseen[:, first].equal(seen[:, first])
    rest = torch.ones(seen.shape[1], dtype=torch.bool)
    rest[first] = False
    assert seen[:, rest].equal(unseen[:, rest])
    windows = {tuple(w) for w in text.unfold(0, NEEDLE, 1).tolist()}
    assert all(tuple(row) in windows for row in seen[:, -NEEDLE:].tolist())
    assert seen.equal(needles(text, distance, 6, seed=1).seen)
    assert not seen.equal(needles(text, distance, 6, seed=2).seen)


class Induction(nn.Module):
    """Knows what came after the last same pair of tokens; else every token is as likely."""

    config = SimpleNamespace()

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1000, 1000, bias=False)
        nn.init.eye_(self.head.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def base_model(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        states = torch.zeros(*ids.shape, 1000)
        for row, tokens in enumerate(ids.tolist()):
            after: dict[tuple[int, int], int] = {}
            for i in range(1, len(tokens)):
                if (pair := (tokens[i - 1], tokens[i])) in after:
                    states[row, i, after[pair]] = 20.0
                if i + 1 < len(tokens):
                    after[pair] = tokens[i + 1]
        return SimpleNamespace(last_hidden_state=states)


def test_recall_of_a_model_that_recalls():
    found = recall(Induction(), needles(torch.arange(1000), 20, 16), batch=5)
    assert found.accuracy == 1 and found.nll < 1e-3
    assert found.unseen_accuracy < 0.1 and 6 < found.unseen_nll < 7  # log 1000 is 6.9
    assert 1 < CUE < NEEDLE


def test_state_in_bytes(monkeypatch):
    """A softmax layer's grows by keys and values; a mixer's is as large after any context."""
    config, caches, step = teacher().config, [], cost._step

    def spy(model, ids, cache):
        caches.append(step(model, ids, cache))
        return caches[-1]

    monkeypatch.setattr(cost, "_step", spy)
    sizes = {}
    for name, model in {"softmax": teacher(), "gla": converted("gla")}.items():
        sizes[name] = [cost.speed(model, n) for n in (10, 20)]
    token = 2 * LAYERS * config.num_key_value_heads * (config.hidden_size // HEADS) * 4
    assert [s.state_bytes for s in sizes["softmax"]] == [10 * token, 20 * token]
    assert len({s.state_bytes for s in sizes["gla"]}) == 1
    assert caches[-1].get_seq_length() == 20 + cost.STEPS + cost.WARM
    assert all(min(s.prefill, s.decode) > 0 for found in sizes.values() for s in found)


def test_speed_is_tokens_by_seconds(monkeypatch):
    monkeypatch.setattr(cost, "_seconds", lambda call, number: {2: 0.5, cost.STEPS: 0.25}[number])
    found = cost.speed(teacher(), 10)
    assert (found.prefill, found.decode) == (20.0, 4.0)


def test_distillation_leaves_a_page(tmp_path):
    """Its own evaluation, against the teacher as it was before the body moved."""
    recipe = Recipe(
        align=Stage(steps=1),
        logits=Stage(steps=2, mixer_lr=1e-3, rest_lr=1e-3),
        sequence_length=12,
        batch_size=2,
        eval_tokens=96,
        heldout=0.25,
    )
    model = flacompile.convert(copy.deepcopy(teacher()), "gla", init="neutral")
    metrics_found = flacompile.distill(model, stream(), recipe, out=tmp_path)
    found = evaluate(model, stream()[300:], report.suite(recipe), teacher=teacher())
    left = json.loads((tmp_path / "eval.json").read_text())
    assert left["share_closed"] == pytest.approx(metrics_found.share_closed, rel=1e-4)
    assert left["share_closed"] == pytest.approx(found.share_closed, rel=1e-4)
    assert left["model"]["recall"]["16"] == pytest.approx(
        dataclasses.asdict(found.model.recall[16]), rel=1e-4
    )
    assert list(left["layer_errors"].values()) == pytest.approx(
        list(found.layer_errors.values()), rel=1e-4
    )
    page = (tmp_path / "distill.md").read_text()
    assert "(losses.png)" in page and "(eval.png)" in page and "| model: accuracy |" in page
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")


WRONG = {
    "short data": (stream(8), {}, "data: expected at least 12 tokens, got 8"),
    "far": (stream(), {"distances": (500,)}, "distances: expected rows of at most 128 tokens"),
    "no room": (stream(60), {"distances": (50,)}, "distance: expected 12 to 44 in a text of 60"),
    "near": (stream(), {"distances": (3,)}, "distance: expected 12 to 80"),
    "long": (stream(), {"contexts": (128,)}, "contexts: expected rows of at most 128 tokens"),
    "tasks": (stream(), {"tasks": ("arc_easy",)}, "tokenizer: expected one to run tasks"),
}


@pytest.mark.parametrize(("data", "changed", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(data, changed, message):
    with pytest.raises(ValueError, match=message):
        evaluate(converted("gla"), data, dataclasses.replace(SUITE, **changed))


def test_another_models_teacher():
    with pytest.raises(
        ValueError, match=r"teacher: expected the model .* model.layers.0.self_attn, got GPT2"
    ):
        evaluate(converted("gla"), stream(), SUITE, teacher=MODELS["gpt2"]().model)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"tasks: expected lm-eval .*flacompile\[eval\]"):
        run_tasks(teacher(), object(), ["arc_easy"])


def test_tasks_by_lm_eval(tmp_path, monkeypatch):
    """A task of our own, so that nothing is downloaded; the harness itself does the rest."""
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bare = functools.partial(TaskManager, include_defaults=False)  # reads 10,000 files otherwise
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", bare)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    lines = [{"text": "Return the", "choices": [" value", " zebra"], "label": i} for i in (0, 0, 1)]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "toy.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    model = AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)
    found = run_tasks(flacompile.convert(model), tokenizer, [task])
    assert found["toy"]["acc,none"] == pytest.approx(2 / 3)


def test_command_leaves_figures_and_a_page(tmp_path, capsys):
    student, out = tmp_path / "student", tmp_path / "eval"
    assert main(["convert", str(TEACHER), str(student)]) == 0
    sizes = ["--length", "32", "--tokens", "128"]
    arguments = ["eval", str(student), str(TEACHER / "heldout.txt"), *sizes]
    assert main([*arguments, "--teacher", str(TEACHER), "--out", str(out)]) == 0
    printed, page = capsys.readouterr().out, (out / "eval.md").read_text()
    found = json.loads((out / "eval.json").read_text())
    assert f"Share closed: **{found['share_closed']:.3f}**" in printed and found["share_closed"] > 0
    assert [line for line in printed.splitlines() if line.startswith("| model | 128 |")]
    assert page.count("````text") == 3 * 3 and "eval.png" in page
    assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")
    for name in ("model", "teacher"):
        reading = found[name]
        assert f"| {name} | {reading['score']['nll']:.4f} |" in page
        assert list(reading["recall"]) == ["16", "64"] and len(reading["by_position"]) == 16
        assert list(reading["speed"]) == ["32", "128"] and len(reading["samples"]) == 3
    assert (
        found["model"]["speed"]["32"]["state_bytes"]
        < found["teacher"]["speed"]["128"]["state_bytes"]
    )
    assert main([*arguments[:3], "--length", "16", "--tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert "Share closed" not in printed and "| model |" in printed and "| teacher |" not in printed
