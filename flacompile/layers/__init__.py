"""The menu of mixers: ``MIXERS[name]``, each one file, each a ``Mixer``."""

from flacompile.layers.abc import ABCAttention
from flacompile.layers.attn import Attention
from flacompile.layers.base import Mixer, RecurrentState
from flacompile.layers.based import BasedLinearAttention
from flacompile.layers.bitattn import BitAttention
from flacompile.layers.cache import AttentionState
from flacompile.layers.gated_deltanet import GatedDeltaNet
from flacompile.layers.gated_deltaproduct import GatedDeltaProduct
from flacompile.layers.gla import GatedLinearAttention
from flacompile.layers.hgrn import HGRNAttention
from flacompile.layers.hgrn2 import HGRN2Attention
from flacompile.layers.hybrid import HybridAttention, HybridState
from flacompile.layers.lightnet import LightNetAttention
from flacompile.layers.linear_attn import LinearAttention
from flacompile.layers.mamba import Mamba
from flacompile.layers.mamba2 import Mamba2
from flacompile.layers.mla import MultiheadLatentAttention
from flacompile.layers.packing import cu_seqlens_from_mask, pad, unpad
from flacompile.layers.rebased import ReBasedLinearAttention
from flacompile.layers.rwkv6 import RWKV6Attention
from flacompile.layers.rwkv7 import RWKV7Attention
from flacompile.layers.simple_gla import SimpleGatedLinearAttention

MIXERS: dict[str, type[Mixer]] = {
    "abc": ABCAttention,
    "attn": Attention,
    "based": BasedLinearAttention,
    "bitattn": BitAttention,
    "gated_deltanet": GatedDeltaNet,
    "gated_deltaproduct": GatedDeltaProduct,
    "gla": GatedLinearAttention,
    "hgrn": HGRNAttention,
    "hgrn2": HGRN2Attention,
    "hybrid": HybridAttention,
    "lightnet": LightNetAttention,
    "linear_attn": LinearAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mla": MultiheadLatentAttention,
    "rebased": ReBasedLinearAttention,
    "rwkv6": RWKV6Attention,
    "rwkv7": RWKV7Attention,
    "simple_gla": SimpleGatedLinearAttention,
}

__all__ = [
    "MIXERS",
    "ABCAttention",
    "Attention",
    "AttentionState",
    "BasedLinearAttention",
    "BitAttention",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "HGRN2Attention",
    "HGRNAttention",
    "HybridAttention",
    "HybridState",
    "LightNetAttention",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "Mixer",
    "MultiheadLatentAttention",
    "RWKV6Attention",
    "RWKV7Attention",
    "ReBasedLinearAttention",
    "RecurrentState",
    "SimpleGatedLinearAttention",
    "cu_seqlens_from_mask",
    "pad",
    "unpad",
]
