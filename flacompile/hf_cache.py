"""One layer of transformers' cache that holds a mixer's state instead of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import CacheLayerMixin, DummyLayer

NO_KEYS = (
    "past_key_values: expected a cache that takes keys, got one of a converted model; "
    "start a cache with this model"
)


class StateLayer(CacheLayerMixin, DummyLayer):
    """A state of fixed size and the number of tokens that it has seen.

    A dummy as to keys and values, so that masks are sized by a layer that was kept, if there is
    one. In a static cache it keeps its addresses and counts in a tensor, for graphs that replay.

    Args:
        state: what the mixer returned last.
        length: tokens that a static cache has room for; None in one that grows.
    """

    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, state: Any = None, length: int | None = None) -> None:
        super().__init__()
        self.state, self.length = state, length
        self.seen: Any = 0
        self.is_compileable = length is not None

    def put(self, state: Any, tokens: int) -> None:
        """The state after ``tokens`` more."""
        if self.length is not None and not self.is_initialized:
            self._begin(pytree.tree_leaves(state))
        if self.is_initialized and self.length is not None and _same_shapes(self.state, state):
            pytree.tree_map(lambda old, new: old.copy_(new), self.state, state)
        else:
            self.state = state
        self.seen += tokens
        self.is_initialized = True

    def _begin(self, leaves: list[torch.Tensor]) -> None:
        """The tensors of a static cache stay where they are from now on."""
        self.seen = torch.zeros((), dtype=torch.int64, device=leaves[0].device)
        if not torch.compiler.is_compiling():
            for tensor in (*leaves, self.seen):
                torch._dynamo.mark_static_address(tensor)

    def get_seq_length(self) -> int:
        """Tokens seen; a tensor in a static cache."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns of a mask for so many queries, and the first of them."""
        return (self.seen + query_length if self.length is None else self.length), 0

    def get_max_length(self) -> int:  # type: ignore[override]
        """Room in tokens; -1 where there is no bound."""
        return -1 if self.length is None else self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing, or a ValueError: what a state took in stays."""
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove: expected 0, as a state cannot forget, got {tokens_to_remove}; "
                "generate without assistant_model and prompt_lookup_num_tokens"
            )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Refuses keys: only an attention that was kept has some."""
        raise ValueError(NO_KEYS)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuses keys, see ``lazy_initialization``."""
        raise ValueError(NO_KEYS)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """States are small; they stay where they are."""

    def prefetch(self) -> None:
        """See ``offload``."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row beam_idx[i], [B]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Rows of every tensor of the state, for beams."""
        self.state = pytree.tree_map(lambda x: x.index_select(0, indices), self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times in a row."""
        self.state = pytree.tree_map(lambda x: x.repeat_interleave(repeats, 0), self.state)


def _same_shapes(a: Any, b: Any) -> bool:
    """Not so for the keys of a softmax, which grow."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(x.shape == y.shape for x, y in pairs)
