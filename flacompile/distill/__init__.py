"""Distilling a converted model from the attention it came with: ``flacompile.distill``."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flacompile.distill import data as tokens_of
from flacompile.distill import objectives, report, train
from flacompile.distill.metrics import Metrics, Score, score
from flacompile.distill.recipe import Recipe, Stage
from flacompile.distill.train import Run
from flacompile.passes.swap_attention import Route, routed, swapped

__all__ = ["Metrics", "Recipe", "Score", "Stage", "distill", "score"]


def distill(
    model: nn.Module,
    data: str | Path | Tensor,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any = None,
    out: str | Path = "out/distill",
) -> Metrics:
    """Trains a converted model, in place, to be its teacher: aligns its mixers, then its logits.

    Align: every mixer sees its attention's own input and learns its output, relative squared
    error, all layers in one teacher pass. Logits: the model learns the teacher's next-token
    distribution, forward KL. The teacher is the attention that ``convert`` kept aside.

    ``out`` receives log.jsonl, checkpoint.pt, losses.png and distill.md. A run that was stopped
    goes on from its checkpoint when called again with a freshly converted model, the same data,
    recipe and folder, and ends with the same weights.

    Args:
        model: what ``flacompile.convert`` returned; a transformers causal language model.
        data: a text file (with ``tokenizer``) or token ids [n].
        recipe: default ``Recipe()``.
        tokenizer: a transformers tokenizer.
        out: folder for what the run leaves.

    Returns:
        Scores of teacher, zero floor, fresh swap and student on held-out tokens.

    Raises:
        ValueError: the model is not converted or keeps no teacher, the data cannot be read, or
            the checkpoint in ``out`` is broken or of another run.
    """
    recipe = recipe or Recipe()
    layers = swapped(model)
    if not layers or any(layer.original is None for layer in layers.values()):
        raise ValueError(
            "model: expected a converted model that still has its teacher (convert, and not yet "
            f"finalize), got {len(layers)} swapped attentions"
        )
    tokens = tokens_of.read_tokens(data, tokenizer)
    parts = tokens_of.split(tokens, recipe.heldout, recipe.sequence_length)
    device = next(model.parameters()).device
    heldout = tokens_of.rows(parts.heldout, recipe.eval_tokens, recipe.sequence_length).to(device)
    teacher = frozen_teacher(model)

    run = Run(Path(out), tokens_of.fingerprint(tokens))
    optimizer_state = train.restore(run, recipe, model)
    if optimizer_state is None:
        run.log.unlink(missing_ok=True)
        routes: dict[str, Route] = {"teacher": "original", "zero": "zero", "fresh": "mixer"}
        for name, route in routes.items():
            run.notes[name] = asdict(score(model, teacher, heldout, route=route))
    model.eval()  # dropout would blur the teacher, and a resumed run would need its state
    stages = {"align": (recipe.align, _align), "logits": (recipe.logits, _logits)}
    for name, (stage, make) in stages.items():
        if run.stage != name:
            continue
        optimizer = _optimizer(model, stage)
        if optimizer_state is not None and run.step:
            optimizer.load_state_dict(optimizer_state)
        optimizer_state = None
        if stage.steps:
            objective = make(model, teacher, recipe)
            train.fit(run, recipe, stage, model, optimizer, parts.train, objective)
        run.stage, run.step = ("logits", 0) if name == "align" else ("done", 0)
        train.save(run, recipe, model, optimizer)
    bounds = {name: Score(**run.notes[name]) for name in ("teacher", "zero", "fresh")}
    metrics = Metrics(**bounds, student=score(model, teacher, heldout))
    facts = {"steps": run.steps, "training tokens": len(parts.train), "recipe": asdict(recipe)}
    report.write(run.out, metrics, facts)
    return metrics


def frozen_teacher(model: nn.Module) -> nn.Module:
    """A copy of the model that runs the attention kept aside, without the mixers."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in swapped(teacher).values():
        layer.route, layer.mixer = "original", nn.Identity()
    return teacher


def _optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW over the mixers and, with a rate, the rest; the teacher's parameters never."""
    mixers = {id(p) for layer in swapped(model).values() for p in layer.mixer.parameters()}
    teachers = {
        id(p)
        for layer in swapped(model).values()
        if layer.original is not None
        for p in layer.original.parameters()
    }
    rest = [p for p in model.parameters() if id(p) not in mixers | teachers]
    for p in rest:
        p.requires_grad_(stage.rest_lr > 0)
    groups = [{"params": [p for p in model.parameters() if id(p) in mixers]}]
    groups[0]["peak"] = stage.mixer_lr  # type: ignore[assignment]
    if stage.rest_lr > 0:
        groups.append({"params": rest, "peak": stage.rest_lr})  # type: ignore[dict-item]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)


def _align(model: nn.Module, teacher: nn.Module, recipe: Recipe) -> Any:
    """Teacher-forced: each mixer's loss is backpropagated alone, so one graph lives at a time."""
    body = getattr(model, "base_model", model)  # the head is not needed
    mixers = {path: layer.mixer for path, layer in swapped(body).items()}
    if recipe.compile:
        mixers = {path: torch.compile(mixer, dynamic=True) for path, mixer in mixers.items()}

    def objective(ids: Tensor) -> float:
        total = 0.0
        for path, (x, y) in objectives.attention_io(body, ids).items():
            loss = objectives.relative_error(mixers[path](x)[0], y)
            loss.backward()
            total += loss.item()
        return total / len(mixers)

    return objective


def _logits(model: nn.Module, teacher: nn.Module, recipe: Recipe) -> Any:
    body: Any = model.base_model
    base = torch.compile(body, dynamic=True) if recipe.compile else None

    def objective(ids: Tensor) -> float:
        with torch.no_grad():
            target = objectives.hidden(teacher, ids)
        with routed(model, "mixer"):
            loss = objectives.kl_divergence(objectives.hidden(model, ids, base), target)
        loss.backward()
        return loss.item()

    return objective
