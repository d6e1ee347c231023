"""What one step of each stage computes: a batch in, gradients left on the model, the loss out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flacompile.data.reader import Batch
from flacompile.distill import objectives
from flacompile.distill.recipe import Stage
from flacompile.passes.swap_attention import packed, swapped

Objective = Callable[[Batch, float], Tensor]
"""(batch, share of the step that it is) -> its loss, a scalar; share times the loss's gradient is
added to those of the parameters."""


def make_objective(
    name: str, stage: Stage, model: nn.Module, teacher: nn.Module, precision: torch.autocast
) -> Objective:
    """The step of the stage called ``name``.

    Args:
        teacher: the frozen original; align does not ask it, the original attentions do.
        precision: of the forward passes; backwards follow them.
    """
    if name == "align":
        return _align(model, precision)

    def objective(batch: Batch, share: float) -> Tensor:
        """Backward of share times the loss of the logits, which it returns."""
        with packed(model, batch.cu_seqlens):
            with precision:
                loss = _loss(stage, model, teacher, batch)
            (loss * share).backward()  # here, where a checkpointed block sees the same packs
        return loss.detach()

    return objective


def _loss(stage: Stage, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    """Of the logits: KL to the teacher's, or the cross-entropy of the data."""
    if stage.target == "data":
        h = objectives.hidden(model, batch.ids, batch.position_ids)
        return objectives.cross_entropy(h, objectives.next_tokens(batch))
    with torch.no_grad():
        target = objectives.hidden(teacher, batch.ids, batch.position_ids)
    h = objectives.hidden(model, batch.ids, batch.position_ids)
    return objectives.kl_divergence(h, target)


def _align(model: nn.Module, precision: torch.autocast) -> Objective:
    """Teacher-forced: each mixer's loss is backpropagated alone, so one graph lives at a time."""
    body: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    layers = swapped(body)

    def objective(batch: Batch, share: float) -> Tensor:
        """Backward of share times each mixer's error; their mean."""
        with precision:
            io = objectives.attention_io(body, batch.ids, batch.position_ids)
        total = torch.zeros((), device=batch.ids.device)
        with packed(body, batch.cu_seqlens):
            for path, (x, y) in io.items():
                with precision:
                    loss = objectives.relative_error(layers[path].mix(x)[0], y)
                (loss * share).backward()
                total += loss.detach()
        return total / len(layers)

    return objective
