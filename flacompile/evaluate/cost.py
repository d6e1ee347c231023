"""What a token costs: tokens a second and the bytes of the state, at a length of context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

from flacompile.passes.capture import default_ids, evaluating

STEPS = 16  # tokens decoded to take the time of one
WARM = 2  # calls that Timer makes before it counts


@dataclass(frozen=True)
class Speed:
    """At one length of context.

    Attributes:
        prefill: tokens a second of the whole context at once.
        decode: tokens a second after it, one at a time.
        state_bytes: of the cache after it, all layers; keys and values where the layer is softmax.
    """

    prefill: float
    decode: float
    state_bytes: int


def speed(model: nn.Module, context: int) -> Speed:
    """Runs one row of a transformers language model as it stands, compiled or not.

    Args:
        model: on the device whose speed is asked.
        context: tokens; STEPS + WARM more are decoded after them.
    """
    ids = default_ids(model, 1, context)
    with evaluating(model):
        prefill = _seconds(lambda: _step(model, ids, None), 2)
        cache = _step(model, ids, None)
        state = cache_bytes(cache)
        decode = _seconds(lambda: _step(model, ids[:, :1], cache), STEPS)
    return Speed(context / prefill, 1 / decode, state)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds."""
    leaves = tree_leaves([vars(layer) for layer in cache.layers])
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


def _step(model: Any, ids: Tensor, cache: Any) -> Any:
    """Runs tokens after those of the cache, as far as the logits of the last; the cache after."""
    output = model.base_model(ids, past_key_values=cache, use_cache=True)
    model.get_output_embeddings()(output.last_hidden_state[:, -1:])
    return output.past_key_values


def _seconds(call: Any, number: int) -> float:
    """Mean over so many calls, after WARM more; waits for a GPU."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.timeit(number).mean
