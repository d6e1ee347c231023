"""Distilling a converted model from the attention it came with: ``flacompile.distill``."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flacompile.data import (
    Corpus,
    DataOptions,
    Reader,
    Source,
    check_ids,
    own_samples,
    read,
)
from flacompile.distill import checkpoint, processes, report
from flacompile.distill.checkpoint import Run
from flacompile.distill.checks import check_lengths, check_packs, check_teacher
from flacompile.distill.log import summary_writer
from flacompile.distill.metrics import Metrics, Score, score
from flacompile.distill.optimizer import make_optimizer
from flacompile.distill.prepare import autocast, for_stage, fp32_weights, untied
from flacompile.distill.recipe import PRESETS, STAGES, Recipe, Stage
from flacompile.distill.recipe_file import read_recipe, write_recipe
from flacompile.distill.stages import make_objective
from flacompile.distill.train import fit
from flacompile.evaluate import evaluate
from flacompile.passes.swap_attention import Route, swapped

__all__ = [
    "PRESETS",
    "DataOptions",
    "Metrics",
    "Recipe",
    "Score",
    "Stage",
    "distill",
    "read_recipe",
    "score",
    "write_recipe",
]


@processes.joined()
def distill(
    model: nn.Module,
    data: Source,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any = None,
    out: str | Path = "out/distill",
    tensorboard: bool = False,
) -> Metrics:
    """Trains a converted model, in place, to be its teacher: its mixers, then its logits.

    Align: every mixer sees its attention's own input and learns its output, relative squared
    error, all layers in one teacher pass. Logits: the model learns the teacher's next-token
    distribution, forward KL. Long: the same on longer rows, if the recipe has steps for it. The
    teacher is the attention that ``convert`` kept aside.

    ``out`` receives recipe.yaml, log.jsonl, a checkpoint, eval.json, and the page distill.md with
    losses.png and eval.png. A run that was stopped goes on from its checkpoint when called again
    with a freshly converted model, the same data, recipe and folder, and ends with the same
    weights.

    In a process that ``torchrun`` started, or after ``init_process_group``, all processes train
    together: weights and optimizer are split (FSDP2), rows are dealt out. Leave the model on the
    CPU; its parts go to each process's accelerator. A run may go on with another number of them.

    Args:
        model: what ``flacompile.convert`` returned; a transformers causal language model.
        data: what ``flacompile.data.read`` reads: text, JSON lines, parquet, ``datasets``, tokens;
            or None, for which the teacher writes its own.
        recipe: default ``Recipe()``.
        tokenizer: a transformers tokenizer, where the data is text.
        out: folder for what the run leaves.
        tensorboard: whether to write events for TensorBoard too, in ``out``/tensorboard.

    Returns:
        Scores of teacher, zero floor, fresh swap and student on held-out tokens.

    Raises:
        ValueError: the model is not converted or keeps no teacher, the data cannot be read, or
            the checkpoint in ``out`` is broken or of another run; the recipe asks for rows longer
            than the teacher knows, or for packed documents that the model does not keep apart.
    """
    recipe, out = recipe or Recipe(), Path(out)
    check_teacher(model)
    check_lengths(model, recipe)
    report.check_drawing()
    if tensorboard:
        summary_writer()
    teacher, vocabulary = frozen_teacher(model), _vocabulary(model)
    if processes.size() > 1 and recipe.tied == "keep":
        raise ValueError("tied: expected 'untie' in several processes, got 'keep'")
    with processes.first_alone():
        corpus = _corpus(data, tokenizer, recipe, teacher, out)
    training, heldout = corpus.split(recipe.heldout, _longest(recipe), recipe.sequence_length)
    rows = heldout.rows(recipe.eval_tokens, recipe.sequence_length)
    check_ids(rows, vocabulary)
    model.eval()  # dropout would blur the teacher, and a resumed run would need its state
    if recipe.data.documents:
        check_packs(model, teacher, rows[0].to(next(model.parameters()).device))
    teacher = processes.split(teacher)
    device = next(teacher.parameters()).device
    rows, precision = rows.to(device), autocast(recipe, device)

    run = Run(out, corpus.fingerprint())
    with fp32_weights(model), untied(model, recipe), processes.shared(model) as student:
        if not checkpoint.restore(run, recipe, student):
            if processes.rank() == 0:
                run.log.unlink(missing_ok=True)
                write_recipe(recipe, out / "recipe.yaml")
            with precision:
                run.notes |= _bounds(student, teacher, rows)
        while run.stage != "done":
            if recipe.stages[run.stage].steps:
                _train(run, recipe, student, teacher, training, tensorboard)
            else:
                run.next_stage()
    with precision, processes.shared(model) as student:  # rounded, and tied again
        reached = score(student, teacher, rows)
    bounds = {name: Score(**run.notes[name]) for name in ROUTES}
    metrics = Metrics(**bounds, student=reached)
    facts = {"steps": run.steps, "training tokens": len(training)}
    facts |= {name: note for name, note in run.notes.items() if name not in ROUTES}
    if processes.rank() == 0:
        if processes.size() > 1:  # the page needs the two whole
            model = copy.deepcopy(model).to(device)
            teacher = frozen_teacher(model)
        with precision:
            suite = report.suite(recipe)
            evaluation = evaluate(model, heldout, suite, teacher=teacher, tokenizer=tokenizer)
        report.write(run.out, metrics, evaluation, recipe, facts)
    processes.wait()
    return metrics


SAMPLES = 1_000_000  # tokens that the teacher writes, unless the recipe has a limit
ROUTES: dict[str, Route] = {"teacher": "original", "zero": "zero", "fresh": "mixer"}


def _vocabulary(model: nn.Module) -> int | None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)


def _longest(recipe: Recipe) -> int:
    """Tokens of the longest row that is trained on."""
    lengths = (s.sequence_length or 0 for s in recipe.stages.values() if s.steps)
    return max(lengths, default=0)


def _corpus(data: Source, tokenizer: Any, recipe: Recipe, teacher: nn.Module, out: Path) -> Corpus:
    """What there is to read, or what the teacher writes."""
    options = recipe.data
    if data is not None:
        return read(data, tokenizer, options, record=out / "stream.pt")
    return own_samples(
        teacher,
        options.limit or SAMPLES,
        recipe.sequence_length,
        out / "samples",
        temperature=options.temperature,
        seed=recipe.seed,
    )


def _bounds(model: nn.Module, teacher: nn.Module, rows: Tensor) -> dict[str, Any]:
    """What the student stands between, before any training."""
    return {
        name: asdict(score(model, teacher, rows, route=route)) for name, route in ROUTES.items()
    }


def _train(
    run: Run,
    recipe: Recipe,
    model: nn.Module,
    teacher: nn.Module,
    training: Corpus,
    tensorboard: bool,
) -> None:
    """The rest of the stage in progress; afterwards the next one is."""
    name, stage = run.stage, recipe.stages[run.stage]
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, stage)
    if run.step:
        checkpoint.restore_optimizer(run, model, optimizer)
    reader = Reader(
        training,
        stage.sequence_length or recipe.sequence_length,
        stage.batch_size or recipe.batch_size,
        accumulate=stage.accumulate,
        seed=recipe.seed * len(STAGES) + STAGES.index(name),
        documents=recipe.data.documents,
        separator=recipe.data.separator,
        vocabulary=_vocabulary(model),
        rank=processes.rank(),
        world_size=processes.size(),
    )
    with for_stage(name, model, recipe, device):
        objective = make_objective(name, stage, model, teacher, autocast(recipe, device))
        events = run.out / "tensorboard" if tensorboard else None
        fit(run, recipe, model, optimizer, reader, objective, events=events)
    run.next_stage()
    checkpoint.save(run, recipe, model, optimizer)


def frozen_teacher(model: nn.Module) -> nn.Module:
    """A copy of the model that runs the attention kept aside, without the mixers."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in swapped(teacher).values():
        layer.route, layer.mixer = "original", nn.Identity()
    return teacher
