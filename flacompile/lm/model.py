"""embedding, L x [norm, mixer, norm, MLP], norm, head, as models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from flacompile.blocks import Rotary, at_least_fp32
from flacompile.layers.hgrn import ForgetGate
from flacompile.lm.block import Block, Places, norm
from flacompile.lm.config import Config
from flacompile.ops.validate import expect


class Base(PreTrainedModel):
    """What the backbone and the model with a head share."""

    config: Config
    config_class = Config
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
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
            name = type(module).__name__
            raise ValueError(f"checkpoint: expected the weights of every {name}, got none of one")


class Backbone(Base):
    """ids -> hidden states [B, T, D], after the last norm."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        nn.init.normal_(self.embeddings.weight, std=config.initializer_range)
        if getattr(config, "use_lower_bound", False):
            width = config.kind.gate_width(config)
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
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = Cache(layers=[])
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :]
        places, v_first = Places(mask, cu_seqlens), None
        seen: list[Any] = [x]
        for layer, bound in zip(self.layers, self.bounds(), strict=True):
            x, v_first = layer(x, v_first, bound, places, past_key_values=past_key_values)
            seen.append(x)
        x = self.get_submodule(self.config.kind.names.last)(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,  # type: ignore[arg-type]
            past_key_values=past_key_values,
            hidden_states=(*seen[:-1], x) if output_hidden_states else None,
        )


class LanguageModel(Base, GenerationMixin):
    """The backbone and a head; loss with labels."""

    backbone_class: type[Backbone]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.add_module(config.kind.names.backbone, self.backbone_class(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=config.initializer_range)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The backbone makes it: transformers would choose by what stands in a class's name."""
        return False

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers', with the mask left out where no token of this call is padding."""
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(*args, **kwargs)
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
