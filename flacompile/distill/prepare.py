"""What a model is made for the time of its training, and unmade after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flacompile.distill.recipe import Recipe
from flacompile.passes.swap_attention import swapped


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that the converted attentions stand in, and those between: whole lists of them.

    Raises:
        ValueError: an attention stands in no list.
    """
    lists: dict[str, nn.ModuleList] = {}
    for path in swapped(model):
        names = path.split(".")
        parents = (".".join(names[:i]) for i in range(len(names), -1, -1))
        found = ((p, model.get_submodule(p)) for p in parents)
        nearest = next(((p, m) for p, m in found if isinstance(m, nn.ModuleList)), None)
        if nearest is None:
            raise ValueError(
                f"model: expected blocks in an nn.ModuleList, got {path} outside of any; set "
                "compile and activation_checkpointing to False"
            )
        lists[nearest[0]] = nearest[1]
    return [block for members in lists.values() for block in members]


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """bf16 products and fp32 sums where the recipe says so; else nothing."""
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def fp32_weights(model: nn.Module) -> Iterator[None]:
    """Weights of fewer bits are fp32 inside, to add up small steps, and rounded after."""
    low = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    for parameter, _ in low:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in low:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def untied(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """A head that shares the embeddings has a copy of its own inside; after, it shares them again.

    The copy is then discarded: what the embeddings have become is kept.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is None or getattr(head, "weight", None) is not weight or recipe.tied == "keep":
        yield
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    try:
        yield
    finally:
        head.weight = embeddings.weight


@contextmanager
def compiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Calls of these modules go through torch.compile inside.

    Sizes of tensors may vary. The numbers of a config may not: those of a module that FSDP split
    would else be variables, on which no error can be worded and no kernel's tile fixed.
    """
    changed = list(modules)
    for module in changed:
        module.compile(dynamic=True)
    try:
        with torch._dynamo.config.patch(specialize_int=True):
            yield
    finally:
        for module in changed:
            module._compiled_call_impl = None


@contextmanager
def checkpointed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """These modules keep their inputs alone for the backward inside, and run again in it."""
    before: list[tuple[Any, Any]] = [(m, vars(m).get("forward")) for m in modules]
    for module, _ in before:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def for_stage(name: str, model: nn.Module, recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Compiles the mixers alone for align, whose backwards are their own; else the blocks."""
    parts: list[nn.Module] = [layer.mixer for layer in swapped(model).values()]
    compiles = recipe.compile is True or (recipe.compile == "auto" and device.type == "cuda")
    again: list[nn.Module] = []
    if name != "align" and (compiles or recipe.activation_checkpointing):
        parts = blocks(model)
        again = parts if recipe.activation_checkpointing else []
    with checkpointed(again), compiled(parts if compiles else []):
        yield
