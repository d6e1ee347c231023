"""The configs under which every mixer is tested, and what the published layers are named.

``VARIANTS[name]`` is a table of config fields; a mixer with the projections of attention is also
tested under ``QKV``. The first variant of a mixer is the one that is compiled.
"""

from __future__ import annotations

import json
from pathlib import Path

from mixer_inputs import HALVES

from flacompile.blocks import QKNorm, Rotary
from flacompile.layers import MIXERS
from flacompile.layers.qkv import QKVMixer

PAIRS = Rotary.Config(inv_freq=(1.0, 0.1), interleaved=True, factor=1.2)
QKV = {  # of every mixer with the projections of attention
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one_key_head": {"num_kv_heads": 1, "rotary": HALVES},
    "interleaved": {"rotary": PAIRS},
    "converted": {"head_dim": 8, "qkv_bias": True, "o_bias": True, "scale": 0.3, "num_kv_heads": 2},
    "qk_norm": {"qk_norm": QKNorm(1e-6, True, 1.0), "rotary": HALVES},
    "qk_norm_wide": {"qk_norm": QKNorm(1e-6, False), "num_kv_heads": 2},
}
VARIANTS = {
    "attn": {
        "window": {"window_size": 5, "num_kv_heads": 2},
        "no_rotary": {"rope_theta": None},
        "qk_norm_default": {"qk_norm": True},
    },
    "gla": {
        "conv": {"use_short_conv": True, "num_kv_heads": 2, "rotary": HALVES},
        "conv_bias": {"use_short_conv": True, "conv_bias": True, "conv_size": 2},
        "bare": {"use_output_gate": False, "output_norm": False},
        "norm_alone": {"use_output_gate": False},
        "sigmoid_gate": {"gate_fn": "sigmoid", "feature_map": "relu", "clamp_min": -0.05},
    },
    "simple_gla": {
        "no_conv": {"use_short_conv": False, "num_kv_heads": 2},
        "bare": {"use_short_conv": False, "use_output_gate": False, "output_norm": False},
    },
    "linear_attn": {
        "hedgehog": {"feature_map": "hedgehog", "do_feature_map_norm": True, "rotary": HALVES},
        "elu": {"feature_map": "elu", "do_feature_map_norm": True, "output_norm": "identity"},
        "t2r": {"feature_map": "t2r", "norm_q": True, "norm_k": True},
        "dpfp": {"feature_map": "dpfp", "norm_k": True},
        "tied": {"tie_feature_map_qk": True},
    },
}


def variants(name: str) -> dict[str, dict]:
    """The config fields of each case of a mixer."""
    shared = QKV if issubclass(MIXERS[name], QKVMixer) else {}
    return VARIANTS.get(name, {} if shared else {"default": {}}) | shared


# [{"config": fields, "state_dict": {name: shape}}] of every mixer, read off the layers of
# flash-linear-attention 0.6.0; the first entry is the default of the layer.
PUBLISHED = json.loads((Path(__file__).parent / "published_layers.json").read_text())
