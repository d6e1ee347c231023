"""The losses: relative squared error of a mixer's output; KL and cross-entropy over the vocabulary,
whose logits exist for some positions at a time, also in the backward, which computes them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flacompile.data.reader import Batch
from flacompile.distill.processes import whole
from flacompile.passes.capture import record_calls, without_cache
from flacompile.passes.swap_attention import routed, swapped

ROWS = 1024  # positions whose logits over the vocabulary are held at once


class Hidden(NamedTuple):
    """A language model cut before its head: hidden states [B, T, D] and the head's parameters."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None


def hidden(model: nn.Module, ids: Tensor, position_ids: Tensor | None = None) -> Hidden:
    """Hidden states before the head of a transformers language model.

    Args:
        model: has ``base_model`` and ``get_output_embeddings()``, as transformers' models do.
        ids: [B, T].
        position_ids: [B, T], of packed documents; None: rows count from 0.

    Raises:
        ValueError: the model has no such parts, or its head is more than one linear map.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            "model: expected a language model with get_output_embeddings() (transformers' "
            f"interface), got {type(model).__name__}"
        )
    if getattr(model.config, "final_logit_softcapping", None):
        raise ValueError("model: expected a linear head, got final_logit_softcapping in the config")
    base: Any = model.base_model
    states = base(ids, use_cache=False, **_positions(position_ids)).last_hidden_state
    return Hidden(states, whole(head.weight), whole(head.bias))


def _positions(position_ids: Tensor | None) -> dict[str, Any]:
    return {} if position_ids is None else {"position_ids": position_ids}


def attention_io(
    body: nn.Module, ids: Tensor, position_ids: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output [B, T, D] of every swapped attention in one pass of the teacher."""
    kwargs = without_cache(body, _positions(position_ids))
    layers = swapped(body)
    with torch.no_grad(), routed(body, "original"):
        calls = record_calls(body, set(layers), (ids,), kwargs)
    io = {}
    for path, layer in layers.items():
        x = layer.convention.read(calls[path].args, calls[path].kwargs).x
        io[path] = x, layer.convention.output(calls[path].result)
    return io


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """||y - target||^2 / ||target||^2 over everything, in fp32."""
    y, target = y.float(), target.float()
    return (y - target).square().sum() / target.square().sum().clamp_min(1e-12)


def kl_divergence(student: Hidden, teacher: Hidden) -> Tensor:
    """Mean over positions of KL(teacher || student), in nats."""

    def part(h: Tensor, t: Tensor) -> Tensor:
        """Σ p (log p - log q) over the rows of h and t [R, D], p the teacher's."""
        log_p = F.log_softmax(F.linear(t, teacher.weight, teacher.bias).float(), -1)
        log_q = F.log_softmax(F.linear(h, student.weight, student.bias).float(), -1)
        return (log_p.exp() * (log_p - log_q)).sum()

    h, t = student.states.flatten(0, 1), teacher.states.flatten(0, 1)
    return _sum_of_parts(part, h, t) / h.shape[0]


def cross_entropy(student: Hidden, targets: Tensor) -> Tensor:
    """Mean of -log q(target) over the targets [B, T] that are not negative, in nats."""

    def part(h: Tensor, y: Tensor) -> Tensor:
        """Σ -log q(y) over the rows of h [R, D], y [R]; a negative y counts nothing."""
        logits = F.linear(h, student.weight, student.bias).float()
        return F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")

    y = targets.flatten()
    return _sum_of_parts(part, student.states.flatten(0, 1), y) / (y >= 0).sum()


def next_tokens(batch: Batch) -> Tensor:
    """What follows each token in its document, [B, T]; -1 after the last one."""
    y = torch.cat([batch.ids[:, 1:], torch.full_like(batch.ids[:, :1], -1)], 1)
    if batch.position_ids is None:
        return y
    return torch.where(batch.position_ids.roll(-1, 1) == 0, -1, y)


def _sum_of_parts(part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The sum of ``part`` over ROWS rows of the inputs at a time, computed again in backward."""
    rows = zip(*(x.split(ROWS) for x in inputs), strict=True)
    return torch.stack([checkpoint(part, *x, use_reentrant=False) for x in rows]).sum()
