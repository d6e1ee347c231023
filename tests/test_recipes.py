"""What a recipe says is what is done: rates, ends, precision, memory, packs, what is watched."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from models import MODELS, VOCAB
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import flacompile
from flacompile.data import Batch, Corpus, Reader
from flacompile.distill import (
    PRESETS,
    DataOptions,
    Recipe,
    Stage,
    frozen_teacher,
    read_recipe,
    train,
)
from flacompile.distill.checks import check_packs
from flacompile.distill.optimizer import make_optimizer, rate
from flacompile.distill.recipe_file import write_recipe
from flacompile.distill.stages import make_objective
from flacompile.distill.stop import Trend
from flacompile.passes.swap_attention import student_state, swapped

TEACHER = Path(__file__).parent / "teacher"
OFF = Stage(steps=0)
STEPS = Stage(steps=2, mixer_lr=1e-3, rest_lr=3e-4)
SIZES = {"sequence_length": 16, "batch_size": 4, "eval_tokens": 64}
LOGITS = Recipe(align=OFF, logits=STEPS, **SIZES)
ALIGN = Recipe(align=STEPS, logits=OFF, **SIZES)


def stream(count: int = 800) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(0))


@functools.cache
def converted(name: str, mixer: str) -> torch.nn.Module:
    return flacompile.convert(MODELS[name]().model, mixer, init="neutral", keep=[0])


def student(name: str = "llama", mixer: str = "gla") -> torch.nn.Module:
    """Of two layers, the first of which is softmax still."""
    return copy.deepcopy(converted(name, mixer))


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in records(out)]


def trained(out: Path, recipe: Recipe, model: torch.nn.Module | None = None, **arguments):
    """The weights after a run; all of it if no model is given."""
    model = student() if model is None else model
    flacompile.distill(model, stream(), recipe, out=out, **arguments)
    return student_state(model)


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
def test_recipes_survive_a_file(recipe, tmp_path):
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_file_changes_a_preset(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("preset: radlads\nseed: 3\nalign: {mixer_lr: 2e-3, minutes: 5}\ncompile: true")
    got, base = read_recipe(file), read_recipe("radlads")
    align = dataclasses.replace(base.align, mixer_lr=2e-3, minutes=5.0)
    assert got == dataclasses.replace(base, seed=3, align=align, compile=True)
    (tmp_path / "empty.yaml").write_text("")
    assert read_recipe(tmp_path / "empty.yaml") == Recipe()


BAD = {
    "key": ("stpes: 3", "recipe: expected align, logits, long, data, .*, got stpes"),
    "inner key": ("align: {lr: 3, x: 1}", "recipe.align: expected steps, .*patience, got lr, x"),
    "text": ("align: {steps: many}", "recipe.align.steps: expected int, got 'many'"),
    "float": ("batch_size: 1.5", "recipe.batch_size: expected int, got 1.5"),
    "bool": ("seed: true", "recipe.seed: expected int, got True"),
    "choice": ("precision: fp8", "expected 'auto' or 'bf16' or 'fp32', got 'fp8'"),
    "number": ("align: {mixer_lr: no}", "recipe.align.mixer_lr: expected float, got False"),
    "range": ("logits: {steps: -1}", "recipe.logits.steps: expected at least 0, got -1"),
    "share": ("heldout: 1.0", "recipe.heldout: expected a share between 0 and 1, got 1.0"),
    "part": ("align: 3", "recipe.align: expected keys and values, got 3"),
    "list": ("- 1", "recipe: expected keys and values in .*a.yaml, got list"),
    "YAML": ("a: [", "recipe: expected YAML in .*a.yaml"),
    "preset": ("preset: large", "recipe.preset: expected one of small, radlads, halo, got 'large'"),
    "target": ("align: {target: data}", "recipe.align.target: expected 'teacher', got data"),
    "parts": ("long: {batch_size: 3, accumulate: 2}", "recipe.long.batch_size: .* accumulate = 2"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_recipe_is_named(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "a.yaml")


def test_no_such_recipe():
    with pytest.raises(ValueError, match="recipe: expected a YAML file or one of small, radlads"):
        read_recipe("/nowhere.yaml")


RATES = {
    "cosine": [0.25, 0.5, 1.0, 0.775, 0.325, 0.1],
    "linear": [0.25, 0.5, 1.0, 0.7, 0.4, 0.1],
    "constant": [0.25, 0.5, 1.0, 1.0, 1.0, 1.0],
    "wsd": [0.25, 0.5, 1.0, 1.0, 0.55, 0.1],
}


@pytest.mark.parametrize("schedule", RATES)
def test_rates(schedule):
    stage = Stage(schedule=schedule, warmup=0.4, decay=0.4, final=0.1)
    got = [rate(share, stage) for share in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert got == pytest.approx(RATES[schedule])
    assert rate(0.01, Stage(schedule=schedule, warmup=0.0)) == pytest.approx(1, abs=0.02)


def test_rates_and_decay_of_parameters():
    model = student()
    optimizer = make_optimizer(model, Stage(mixer_lr=1e-3, rest_lr=1e-4, weight_decay=0.1))
    mixers = {id(p) for layer in swapped(model).values() for p in layer.mixer.parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["peak"] == (1e-3 if id(p) in mixers else 1e-4)
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    teachers = {id(p) for layer in swapped(model).values() for p in layer.original.parameters()}
    assert moved == {id(p) for p in model.parameters()} - teachers


def ended(stage: Stage, values: list[float]) -> tuple[int, str] | None:
    trend = Trend()
    for step, value in enumerate(values, 1):
        trend = Trend(**trend.add(value))  # as through a checkpoint
        if reason := trend.ends(stage):
            return step, reason
    return None


def test_a_stage_ends_on_its_loss():
    falling = [1 / step for step in range(1, 200)]
    step, reason = ended(Stage(target_loss=0.1), falling)
    assert 20 < step < 60 and "reached target_loss 0.1" in reason
    assert ended(Stage(target_loss=0.1), [0.0] * 19) is None, "a mean of too few"
    assert ended(Stage(target_loss=0.001), falling) is None
    assert ended(Stage(patience=5), falling) is None
    step, reason = ended(Stage(patience=30), [*falling, *[1.0] * 50])
    assert step == 199 + 30 and "not fallen" in reason


def test_a_run_that_ends_early_says_so(tmp_path):
    stage = dataclasses.replace(STEPS, steps=40, target_loss=1e3)
    trained(tmp_path, dataclasses.replace(LOGITS, logits=stage, batch_size=1))
    assert len(records(tmp_path)) == 20
    assert "logits ended: mean loss" in (tmp_path / "distill.md").read_text()


def test_nothing_is_frozen_in_logits(tmp_path):
    before = student_state(student())
    after = trained(tmp_path, dataclasses.replace(Recipe(), align=OFF, logits=STEPS, **SIZES))
    still = [k for k, v in after.items() if v.is_floating_point() and v.equal(before[k])]
    assert not still and read_recipe(tmp_path / "recipe.yaml").logits == STEPS


SAME = {
    "accumulate": (LOGITS, {"logits": dataclasses.replace(STEPS, accumulate=4)}),
    "activation checkpointing": (LOGITS, {"activation_checkpointing": True}),
}


@pytest.mark.parametrize(("recipe", "changes"), SAME.values(), ids=SAME)
def test_memory_is_saved_without_changing_the_run(recipe, changes, tmp_path):
    want = trained(tmp_path / "a", recipe)
    got = trained(tmp_path / "b", dataclasses.replace(recipe, **changes))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-4)


def test_checkpointed_blocks_run_again(tmp_path, monkeypatch):
    model, calls = student(), []
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda *_: calls.append("call"))
    block.mlp.register_forward_pre_hook(lambda *_: calls.append("inside"))
    recipe = dataclasses.replace(LOGITS, activation_checkpointing=True)
    trained(tmp_path, recipe, model)
    inside, outside = calls.count("inside"), calls.count("call")
    assert inside == outside + 2, "once more for the backward of each step"
    assert "forward" not in vars(block)


PACKS = ["llama", "mistral", "gpt2", "gptj", "gpt_neox", "mixtral"]


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("mixer", ["gla"])
def test_documents_of_a_row_are_kept_apart(name, mixer):
    model = student(name, mixer)
    check_packs(model, frozen_teacher(model), stream(16))


def test_models_that_mix_documents_are_refused(tmp_path):
    recipe = dataclasses.replace(LOGITS, data=DataOptions(documents=True, separator=0))
    with pytest.raises(ValueError, match=r"documents: expected a teacher that keeps .*FalconFor"):
        trained(tmp_path, recipe, student("falcon"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["align", "logits", "long"])
def test_packed_documents_teach_what_they_teach_alone(name):
    """Four documents in two rows against a row each: loss and gradients of one step."""
    alone = Batch(stream(32).view(4, 8))
    position, bounds = torch.arange(8).repeat(2, 2), torch.arange(0, 33, 8)
    stage = Stage(target="data" if name == "long" else "teacher")
    seen = []
    for batch in (alone, Batch(alone.ids.view(2, 16), position, bounds)):
        model = student()
        precision = torch.autocast("cpu", enabled=False)
        objective = make_objective(name, stage, model, frozen_teacher(model), precision)
        loss = objective(batch, 1.0)
        mixer = next(iter(swapped(model).values())).mixer
        seen.append((loss, [p.grad for p in mixer.parameters()]))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-5)


def test_data_as_target(tmp_path):
    """Cross-entropy of the first step is that of the model's own logits."""
    stage = dataclasses.replace(STEPS, steps=1, target="data")
    recipe = dataclasses.replace(LOGITS, align=OFF, logits=OFF, long=stage)
    model, reader = student(), Reader(Corpus(stream()[:760]), 16, 4, seed=2)  # the third stage's
    ids = reader.batches(0)[0].ids
    with torch.no_grad():
        want = model(ids, labels=ids).loss.item()
    trained(tmp_path, recipe, model)
    assert losses(tmp_path) == pytest.approx([want], rel=1e-5)
    assert records(tmp_path)[0]["stage"] == "long"


def test_teacher_is_not_asked_beyond_what_it_knows(tmp_path):
    stage = dataclasses.replace(STEPS, sequence_length=100_000)
    with pytest.raises(ValueError, match=r"long.sequence_length: expected at most the \d+ tokens"):
        trained(tmp_path, dataclasses.replace(LOGITS, long=stage))


def test_low_precision_weights_learn_in_fp32(tmp_path, monkeypatch):
    model, seen, step = student().bfloat16(), [], torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        seen.extend(p.dtype for group in self.param_groups for p in group["params"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    trained(tmp_path, dataclasses.replace(LOGITS, precision="bf16"), model)
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_bf16_is_near_fp32(tmp_path):
    for precision in ("fp32", "bf16"):
        trained(tmp_path / precision, dataclasses.replace(LOGITS, precision=precision))
    low, full = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert low == pytest.approx(full, rel=0.05) and low != full


@pytest.mark.parametrize("tied", ["untie", "keep"])
def test_tied_embeddings_are_tied_again(tied, tmp_path, monkeypatch):
    model = student("llama_tied")
    head, apart, step = model.get_output_embeddings(), [], torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        step(self, *args, **kwargs)
        apart.append(not head.weight.equal(model.get_input_embeddings().weight))

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    trained(tmp_path, dataclasses.replace(LOGITS, tied=tied), model)
    assert all(apart) == (tied == "untie") and any(apart) == (tied == "untie")
    assert head.weight is model.get_input_embeddings().weight


def test_tensorboard_shows_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, dataclasses.replace(LOGITS, align=STEPS), tensorboard=True)
    for stage in ("align", "logits"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage)).Reload()
        rows = [r for r in records(tmp_path) if r["stage"] == stage]
        for name in ("loss", "lr", "tokens_per_s", "memory_gib"):
            shown = [(e.step, e.value) for e in events.Scalars(name)]
            assert shown == [(r["step"], pytest.approx(r[name])) for r in rows]


def test_tensorboard_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard: .* install flacompile\[tensorboard\]"):
        trained(tmp_path, LOGITS, tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_the_teacher_can_write_the_data(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True).eval()
    flacompile.convert(model, "gla", init="neutral", keep=[0, 1, 2, 3])
    recipe = dataclasses.replace(
        LOGITS, data=DataOptions(limit=500, documents=True), heldout=0.2, batch_size=2
    )
    metrics = flacompile.distill(model, None, recipe, out=tmp_path)
    assert len(losses(tmp_path)) == 2 and metrics.teacher.nll < metrics.zero.nll
    assert list((tmp_path / "samples").glob("*.pt"))


def test_compiled_run_is_the_eager_one(tmp_path, monkeypatch):
    """By Dynamo and AOTAutograd alone: what Inductor makes of their graphs is its own affair."""
    compiled = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    recipe = dataclasses.replace(LOGITS, align=STEPS, data=DataOptions(documents=True, separator=0))
    trained(tmp_path / "eager", recipe)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    counters.clear()
    model = student()
    trained(tmp_path / "compiled", dataclasses.replace(recipe, compile=True), model)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert not any(m._compiled_call_impl for m in model.modules())


def test_a_time_limit_begins_after_the_first_step(tmp_path, monkeypatch):
    """Which takes longer than the limit here, as one that compiles does."""
    gradients = train.gradients

    def slow(objective, reader, step, device):
        time.sleep(0.02 if step else 0.6)
        return gradients(objective, reader, step, device)

    monkeypatch.setattr(train, "gradients", slow)
    recipe = dataclasses.replace(ALIGN, align=Stage(steps=999, minutes=0.4 / 60))
    flacompile.distill(student(), stream(), recipe, out=tmp_path)
    steps = len((tmp_path / "log.jsonl").read_text().splitlines())
    assert train.PROBE < steps < 22
