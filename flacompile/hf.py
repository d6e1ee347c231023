"""All that knows transformers: how its models call attention, its cache, loading."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flacompile.passes.capture import text_config
from flacompile.passes.sites import AttentionSite
from flacompile.passes.swap_attention import (
    Call,
    PlainConvention,
    swapped,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_transformers(model: nn.Module) -> bool:
    """Told by its config, so that transformers is not imported to ask."""
    return hasattr(text_config(model), "use_cache")


def attention_of(model: nn.Module) -> str | None:
    """The attention implementation that a transformers model is set to."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def adopt(model: nn.Module, attention: str | None) -> None:
    """Makes a transformers model whose attention was swapped save and load as what it is now."""
    if is_transformers(model):
        from flacompile import hf_models

        hf_models.adopt(model, attention)


def note_mixers(model: nn.Module) -> None:
    """Makes the config of a model that was adopted say what stands in it now."""
    if is_transformers(model):
        from flacompile import hf_models

        model.config.flacompile = hf_models.write_recipe(model)  # type: ignore[union-attr]


def release(model: nn.Module) -> None:
    """The inverse of ``adopt``."""
    if is_transformers(model):
        from flacompile import hf_models

        hf_models.release(model)


@dataclasses.dataclass(frozen=True)
class TransformersConvention(PlainConvention):
    """Reads padding out of the attention mask and the state out of the cache.

    Attributes:
        layer: the attention's index in the cache.
        padded: False where the caller knows that no token is padding and the mask can be ignored.
    """

    layer: int = 0
    padded: bool = True

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """x, the state of this layer's place in the cache, and which tokens are real."""
        x = super().read(args, kwargs).x
        # Models disagree on the argument's name: past_key_values, layer_past.
        caches = (v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length"))
        cache = next(caches, None)
        cache = getattr(cache, "self_attention_cache", cache)  # of an encoder and a decoder
        slot = None if cache is None else state_layer(cache, self.layer)
        mask = kwargs.get("attention_mask") if self.padded else None
        if mask is not None:
            mask = real_tokens(mask, x, 0 if slot is None else slot.seen)
        return Call(x, None if slot is None else slot.state, mask, slot)

    def write(self, call: Call, y: Tensor, state: Any) -> Any:
        """The state goes into the cache, y to where the attention's caller looks."""
        if call.cache is not None:
            call.cache.put(state, y.shape[1])
        return super().write(call, y, state)


def convention_of(model: nn.Module, site: AttentionSite) -> PlainConvention:
    """How calls reach this site: transformers' way or plainly."""
    plain = PlainConvention.of(site)
    if not is_transformers(model):
        return plain
    fields: dict[str, Any] = dataclasses.asdict(plain)
    module = model.get_submodule(site.path)
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    if index is None:
        raise ValueError(f"model: expected a layer_idx in each attention, got none in {site.path}")
    return TransformersConvention(**fields, layer=index)


def real_tokens(mask: Tensor, x: Tensor, seen: int | Tensor) -> Tensor:
    """Which tokens of x [B, T, D] are not padding, [B, T].

    In a causal mask [B or 1, 1, T, S], a sliding window included, exactly the real tokens see
    themselves. Token i stands at key ``seen + i``, or where only the last S keys are left, at
    ``S - T + i``.
    """
    if mask.ndim == 2:
        return mask[:, -x.shape[1] :].bool()
    num_queries, num_keys = mask.shape[2:]
    time = torch.arange(num_queries, device=mask.device)
    key = torch.minimum(time + seen, time + (num_keys - num_queries))
    own = mask[:, 0].gather(2, key[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    own = own if own.dtype == torch.bool else own == 0
    return own.expand(x.shape[0], -1)


def state_layer(cache: Any, index: int) -> Any:
    """The cache's slot for this layer, which becomes ours at its first use."""
    from flacompile.hf_cache import StateLayer

    while len(cache.layers) <= index:
        cache.layers.append(StateLayer())
    layer = cache.layers[index]
    if not isinstance(layer, StateLayer):
        if layer.get_seq_length():
            raise ValueError(
                f"past_key_values: expected an empty cache or one of this model, got keys of "
                f"{layer.get_seq_length()} tokens in layer {index}"
            )
        static = layer.is_compileable and not layer.is_sliding  # those count in Python
        layer = StateLayer(length=layer.get_max_length() if static else None)
        cache.layers[index] = layer
    return layer


def run_with_states(
    model: nn.Module, ids: Tensor, position: Tensor, states: list[Any]
) -> tuple[Tensor, list[Any]]:
    """Runs a causal language model from explicit states, one a layer, for export.

    Args:
        ids: [B, T], none of it padding.
        position: [B, T], of each token.
        states: of the mixers, in the order of the cache.

    Returns:
        logits of the last token [B, vocabulary] and the states after it.
    """
    from transformers.cache_utils import Cache

    from flacompile.hf_cache import StateLayer

    slots: list[Any] = [StateLayer(state) for state in states]
    options: dict[str, Any] = {"past_key_values": Cache(layers=slots), "use_cache": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        # Mixers read no mask; one of four dimensions is taken as it is, and none is computed.
        options |= {"position_ids": position, "attention_mask": ids.new_ones(1, 1, 1, 1).bool()}
    output = model(input_ids=ids, logits_to_keep=1, **options)
    return output.logits[:, -1], [slot.state for slot in slots]


@contextmanager
def unpadded(model: nn.Module) -> Iterator[None]:
    """Inside the block no token is padding: masks, quadratic in T, are not looked at."""
    layers = swapped(model).values()
    before = [layer.convention for layer in layers]
    for layer in layers:
        if isinstance(layer.convention, TransformersConvention):
            layer.convention = dataclasses.replace(layer.convention, padded=False)
    try:
        yield
    finally:
        for layer, convention in zip(layers, before, strict=True):
            layer.convention = convention


def load(path: str | Path) -> PreTrainedModel:
    """Reads a converted model that ``model.save_pretrained(path)`` wrote, without its teacher.

    In the dtype and with the head it was saved with, and ready to evaluate. After ``import
    flacompile`` transformers' own ``AutoModelForCausalLM.from_pretrained`` reads it too; this verb
    insists that every weight is there.

    Raises:
        ValueError: a file of the folder is missing or broken, or they do not fit together.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    from flacompile import hf_models

    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"path: expected a folder with a config.json, got {path}")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if not isinstance(config, hf_models.ConvertedConfig):
            raise ValueError(
                f"path: expected a converted model in {path}, got {config.model_type}; "
                "transformers' AutoModelForCausalLM reads others"
            )
        return hf_models.load(path, config)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: expected a whole model in {path}, got {error}") from error
