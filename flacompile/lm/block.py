"""One layer of the language model: norm, mixer, and norm, MLP where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from flacompile.blocks import RMSNorm
from flacompile.hf import state_layer
from flacompile.layers.base import Mixer
from flacompile.layers.rwkv7 import RWKV7Attention
from flacompile.lm.config import Config
from flacompile.lm.ffn import GatedMLP, feed_forward
from flacompile.lm.kinds import mixer


class BlockState(NamedTuple):
    """What a block carries from call to call: its mixer's state, its channel mix's or ()."""

    mixer: Any
    ffn: Any

    @property
    def position(self) -> Tensor:
        """[N] int64, the number of tokens seen."""
        return self.mixer.position


class Places(NamedTuple):
    """Where the tokens of one call stand, as mixers take it: mask [B, T], cu_seqlens [N + 1]."""

    mask: Tensor | None
    cu_seqlens: Tensor | None

    def run(
        self, mixer: Any, x: Tensor, state: Any, extra: dict[str, Tensor]
    ) -> tuple[Tensor, Any]:
        """A mixer's y and next state; a single token takes its ``step``."""
        plain = self.mask is None and self.cu_seqlens is None
        if not plain or state is None or x.shape[1] > 1:
            return mixer(x, state, **self._asdict(), **extra)
        y, state = mixer.step(x[:, 0], state, **{name: i[:, 0] for name, i in extra.items()})
        return y[:, None], state


def norm(config: Config) -> nn.Module:
    """LayerNorm in RWKV, RMSNorm elsewhere."""
    if config.kind.ffn in ("rwkv6", "rwkv7"):
        return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)
    return RMSNorm(config.hidden_size, config.norm_eps)


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), and the same with the MLP where there is one."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.names, self.layer = config.kind.names, layer
        if layer == 0 and getattr(config, "norm_first", False):
            self.pre_norm = norm(config)
        self.add_module(self.names.norm, norm(config))
        self.add_module(self.names.mixer, mixer(config, layer))
        if config.kind.ffn is not None:
            self.add_module(self.names.ffn_norm, norm(config))
            self.add_module(self.names.ffn, feed_forward(config, layer))

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        lower_bound: Tensor | None,
        places: Places,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> the same after this block, and RWKV-7's values of layer 0."""
        slot = None if past_key_values is None else state_layer(past_key_values, self.layer)
        past = BlockState(None, None) if slot is None or slot.state is None else slot.state
        x = self.pre_norm(x) if hasattr(self, "pre_norm") else x
        y, v_first, state = self.mix(x, past.mixer, v_first, lower_bound, places)
        x, ffn_state = x + y, ()
        if hasattr(self, self.names.ffn_norm):
            y = self.get_submodule(self.names.ffn_norm)(x)
            ffn = self.get_submodule(self.names.ffn)
            if isinstance(ffn, GatedMLP):
                y = ffn(y)
            else:
                y, ffn_state = places.run(ffn, y, past.ffn, {})
            x = x + y
        if slot is not None:
            slot.put(BlockState(state, ffn_state), x.shape[1])
        return x, v_first

    def init_state(self, batch_size: int, init: Callable[[Mixer, int], Any]) -> BlockState:
        """Before the first token; ``init`` makes that of a mixer."""
        mixer: Any = self.get_submodule(self.names.mixer)
        ffn = getattr(self, self.names.ffn, None)
        has_state = isinstance(ffn, Mixer)
        return BlockState(init(mixer, batch_size), init(ffn, batch_size) if has_state else ())

    def mix(
        self,
        x: Tensor,
        state: Any,
        v_first: Tensor | None,
        lower_bound: Tensor | None,
        places: Places,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The mixer's y, v_first, and the mixer's next state."""
        x, module = self.get_submodule(self.names.norm)(x), self.get_submodule(self.names.mixer)
        extra: dict[str, Tensor] = {}
        if isinstance(module, RWKV7Attention):
            if self.layer == 0:
                v_first = module.values(x, state, **places._asdict())
            else:
                assert v_first is not None
                extra = {"v_first": v_first}
        if lower_bound is not None and hasattr(module, "forget"):
            bound = {"forget.lower_bound": lower_bound}
            y, state = functional_call(module, bound, (x, state), places._asdict())
        else:
            y, state = places.run(module, x, state, extra)
        return y, v_first, state
