"""PyTorch's own attention modules: how they show as one node, and what stands in for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# (class, keyword, its place in the call, value that leads to one scaled_dot_product_attention)
_ARGUMENTS = (
    (nn.MultiheadAttention, "need_weights", 4, False),
    (nn.TransformerEncoder, "is_causal", 3, False),  # None looks into the mask, True drops it
    (nn.TransformerDecoder, "tgt_is_causal", 6, False),
)


@contextmanager
def as_one_node(model: nn.Module) -> Iterator[None]:
    """Inside, PyTorch's modules take neither their fused path nor the one that gives weights."""
    hooks = []
    for module in model.modules():
        for cls, name, place, value in _ARGUMENTS:
            if isinstance(module, cls):
                hook = _setting(name, place, value)
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()


def _setting(name: str, place: int, value: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with this one set, by place or by name."""
        if len(args) > place:
            return (*args[:place], value, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: value}

    return hook


def take_place(new: nn.Module, original: nn.Module) -> None:
    """Gives `new` what nn.TransformerEncoderLayer reads of its attention to choose its path.

    Without a bias it calls the attention instead of fusing it.
    """
    if isinstance(original, nn.MultiheadAttention):
        new.batch_first, new.in_proj_bias = original.batch_first, None  # type: ignore[assignment]
