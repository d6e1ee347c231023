"""The two losses: relative squared error of a mixer's output, and KL over a chunked vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flacompile.passes.capture import record_calls, without_cache
from flacompile.passes.swap_attention import routed, swapped

ROWS = 1024  # positions whose logits over the vocabulary are held at once


class Hidden(NamedTuple):
    """A language model cut before its head: hidden states [B, T, D] and the head's parameters."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None


def hidden(model: nn.Module, ids: Tensor, compiled: Any = None) -> Hidden:
    """Hidden states before the head of a transformers language model.

    Args:
        model: has ``base_model`` and ``get_output_embeddings()``, as transformers' models do.
        ids: [B, T].
        compiled: runs in place of ``model.base_model``.

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
    base: Any = model.base_model if compiled is None else compiled
    return Hidden(base(ids, use_cache=False).last_hidden_state, head.weight, head.bias)


def attention_io(body: nn.Module, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output [B, T, D] of every swapped attention in one pass of the teacher."""
    layers = swapped(body)
    with torch.no_grad(), routed(body, "original"):
        calls = record_calls(body, set(layers), (ids,), without_cache(body, {}))
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
    """Mean over positions of KL(teacher || student), in nats.

    The vocabulary's logits exist for ROWS positions at a time, also in the backward, which
    computes them again.
    """

    def part(h: Tensor, t: Tensor) -> Tensor:
        log_p = F.log_softmax(F.linear(t, teacher.weight, teacher.bias).float(), -1)
        log_q = F.log_softmax(F.linear(h, student.weight, student.bias).float(), -1)
        return (log_p.exp() * (log_p - log_q)).sum()

    h, t = student.states.flatten(0, 1), teacher.states.flatten(0, 1)
    parts = [
        checkpoint(part, a, b, use_reentrant=False)
        for a, b in zip(h.split(ROWS), t.split(ROWS), strict=True)
    ]
    return torch.stack(parts).sum() / h.shape[0]
