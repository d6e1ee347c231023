"""embedding, L x [norm, mixer, norm, MLP], norm, head, as models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from flacompile.blocks import RMSNorm, Rotary, at_least_fp32
from flacompile.hf import state_layer
from flacompile.layers.hgrn import ForgetGate
from flacompile.layers.rwkv7 import RWKV7Attention
from flacompile.lm.config import Config
from flacompile.lm.ffn import GatedMLP, feed_forward
from flacompile.lm.kinds import KINDS, mixer
from flacompile.ops.validate import expect


class BlockState(NamedTuple):
    """What a block carries from call to call: its mixer's state, its channel mix's or ()."""

    mixer: Any
    ffn: Any


class Shared(NamedTuple):
    """What all blocks of one call see: mask [B, T], cu_seqlens [N + 1], and the cache."""

    mask: Tensor | None
    cu_seqlens: Tensor | None

    def run(
        self, module: nn.Module, x: Tensor, state: Any, extra: dict[str, Tensor]
    ) -> tuple[Tensor, Any]:
        """A mixer's y and next state; a single token takes its ``step``."""
        if state is None or x.shape[1] > 1 or self != (None, None):
            return module(x, state, mask=self.mask, cu_seqlens=self.cu_seqlens, **extra)
        y, state = module.step(x[:, 0], state, **{name: i[:, 0] for name, i in extra.items()})
        return y[:, None], state


def norm(config: Config) -> nn.Module:
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
        shared: Shared,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> the same after this block, and RWKV-7's values of layer 0."""
        slot = None if past_key_values is None else state_layer(past_key_values, self.layer)
        past = BlockState(None, None) if slot is None or slot.state is None else slot.state
        x = self.pre_norm(x) if hasattr(self, "pre_norm") else x
        y, v_first, state = self.mix(x, past.mixer, v_first, lower_bound, shared)
        x, ffn_state = x + y, ()
        if hasattr(self, self.names.ffn_norm):
            y = self.get_submodule(self.names.ffn_norm)(x)
            ffn = self.get_submodule(self.names.ffn)
            if isinstance(ffn, GatedMLP):
                y = ffn(y)
            else:
                y, ffn_state = shared.run(ffn, y, past.ffn, {})
            x = x + y
        if slot is not None:
            slot.put(BlockState(state, ffn_state), x.shape[1])
        return x, v_first

    def mix(
        self,
        x: Tensor,
        state: Any,
        v_first: Tensor | None,
        lower_bound: Tensor | None,
        shared: Shared,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The mixer's y, v_first, and the mixer's next state."""
        x, module = self.get_submodule(self.names.norm)(x), self.get_submodule(self.names.mixer)
        extra = {}
        if isinstance(module, RWKV7Attention):
            if self.layer == 0:
                v_first = module.values(x, state, mask=shared.mask, cu_seqlens=shared.cu_seqlens)
            else:
                assert v_first is not None
                extra = {"v_first": v_first}
        if lower_bound is not None and hasattr(module, "forget"):
            bound = {"forget.lower_bound": lower_bound}
            y, state = functional_call(module, bound, (x, state), shared._asdict())
        else:
            y, state = shared.run(module, x, state, extra)
        return y, v_first, state


class Base(PreTrainedModel):
    """What the backbone and the model with a head share."""

    config: Config
    config_class = Config
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _input_embed_layer = "embeddings"
    _is_stateful = True  # no token can be taken back: assisted decoding is refused

    def init_weights(self) -> None:
        """All modules start as they were built."""
        self.tie_weights(recompute_mapping=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called for what a checkpoint does not have."""
        if isinstance(module, Rotary | ForgetGate):
            module.to(next(module.buffers()).device)  # which computes its buffer anew
        elif isinstance(module, nn.Linear | nn.Embedding):
            super()._init_weights(module)
        else:
            raise ValueError(
                f"checkpoint: expected the weights of every {type(module).__name__}, got none of one"
            )


class Backbone(Base):
    """ids -> hidden states [B, T, D], after the last norm."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        nn.init.normal_(self.embeddings.weight, std=config.initializer_range)
        if getattr(config, "use_lower_bound", False):
            width = int(config.hidden_size * (config.expand_ratio if config.kind.mixer == "hgrn" else 1))
            self.lower_bounds = nn.Parameter(torch.zeros(config.num_hidden_layers, width))
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.add_module(config.kind.names.last, norm(config))
        self.gradient_checkpointing = False
        self.post_init()

    def bounds(self) -> list[Tensor | None]:
        """Lower bounds of the forget gates: cumsum(softmax(b)), less that of the first layer.

        The first layer has none.
        """
        if not hasattr(self, "lower_bounds"):
            return [None] * len(self.layers)
        share = at_least_fp32(self.lower_bounds).softmax(0)
        return [None, *(share.cumsum(0) - share[0])[1:]]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Runs T tokens after those of the cache.

        Args:
            input_ids: [B, T], or inputs_embeds [B, T, D].
            attention_mask: [B, S], S >= T, 1 at real tokens; its last T are those of the input.
            past_key_values: of the tokens before; made with use_cache where there is none.
            cu_seqlens: [N + 1] bounds of the sequences packed in a batch of 1.
            output_hidden_states: also the input of every block, and the last.
        """
        expect(
            (input_ids is None) != (inputs_embeds is None), "input_ids", "this or inputs_embeds",
            "both" if input_ids is not None else None,
        )  # fmt: skip
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = Cache(layers=[])
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :]
        shared, v_first, seen = Shared(mask, cu_seqlens), None, [x]
        for layer, bound in zip(self.layers, self.bounds(), strict=True):
            x, v_first = layer(x, v_first, bound, shared, past_key_values=past_key_values)
            seen.append(x)
        x = self.get_submodule(self.config.kind.names.last)(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,  # type: ignore[arg-type]
            past_key_values=past_key_values,
            hidden_states=(*seen[:-1], x) if output_hidden_states else None,  # type: ignore[arg-type]
        )


class LanguageModel(Base, GenerationMixin):
    """The backbone and a head; loss with labels."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.add_module(config.kind.names.backbone, MODELS[config.model_type][1](config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=config.initializer_range)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The backbone makes the cache: of names with mamba or rwkv, transformers thinks otherwise."""
        return False

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers', with the mask left out where no token of this call is padding."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = inputs.pop("attention_mask", None)
        ids = inputs.get("input_ids")
        time = inputs["inputs_embeds"].shape[1] if ids is None else ids.shape[1]
        if mask is not None and not mask[:, -time:].all():
            inputs["attention_mask"] = mask[:, -time:]
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """As ``Backbone.forward``, and

        Args:
            labels: [B, T], those of input_ids; -100 is left out. The loss is of the next token.
            logits_to_keep: of the last that many tokens, 0 of all, or of those at these places.
        """
        output = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
        )
        x = output.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(x[:, keep]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )


def classes(model_type: str) -> tuple[type[Config], type[Backbone], type[LanguageModel]]:
    """Config, backbone and language model of one type."""
    stem, prefix = KINDS[model_type].stem, KINDS[model_type].names.backbone
    place: dict[str, Any] = {"__module__": "flacompile.lm"}
    config: Any = type(f"{stem}Config", (Config,), {"model_type": model_type, **place})
    place |= {"config_class": config, "base_model_prefix": prefix}
    tied = {"_tied_weights_keys": {"lm_head.weight": f"{prefix}.embeddings.weight"}}
    return (
        config,
        type(f"{stem}Model", (Backbone,), place),
        type(f"{stem}ForCausalLM", (LanguageModel,), place | tied),
    )


MODELS = {model_type: classes(model_type) for model_type in KINDS}


def register() -> None:
    """Tells transformers' Auto classes of every type whose name is free.

    ``mamba``, ``mamba2`` and ``bitnet`` are transformers' own: ``from_pretrained`` below takes them.
    """
    for model_type, (config, backbone, model) in MODELS.items():
        if model_type not in CONFIG_MAPPING:
            AutoConfig.register(model_type, config)
            AutoModel.register(config, backbone)
            AutoModelForCausalLM.register(config, model)


def from_pretrained(
    path: str | Path, *, dtype: torch.dtype | None = None, device_map: Any = None
) -> LanguageModel:
    """Reads a published checkpoint, of any type, also those whose names transformers has taken.

    Args:
        path: a folder with config.json and safetensors, or the name of one on the hub.
        dtype: of the weights, None as they are saved.
        device_map: as in transformers.

    Raises:
        ValueError: not one of ``KINDS``, or weights are missing or left over.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except OSError as error:
        raise ValueError(f"path: expected a config.json in {path}, got {error}") from error
    expect(config, "path", f"a config.json in {path}", "none")
    model_type = config.get("model_type")
    expect(model_type in MODELS, "model_type", f"one of {sorted(MODELS)}", model_type)
    model, found = MODELS[model_type][2].from_pretrained(
        path,
        dtype="auto" if dtype is None else dtype,
        device_map=device_map,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    wrong = {name: sorted(map(str, keys))[:3] for name, keys in found.items() if keys}
    expect(not wrong, "path", f"the weights of {type(model).__name__}", wrong)
    return model
