"""What a model must be able to do for a recipe, found out before any training."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from flacompile.data.reader import Batch
from flacompile.distill.objectives import hidden
from flacompile.distill.recipe import Recipe
from flacompile.passes.swap_attention import packed, swapped


def check_teacher(model: nn.Module) -> None:
    """Raises ValueError unless the model is converted and has its attentions still."""
    layers = swapped(model)
    if not layers or any(layer.original is None for layer in layers.values()):
        raise ValueError(
            "model: expected a converted model that still has its teacher (convert, and not yet "
            f"finalize), got {len(layers)} swapped attentions"
        )


def check_lengths(model: nn.Module, recipe: Recipe) -> None:
    """Raises ValueError where a teacher is asked about rows longer than it knows."""
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for name, stage in recipe.stages.items():
        length = stage.sequence_length or recipe.sequence_length
        if known and stage.steps and stage.target == "teacher" and length > known:
            raise ValueError(
                f"{name}.sequence_length: expected at most the {known} tokens that the teacher "
                f"knows (max_position_embeddings), got {length}; or set target to 'data'"
            )


@torch.no_grad()
def check_packs(model: nn.Module, teacher: nn.Module, row: Tensor) -> None:
    """Raises ValueError unless two documents in one row [T] do not see each other.

    Decided by values: the second one must come out as it does alone.
    """
    base = model.base_model
    if "position_ids" not in inspect.signature(base.forward).parameters:  # type: ignore[arg-type]
        raise ValueError(
            "documents: expected a model that takes position_ids, got "
            f"{type(base).__name__}; set documents to False"
        )
    half = len(row) // 2
    ids, position = row[None, : 2 * half], torch.arange(half, device=row.device).repeat(2)[None]
    bounds = torch.tensor([0, half, 2 * half], device=row.device)
    pack = Batch(ids, position, bounds)
    for who, one in (("teacher", teacher), ("model", model)):
        want = hidden(one, ids[:, half:]).states.float()
        with packed(one, pack.cu_seqlens):
            got = hidden(one, pack.ids, pack.position_ids).states[:, half:]
        error = ((got.float() - want).norm() / want.norm()).item()
        if not error <= torch.finfo(got.dtype).eps ** 0.5:
            raise ValueError(
                f"documents: expected a {who} that keeps documents apart by their position_ids, "
                f"got {type(one).__name__}, where the second of two differs by {error:.1e} from "
                "what it is alone; set documents to False"
            )
