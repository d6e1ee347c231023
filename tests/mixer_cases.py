"""The configs under which every mixer is tested, and what the published layers are named.

``VARIANTS[name]`` is a table of config fields; a mixer with the projections of attention is also
tested under ``QKV``. The first variant of a mixer is the one that is compiled.
"""

from __future__ import annotations

import json
from pathlib import Path

from mixer_inputs import HALVES, WIDTH

from flacompile.blocks import QKNorm, Rotary
from flacompile.layers import MIXERS, Attention
from flacompile.layers.qkv import QKVMixer
from flacompile.yarn import RopeScaling

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=40, mscale_all_dim=0.8)
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

RANKS = {"decay_low_rank_dim": 5, "a_low_rank_dim": 3, "gate_low_rank_dim": 7}  # of rwkv7


def beside(linear: str, window: int, **fields: object) -> dict:
    """A hybrid of this mixer and a softmax of as many heads over a window."""
    softmax = {"hidden_size": WIDTH, "num_heads": 4, "num_kv_heads": 2, "rotary": HALVES}
    config = MIXERS[linear].Config(**({"hidden_size": WIDTH, "num_heads": 4} | fields))
    return {"softmax": Attention.Config(window_size=window, **softmax), "linear": config}


VARIANTS = {
    "abc": {
        "conv": {"use_short_conv": True, "num_kv_heads": 2, "num_slots": 5, "rotary": HALVES},
        "input_gate": {"use_input_gate": True, "use_norm": False, "clamp_max": 0.5},
        "bare": {"use_rope": False, "use_norm": False, "use_output_gate": False},
        "unclamped": {"use_output_gate": False, "clamp_min": None, "clamp_max": None},
        "recency": {"recency": True, "num_slots": 7, "num_kv_heads": 2},
    },
    "attn": {
        "window": {"window_size": 5, "num_kv_heads": 2},
        "no_rotary": {"rope_theta": None},
        "qk_norm_default": {"qk_norm": True},
        "softcap": {"logit_softcapping": 0.5, "window_size": 5, "num_kv_heads": 2},
    },
    "bitattn": {
        "window": {"window_size": 5, "num_kv_heads": 2},
        "no_norm": {"input_norm": False, "rope_theta": None},
    },
    "based": {"odd": {"feature_dim": 5, "head_dim": 7, "num_kv_heads": 2, "use_decay": True}},
    "gated_deltanet": {
        "more_values": {"num_v_heads": 8, "conv_bias": True, "rotary": HALVES},
        "no_conv": {"use_short_conv": False, "num_kv_heads": 2, "allow_neg_eigval": True},
        "bare": {
            "use_short_conv": False,
            "activation": "identity",
            "use_gate": False,
            "output_norm": False,
            "beta_bias": True,
        },
    },
    "gated_deltaproduct": {
        "three": {"num_householder": 3, "num_v_heads": 8, "conv_size": 3},
        "one": {"num_householder": 1, "allow_neg_eigval": False, "use_output_gate": False},
        "no_decay": {"use_forget_gate": False, "use_short_conv": False, "num_kv_heads": 2},
    },
    "gla": {
        "conv": {"use_short_conv": True, "num_kv_heads": 2, "rotary": HALVES},
        "conv_bias": {"use_short_conv": True, "conv_bias": True, "conv_size": 2},
        "bare": {"use_output_gate": False, "output_norm": False},
        "norm_alone": {"use_output_gate": False},
        "sigmoid_gate": {"gate_fn": "sigmoid", "feature_map": "relu", "clamp_min": -0.05},
    },
    "hybrid": {
        "gla": beside("gla", 5, rotary=HALVES, num_kv_heads=2),
        "default": {},
        "mamba2": beside("mamba2", 2, expand=1, head_dim=12, state_size=8, n_groups=2),
        "gated_deltanet": beside("gated_deltanet", 3, head_dim=10, o_bias=True),
        "linear_attn": beside("linear_attn", 200, feature_map="elu", do_feature_map_norm=True),
    },
    "rwkv6": {
        "sigmoid_gate": {"gate_fn": "sigmoid"},
        "bare": {"use_output_gate": False, "output_norm": False, "rotary": HALVES},
        "norm_alone": {"use_output_gate": False, "elementwise_affine": False, "expand_v": 0.5},
        "default_ranks": {"proj_low_rank_dim": 32, "gate_low_rank_dim": 64},
    },
    "rwkv7": {
        "bare": {"use_output_gate": False, "output_norm": False, "rotary": HALVES},
        "values": {"value_dim": 24, "num_kv_heads": 2, "elementwise_affine": False},
        "default_ranks": dict.fromkeys(RANKS),
    },
    "hgrn": {
        "conv": {"use_short_conv": True, "expand_ratio": 2, "lower_bound": 0.3},
        "default": {},
        "bounds": {"lower_bound": tuple(i / 50 for i in range(48)), "conv_bias": True},
        "heads": {
            "num_heads": 4,
            "head_dim": 5,
            "timescales": 3,
            "bias": True,
            "o_bias": True,
            "activation": "identity",
            "output_norm": False,
        },
    },
    "hgrn2": {
        "conv": {"use_short_conv": True, "conv_bias": True, "num_kv_heads": 2, "lower_bound": 0.9},
        "keys": {"tie_keys": False, "num_kv_heads": 2, "rotary": HALVES, "output_norm": False},
        "queries": {"feature_map": "identity", "tie_keys": False, "qk_norm": QKNorm(1e-6, True)},
        "narrow": {"expand_ratio": None, "num_heads": 3, "lower_bound": (0.1, 0.5) * 24},
    },
    "simple_gla": {
        "no_conv": {"use_short_conv": False, "num_kv_heads": 2},
        "bare": {"use_short_conv": False, "use_output_gate": False, "output_norm": False},
    },
    "lightnet": {
        "narrow": {"expand_ratio": 7, "gate_low_rank_dim": 5, "num_kv_heads": 2},
        "conv": {"expand_ratio": None, "use_short_conv": True, "conv_bias": True},
        "bare": {"use_output_gate": False, "output_norm": False},
        "mirrored": {"mirrored": True, "recency": True, "expand_ratio": 6, "rotary": HALVES},
    },
    "linear_attn": {
        "hedgehog": {"feature_map": "hedgehog", "do_feature_map_norm": True, "rotary": HALVES},
        "elu": {"feature_map": "elu", "do_feature_map_norm": True, "output_norm": "identity"},
        "t2r": {"feature_map": "t2r", "norm_q": True, "norm_k": True},
        "dpfp": {"feature_map": "dpfp", "norm_k": True},
        "tied": {"tie_feature_map_qk": True},
        "decay": {"feature_map": "hedgehog", "do_feature_map_norm": True, "use_decay": True},
    },
    "mamba": {
        "heads": {"num_heads": 4, "num_kv_heads": 2, "rotary": HALVES},
        "default": {},
        "bias": {"use_bias": True, "dt_rank": 5, "use_conv_bias": False, "hidden_act": "gelu"},
        "bare": {"num_heads": 4, "use_short_conv": False, "use_output_gate": False, "scale": 0.3},
        "qk_norm": {"num_heads": 4, "qk_norm": QKNorm(1e-6, False), "qkv_bias": True},
    },
    "mamba2": {
        "groups": {"n_groups": 2, "rotary": HALVES, "conv_kernel": 3},
        "default": {},
        "no_norm": {"rmsnorm": False, "dt_limit": (0.3, 0.9), "use_bias": True},
        "norm_first": {"norm_before_gate": True, "D_has_hdim": True, "n_groups": 3},
        "bare": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "n_groups": 4,
            "rmsnorm": False,
            "scale": 0.3,
            "use_short_conv": False,
            "use_output_gate": False,
            "qkv_bias": True,
        },
        "qk_norm": {
            "num_kv_heads": 3,
            "qk_norm": QKNorm(1e-6, True, 1.0),
            "rotary": HALVES,
            "scale": 0.1,
            "rmsnorm": False,
        },
    },
    "mla": {
        "yarn": {"rope_scaling": YARN, "window_size": 5},
        "softcap": {"logit_softcapping": 0.5},
        "default": {},
        "plain_q": {"q_lora_rank": None, "qk_bias": True, "o_bias": True, "rope_theta": None},
        "converted": {
            "q_lora_rank": None,
            "qk_nope_head_dim": 0,
            "latent_norm": False,
            "rotary": HALVES,
            "scale": 0.3,
        },
    },
    "rebased": {
        "offset": {"normalize": False, "offset": 2.0, "num_kv_heads": 2, "use_decay": True},
        "no_affine": {"use_gamma": False, "use_beta": False},
        "no_gamma": {"use_gamma": False, "feature_dim": 7, "eps": 1e-5},
        "no_norm": {"use_beta": False, "normalize": False, "offset": 1.0},
    },
}

SIZES = {  # where the default ones are large, or do not fit the width
    "rwkv6": {"num_heads": 4, "proj_low_rank_dim": 5, "gate_low_rank_dim": 7},
    "rwkv7": {"num_heads": 4} | RANKS,
    "based": {"num_heads": 4, "feature_dim": 12},
    "gated_deltanet": {"num_heads": 4, "head_dim": 12, "expand_v": 1.5},
    "gated_deltaproduct": {"num_heads": 4, "head_dim": 12, "expand_v": 1.5},
    "hgrn2": {"expand_ratio": 12},
    "mamba": {"intermediate_size": 64, "state_size": 8},
    "mamba2": {"expand": 1, "head_dim": 8, "state_size": 8},
    "mla": {
        "num_heads": 4,
        "q_lora_rank": 10,
        "qk_rope_head_dim": 6,
        "kv_lora_rank": 14,
        "v_head_dim": 5,
        "qk_nope_head_dim": 7,
    },
    # where Σ (q·k)² is small next to |q|² |k|², o is rounding, in the loop as in the mixer
    "rebased": {"num_heads": 4, "feature_dim": 12, "eps": 1.0},
}


def variants(name: str) -> dict[str, dict]:
    """The config fields of each case of a mixer."""
    shared = QKV if issubclass(MIXERS[name], QKVMixer) else {}
    return VARIANTS.get(name, {} if shared else {"default": {}}) | shared


# [{"config": fields, "state_dict": {name: shape}}] of every mixer, read off the layers of
# flash-linear-attention 0.6.0; the first entry is the default of the layer.
PUBLISHED = json.loads((Path(__file__).parent / "published_layers.json").read_text())
