"""One layer of transformers' cache that holds a mixer's state instead of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import CacheLayerMixin


class StateLayer(CacheLayerMixin):
    """A state of fixed size and the number of tokens that it has seen.

    A state cannot forget its last tokens, so it cannot be cropped: assisted decoding, which would,
    is refused by transformers on ``is_croppable``.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, state: Any = None) -> None:
        super().__init__()
        self.state, self.seen = state, 0

    def put(self, state: Any, tokens: int) -> None:
        """The state after ``tokens`` more."""
        self.state, self.is_initialized = state, True
        self.seen += tokens

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise ValueError("key_states: this layer was converted and holds no keys")

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("key_states: this layer was converted and holds no keys")

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """States are small; they stay where they are."""

    def prefetch(self) -> None:
        """See ``offload``."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Rows of every tensor of the state, for beams."""
        self.state = pytree.tree_map(lambda x: x.index_select(0, indices), self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = pytree.tree_map(lambda x: x.repeat_interleave(repeats, 0), self.state)
