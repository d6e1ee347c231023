"""Tiny models with random weights.

All of MODELS can be converted, nothing of REJECTED, and of MIXED some; what is left has a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from handwritten import (
    DIM,
    GPT,
    HEADS,
    LAYERS,
    TIME,
    VOCAB,
    Block,
    CrossModel,
    Einsum,
    Encoder,
    Funnel,
    InlineBlock,
    InlineSoftmax,
    Multihead,
    PackedAttention,
    RotaryAttention,
    WrittenOut,
)
from torch import Tensor, nn


class Case(NamedTuple):
    """A model in evaluation mode and the inputs of one call."""

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]


def _ids(batch: int = 2, time: int = TIME) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def _sharpen(model: nn.Module) -> nn.Module:
    """Weights large enough, and biases and norms unlike their start, for attention to matter."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data.copy_(noise * 1.5 / math.sqrt(DIM))
        elif parameter.dim() == 1:
            parameter.data.add_(0.2 * noise)
    return model.eval()


def _hf(
    config_class: type, model_class: type, inputs: dict[str, Tensor] | None = None, **options: Any
) -> Callable[[], Case]:
    """Builder of a transformers model; without inputs it reads token ids."""
    if inputs is None or "input_ids" in inputs or "decoder_input_ids" in inputs:
        options = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0} | options

    def build() -> Case:
        torch.manual_seed(0)
        model = _sharpen(model_class(config_class(**options)))
        return Case(model, (_ids(),), {}) if inputs is None else Case(model, (), inputs)

    return build


def llama(name: str = "Llama", model: str | None = None, **options: Any) -> Callable[[], Case]:
    """Builder of a model of the Llama family, grouped heads unless an option says otherwise."""
    shape = {
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = getattr(transformers, name + "Config")
    return _hf(config, getattr(transformers, (model or name) + "ForCausalLM"), **(shape | options))


def _gpt2(**options: Any) -> Callable[[], Case]:
    shape = {"n_embd": DIM, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
    return _hf(transformers.GPT2Config, transformers.GPT2LMHeadModel, **(shape | options))


def _own(attention: Callable[[], nn.Module], positions: bool = True) -> Callable[[], Case]:
    return _plain(lambda: GPT(lambda: Block(attention()), positions))


def _plain(model: Callable[[], nn.Module]) -> Callable[[], Case]:
    def build() -> Case:
        torch.manual_seed(0)
        return Case(_sharpen(model()), (_ids(),), {})

    return build


def falcon(**options: Any) -> Callable[[], Case]:
    """Builder of a Falcon."""
    shape = {"hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config, model = transformers.FalconConfig, transformers.FalconForCausalLM
    return _hf(config, model, **(shape | {"alibi": False} | options))


def deepseek(name: str) -> Callable[[], Case]:
    """Builder of a model with latent attention."""
    dims = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16}
    return llama(name, num_key_value_heads=HEADS, first_k_dense_replace=LAYERS, **dims, **ranks)


def _inline_root() -> Case:
    torch.manual_seed(0)
    return Case(_sharpen(InlineBlock()), (torch.randn(2, TIME, DIM),), {})


def _cross() -> Case:
    torch.manual_seed(0)
    x, memory = torch.randn(2, TIME, DIM), torch.randn(2, TIME, DIM)
    return Case(_sharpen(CrossModel()), (x, memory), {})


def _encoder(
    config: type, model: type, inputs: dict[str, Tensor] | None = None, **options: Any
) -> Callable[[], Case]:
    shape = {
        "hidden_size": DIM,
        "intermediate_size": DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    return _hf(config, model, inputs, **(shape | options))


def _encoder_decoder(name: str, inputs: dict[str, Tensor], **options: Any) -> Callable[[], Case]:
    config = getattr(transformers, name + "Config")
    model = getattr(transformers, name + "ForConditionalGeneration")
    shape = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": DIM}.items()
    }
    return _hf(config, model, inputs, d_model=DIM, pad_token_id=0, **(shape | options))


def _llava() -> Case:
    """A Llama that reads four patches of an image among its tokens."""
    torch.manual_seed(0)
    shape = {"hidden_size": DIM, "intermediate_size": DIM, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": HEADS}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, **shape),
        text_config=transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **shape),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
    )
    ids = _ids().clamp(1, VOCAB - 2)
    ids[:, 3:7] = VOCAB - 1
    inputs = {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8).sin(), "input_ids": ids}
    return Case(_sharpen(transformers.LlavaForConditionalGeneration(config)), (), inputs)


def _dilated(time: int) -> Tensor:
    """Every second of the earlier tokens, and the token itself."""
    distance = torch.arange(time)[:, None] - torch.arange(time)
    return (distance >= 0) & (distance % 2 == 0)


def _alibi(time: int) -> Tensor:
    distance = torch.arange(time)[:, None] - torch.arange(time)
    return torch.where(distance >= 0, -0.5 * distance, -math.inf)


MODELS: dict[str, Callable[[], Case]] = {
    "llama": llama(),
    "llama_mha": llama(num_key_value_heads=HEADS),
    "llama_mqa": llama(num_key_value_heads=1),
    "llama_tied": llama(tie_word_embeddings=True),
    "llama_bias": llama(attention_bias=True),
    "llama_yarn": llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "qwen2": llama("Qwen2"),
    "qwen3": llama("Qwen3", head_dim=16),
    "gemma2": llama(
        "Gemma2",
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=1.5,
    ),
    "gemma3": llama(
        "Gemma3Text",
        "Gemma3",
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": llama("Phi3", pad_token_id=0),
    "starcoder2": llama("Starcoder2", sliding_window=8),
    "smollm3": llama("SmolLM3", no_rope_layer_interval=2, pad_token_id=0),
    "mixtral": llama("Mixtral", num_local_experts=4, experts_implementation="eager"),
    "mistral": llama("Mistral", sliding_window=8),
    "olmo2": llama("Olmo2"),
    "gpt2": _gpt2(),
    "gpt_neox": _hf(
        transformers.GPTNeoXConfig,
        transformers.GPTNeoXForCausalLM,
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
    ),
    "gptj": _hf(
        transformers.GPTJConfig,
        transformers.GPTJForCausalLM,
        n_embd=DIM,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=128,
        rotary_dim=4,
    ),
    "gpt_neo": _hf(
        transformers.GPTNeoConfig,
        transformers.GPTNeoForCausalLM,
        hidden_size=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=30,
        max_position_embeddings=128,
    ),
    "falcon": falcon(num_kv_heads=2, new_decoder_architecture=True),
    "falcon_mqa": falcon(),
    "falcon_bias": falcon(multi_query=False, parallel_attn=False, bias=True),
    "handwritten": _own(PackedAttention),
    "handwritten_per_head": _own(lambda: PackedAttention(per_head=True, factor=0.5)),
    "handwritten_rope": _own(RotaryAttention, positions=False),
    "handwritten_even_odd": _own(lambda: RotaryAttention("even_odd"), positions=False),
    "handwritten_inline": _plain(lambda: GPT(InlineBlock)),
    "handwritten_inline_softmax": _plain(lambda: GPT(InlineSoftmax)),
    "handwritten_funnel": _own(Funnel),
    "handwritten_softmax": _own(WrittenOut),
    "handwritten_einsum": _own(Einsum),
    "handwritten_multihead": _own(Multihead),
    "handwritten_encoder": _plain(Encoder),
    "handwritten_time_first": _plain(lambda: Encoder(batch_first=False)),
}

LATENT = "queries and keys are projections of different tensors made inside the module (low-rank"
REJECTED: dict[str, tuple[Callable[[], Case], str]] = {
    "bert": (_encoder(transformers.BertConfig, transformers.BertModel), "bidirectional"),
    "vit": (
        _encoder(
            transformers.ViTConfig,
            transformers.ViTModel,
            {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8).sin()},
            image_size=8,
            patch_size=4,
        ),
        "bidirectional",
    ),
    "falcon_alibi": (falcon(alibi=True), "the mask adds a bias to the scores (ALiBi"),
    "bloom": (
        _hf(
            transformers.BloomConfig,
            transformers.BloomForCausalLM,
            hidden_size=DIM,
            n_layer=LAYERS,
            n_head=HEADS,
        ),
        "attention is written out as a softmax, and its product adds a bias to the scores",
    ),
    "deepseek_v2": (deepseek("DeepseekV2"), LATENT),
    "deepseek_v3": (deepseek("DeepseekV3"), LATENT),
    "bidirectional": (_own(lambda: PackedAttention(is_causal=False)), "bidirectional"),
    "inline_root": (_inline_root, "attention is inline in InlineBlock (the model itself)"),
    "cross": (_cross, "cross-attention: keys come from another input than queries"),
    "dropout": (_own(lambda: PackedAttention(dropout=0.1)), "dropout 0.1 is active"),
    "dilated": (
        _own(lambda: PackedAttention(is_causal=False, mask=_dilated)),
        "other mask: neither causal nor a causal sliding window",
    ),
    "alibi": (
        _own(lambda: PackedAttention(is_causal=False, mask=_alibi)),
        "the mask adds a bias to the scores",
    ),
    "sinks": (
        _own(lambda: WrittenOut(lambda s: F.pad(s, (0, 1)).softmax(-1)[..., :-1])),
        "attention is written out as a softmax, and pad stands between its product and the softmax",
    ),
    "softmax over queries": (
        _own(lambda: WrittenOut(lambda s: s.softmax(-2))),
        "attention is written out as a softmax, and it is over another dim than the last",
    ),
}

# (model, paths that are converted, reason of each path that is not)
MIXED: dict[str, tuple[Callable[[], Case], str, dict[str, str]]] = {
    "bart": (
        _encoder_decoder(
            "Bart",
            {"input_ids": _ids(), "decoder_input_ids": _ids(2, 12)},
            max_position_embeddings=64,
        ),
        "model.decoder.layers.*.self_attn",
        {"model.encoder.*": "bidirectional", "model.decoder.*.encoder_attn": "cross-attention"},
    ),
    "llava": (
        _llava,
        "model.language_model.layers.*.self_attn",
        {"model.vision_tower.*": "bidirectional"},
    ),
}
