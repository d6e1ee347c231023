"""The published model types: what each calls its parts, and what its mixers take from a config.

A new type is one entry of ``KINDS``. Defaults are those of the published configs, for fields that
an older config.json does not have. OWN are types of mixers that were published as layers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from flacompile.layers import MIXERS, Attention, Mixer
from flacompile.ops.validate import expect
from flacompile.yarn import RopeScaling


@dataclass(frozen=True)
class Names:
    """Attributes of a model: ``backbone``.layers.0.``mixer``, and ``last`` of the backbone."""

    backbone: str = "model"
    norm: str = "attn_norm"
    mixer: str = "attn"
    ffn_norm: str = "mlp_norm"
    ffn: str = "mlp"
    last: str = "norm"


@dataclass(frozen=True)
class Kind:
    """One model type.

    Attributes:
        stem: of its classes' names.
        mixer: its key in ``MIXERS``.
        takes: fields of the config that the mixer's Config has under the same name: defaults.
        own: further fields of the config, over those of ``COMMON``: defaults.
        more: (config, layer) -> the other fields of the mixer's Config.
        ffn: "gated", "rwkv6", "rwkv7" or None.
        gate_width: channels of the forget gate, where its lower bounds are the model's.
        names: of the parts.
    """

    stem: str
    mixer: str
    takes: dict[str, Any]
    own: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Any, int], dict[str, Any]] = lambda config, layer: {}
    ffn: str | None = "gated"
    gate_width: Callable[[Any], int] = lambda config: config.hidden_size
    names: Names = Names()

    @property
    def defaults(self) -> dict[str, Any]:
        """All fields of the config with their values."""
        return COMMON | self.own | self.takes


COMMON: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "hidden_ratio": 4,
    "intermediate_size": None, "hidden_act": "swish", "norm_eps": 1e-6, "attn": None,
    "max_position_embeddings": 2048, "initializer_range": 0.02, "use_cache": True,
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    "attnres_block_size": None,
}  # fmt: skip
NORM = {"elementwise_affine": True, "norm_eps": 1e-6}
CONV = {"use_short_conv": False, "conv_size": 4}
DELTA = {
    "head_dim": 256, "num_heads": 6, "expand_v": 2.0, "use_short_conv": True, "conv_size": 4,
    "allow_neg_eigval": False, "norm_eps": 1e-6,
}  # fmt: skip
SOFTMAX = {"num_heads": 32, "num_kv_heads": None, "window_size": None, "rope_theta": 10000.0}
FEATURES = {"num_heads": 16, "num_kv_heads": None, "feature_dim": 16}
SSM = {"state_size": 16, "conv_kernel": 4, "use_bias": False}
SSM_TYPE = {"num_hidden_layers": 48, "norm_eps": 1e-5, "pad_token_id": 0}
STEP = {"use_conv_bias": True, "hidden_act": "silu", "dt_min": 0.001, "dt_max": 0.1}
RWKV_TYPE = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True}
YARN = {entry.name for entry in fields(RopeScaling)}
RWKV = Names(ffn_norm="ffn_norm", ffn="ffn")
MAMBA = Names("backbone", "norm", "mixer", last="norm_f")


def inner(config: Any) -> dict[str, Any]:
    """Mamba's width."""
    return {"intermediate_size": int(config.expand * config.hidden_size)}


def delta_net(config: Any, layer: int) -> dict[str, Any]:
    """DeltaNet is Gated DeltaProduct with one step a token and without decay."""
    for name, only in {"use_beta": True, "qk_norm": "l2", "qk_activation": "silu"}.items():
        expect(getattr(config, name) == only, name, repr(only), getattr(config, name))
    width, heads = config.hidden_size, config.num_heads
    key_dim, value_dim = (round(width * e) // heads for e in (config.expand_k, config.expand_v))
    return {
        "head_dim": key_dim,
        "expand_v": value_dim / key_dim,
        "use_output_gate": config.use_gate,
        "use_forget_gate": False,
        "num_householder": 1,
    }


def rwkv7(config: Any, layer: int) -> dict[str, Any]:
    """Layers after the first read the values of the first, which therefore has to be RWKV-7."""
    expect(config.attention(0) is None, "attn", "layers after 0 in rwkv7", config.attn)
    sizes = config.value_dim
    return {
        "layer_idx": layer,
        "value_dim": sizes[layer] if isinstance(sizes, list | tuple) else sizes,
    }


def latent(config: Any, layer: int) -> dict[str, Any]:
    """YaRN, where ``rope_scaling`` asks for it."""
    given = {name: value for name, value in config.rope_parameters.items() if name in YARN}
    return {"rope_scaling": RopeScaling(**given) if given["rope_type"] != "default" else None}


KINDS: dict[str, Kind] = {
    "abc": Kind(
        "ABC", "abc",
        {"num_heads": 4, "num_slots": 64, "expand_k": 0.5, "expand_v": 1.0, "use_rope": True,
         "clamp_min": -32, "clamp_max": 32, **CONV, **NORM},
    ),
    "based": Kind("Based", "based", FEATURES),
    "bitnet": Kind("BitNet", "bitattn", SOFTMAX),
    "delta_net": Kind(
        "DeltaNet", "gated_deltaproduct",
        {name: DELTA[name] for name in ("use_short_conv", "conv_size", "allow_neg_eigval")}
        | {"num_heads": 16, "norm_eps": 1e-6},
        {"expand_k": 1.0, "expand_v": 1.0, "use_gate": False, "use_beta": True, "qk_norm": "l2",
         "qk_activation": "silu"},
        delta_net,
    ),
    "gated_deltanet": Kind(
        "GatedDeltaNet", "gated_deltanet",
        {"num_v_heads": None, "use_gate": True, "output_gate_activation": "swish", **DELTA},
        {"num_hidden_layers": 21},
    ),
    "gated_deltaproduct": Kind(
        "GatedDeltaProduct", "gated_deltaproduct",
        {"use_output_gate": True, "use_forget_gate": False, "num_householder": 1, **DELTA},
        {"num_hidden_layers": 21},
    ),
    "gla": Kind(
        "GLA", "gla",
        {"num_heads": 4, "num_kv_heads": None, "expand_k": 0.5, "expand_v": 1.0,
         "feature_map": None, "use_output_gate": True, "clamp_min": None, **CONV, **NORM},
        more=lambda config, layer: {"gate_fn": config.hidden_act},
    ),
    "hgrn": Kind(
        "HGRN", "hgrn", {"expand_ratio": 1, **CONV, **NORM}, {"use_lower_bound": True},
        gate_width=lambda config: int(config.hidden_size * config.expand_ratio),
    ),
    "hgrn2": Kind(
        "HGRN2", "hgrn2", {"num_heads": None, "expand_ratio": 128, **CONV, **NORM},
        {"use_lower_bound": True},
    ),
    "lightnet": Kind(
        "LightNet", "lightnet",
        {"num_heads": None, "expand_ratio": 128, "gate_low_rank_dim": 128, **CONV, **NORM},
    ),
    "linear_attn": Kind(
        "LinearAttention", "linear_attn",
        {"num_heads": 4, "num_kv_heads": None, "expand_k": 1.0, "expand_v": 1.0,
         "feature_map": "elementwise_product", "tie_feature_map_qk": False, "norm_q": False,
         "norm_k": False, **NORM},
        {"norm_feature_map": False},
        lambda config, layer: {"do_feature_map_norm": config.norm_feature_map},
    ),
    "mamba": Kind(
        "Mamba", "mamba",
        {"dt_rank": "auto", "dt_scale": 1.0, "dt_init_floor": 1e-4, **SSM, **STEP},
        {"expand": 2, "dt_init_scheme": "random", **SSM_TYPE},
        lambda config, layer: {"dt_init": config.dt_init_scheme, **inner(config)},
        ffn=None, names=MAMBA,
    ),
    "mamba2": Kind(
        "Mamba2", "mamba2",
        {"head_dim": 64, "expand": 2, "n_groups": 1, "conv_init": None, "A_init_range": (1, 16),
         "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "norm_eps": 1e-5,
         "dt_limit": (0.0, float("inf")), "dt_init_floor": 1e-4, **SSM, **STEP, "state_size": 128},
        SSM_TYPE,
        ffn=None, names=MAMBA,
    ),
    "mla": Kind(
        "MLA", "mla",
        {"num_heads": 16, "q_lora_rank": 64, "qk_rope_head_dim": 64, "kv_lora_rank": 512,
         "v_head_dim": 128, "qk_nope_head_dim": 128, "window_size": None, "rope_theta": 10000.0},
        {"rope_parameters": None},  # in which transformers puts rope_scaling
        latent,
    ),
    "rebased": Kind(
        "ReBased", "rebased",
        {"use_gamma": True, "use_beta": True, "normalize": True, **FEATURES},
    ),
    "rwkv6": Kind(
        "RWKV6", "rwkv6",
        {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "proj_low_rank_dim": 32,
         "gate_low_rank_dim": 64, "norm_eps": 1e-5},
        {"hidden_ratio": 3.5, **RWKV_TYPE},
        ffn="rwkv6", names=RWKV,
    ),
    "rwkv7": Kind(
        "RWKV7", "rwkv7",
        {"head_dim": 64, "num_heads": None, "decay_low_rank_dim": 64, "gate_low_rank_dim": 128,
         "a_low_rank_dim": 64, "v_low_rank_dim": 16, "num_hidden_layers": 24, "norm_eps": 1e-5},
        {"value_dim": None, **RWKV_TYPE},
        rwkv7,
        ffn="rwkv7", names=RWKV,
    ),
    "samba": Kind(
        "Samba", "mamba", SSM,
        {"hidden_size": 2304, "num_hidden_layers": 18, "norm_eps": 1e-5, "pad_token_id": 0,
         "expand": 2, "time_step_rank": "auto",
         "attn": {"layers": list(range(1, 18, 2)), "num_heads": 18, "window_size": 2048}},
        lambda config, layer: {"dt_rank": config.time_step_rank, **inner(config)},
        names=Names("backbone", "mixer_norm", "mixer", last="norm_f"),
    ),
    "simple_gla": Kind(
        "SimpleGLA", "simple_gla",
        {"num_heads": 4, "num_kv_heads": None, "expand_k": 1.0, "expand_v": 1.0,
         "feature_map": None, "use_output_gate": True, **CONV, "use_short_conv": True, **NORM},
        more=lambda config, layer: {"gate_fn": config.hidden_act},
    ),
    "transformer": Kind("Transformer", "attn", SOFTMAX | {"qkv_bias": False, "qk_norm": False}),
}  # fmt: skip

OWN = ("based", "rebased", "simple_gla")


def mixer(config: Any, layer: int) -> Mixer:
    """The mixer of one layer: softmax attention where ``config.attn`` names it."""
    width, spec = config.hidden_size, config.attention(layer)
    if spec is not None:
        return Attention(Attention.Config(hidden_size=width, **spec))
    kind = KINDS[config.model_type]
    given = {name: getattr(config, name) for name in kind.takes}
    cls: Any = MIXERS[kind.mixer]
    return cls(cls.Config(hidden_size=width, **given, **kind.more(config, layer)))
