"""The menu of mixers: ``MIXERS[name]``, each one file, each a ``Mixer``."""

from flacompile.layers.attn import Attention, AttentionState
from flacompile.layers.base import Mixer, RecurrentState
from flacompile.layers.gla import GatedLinearAttention
from flacompile.layers.linear_attn import LinearAttention
from flacompile.layers.packing import cu_seqlens_from_mask, pad, unpad
from flacompile.layers.simple_gla import SimpleGatedLinearAttention

MIXERS: dict[str, type[Mixer]] = {
    "attn": Attention,
    "gla": GatedLinearAttention,
    "linear_attn": LinearAttention,
    "simple_gla": SimpleGatedLinearAttention,
}

__all__ = [
    "MIXERS",
    "Attention",
    "AttentionState",
    "GatedLinearAttention",
    "LinearAttention",
    "Mixer",
    "RecurrentState",
    "SimpleGatedLinearAttention",
    "cu_seqlens_from_mask",
    "pad",
    "unpad",
]
