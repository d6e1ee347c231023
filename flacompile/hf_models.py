"""Converted transformers models: their classes, their configs and their checkpoints.

The converted ``LlamaForCausalLM`` is a subclass of transformers' own, under the same name in this
module, made when it is asked for. Its config.json says ``model_type`` "flacompile", so that
transformers by itself refuses the checkpoint instead of filling a Llama with random attention; the
entry "flacompile" holds the model's real type and what stands where. Constructed from such a
config, the class has its mixers before any weight is read. So ``save_pretrained`` and
``from_pretrained``, sharded or not, on one device or several, are transformers' own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flacompile import hf_low_bit
from flacompile.hf import TransformersConvention
from flacompile.layers.entries import from_entry, to_entry
from flacompile.passes.swap_attention import SwappedAttention, swapped

MODEL_TYPE = "flacompile"


class ConvertedConfig:
    """Over a model's own config class: the type written down, and ``flacompile``, the recipe."""

    flacompile: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config of the base model's class, with the recipe; its models are registered."""
        recipe = config_dict.get(MODEL_TYPE)
        entries = recipe if isinstance(recipe, dict) else {}
        kind = str(entries.get("base"))
        if kind not in CONFIG_MAPPING or "layers" not in entries:
            raise ValueError(
                f"config.json: expected in {MODEL_TYPE!r} a known base model's type and its "
                f"layers, got {recipe!s:.60}"
            )
        base = CONFIG_MAPPING[kind]
        chosen = converted(base)
        _register_models(base)
        return super(ConvertedConfig, chosen).from_dict(  # type: ignore[misc]
            {**config_dict, "model_type": kind}, **kwargs
        )

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
        """By the Auto class, which finds out of what base the config is."""
        return AutoConfig.from_pretrained(path, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As the base's, under our model type."""
        return super().to_dict() | {"model_type": MODEL_TYPE}  # type: ignore[misc]


class ConvertedModel:
    """Over a model's own class: its mixers, built from the config's recipe."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        put_mixers(self, config.flacompile)
        hf_low_bit.hold_places(self, config.flacompile.get("low_bit", {}))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', with low-bit weights as plain tensors."""
        names = hf_low_bit.low_bit(self)
        recipe: dict[str, Any] = self.config.flacompile  # type: ignore[attr-defined]
        recipe.pop("low_bit", None)
        if names:
            recipe["low_bit"] = names
            kwargs.setdefault("state_dict", hf_low_bit.plain_state(self))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers', but weights of converted layers must all be there, and no others.

        Raises:
            ValueError: recipe and weights do not fit together.
        """
        strict = not kwargs.get("ignore_mismatched_sizes", False)
        kwargs["ignore_mismatched_sizes"] = True  # judged here, by name
        model, info = super().from_pretrained(  # type: ignore[misc]
            path, *args, output_loading_info=True, **kwargs
        )
        names = tuple(f"{name}." for name in model.config.flacompile["layers"])
        if strict:
            _check(path, info, lambda key: any(name in key for name in names))
        hf_low_bit.put_together(model, model.config.flacompile.get("low_bit", {}))
        for layer in swapped(model).values():
            layer._apply(lambda tensor: tensor)  # buffers that no file holds are computed again
        return (model, info) if output_loading_info else model

    def _validate_generation_mode(self, generation_mode: Any, *args: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assistant_model, prompt_lookup_num_tokens: expected neither, as a state cannot "
                "step back over tokens that were tried, got one; generate without them"
            )
        super()._validate_generation_mode(generation_mode, *args)  # type: ignore[misc]


@functools.cache
def converted(base: type) -> type:
    """The converted form of a config class or a model class of transformers."""
    if issubclass(base, transformers.PreTrainedConfig):
        parents, members = (ConvertedConfig, base), {}
    else:
        parents = (ConvertedModel, base)
        kept: Any = getattr(base, "_keep_in_fp32_modules_strict", None) or ()
        members = {
            "config_class": converted(base.config_class),
            "_keep_in_fp32_modules_strict": {*kept, hf_low_bit.SCALE},
        }
    members |= {"__module__": __name__, "__qualname__": base.__name__, "__doc__": base.__doc__}
    return type(base.__name__, parents, members)


def __getattr__(name: str) -> type:
    """``hf_models.LlamaForCausalLM``: where pickle looks a class up."""
    base = getattr(transformers, name, None)
    if name.startswith("_") or not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return converted(base)


def load(path: Any, config: Any) -> Any:
    """The model of the class that wrote the checkpoint, every weight accounted for."""
    name = (config.architectures or ["none"])[0]
    model, info = __getattr__(name).from_pretrained(
        path, config=config, output_loading_info=True, local_files_only=True
    )
    _check(path, info, lambda key: True)
    return model


def _register_models(base: type) -> None:
    """Every Auto class that knows models of this config class learns their converted forms."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    for auto in vars(modeling_auto).values():
        if not (isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)):
            continue
        known = auto._model_mapping
        if known is not None and base in known:
            models = known[base]
            many = isinstance(models, (tuple, list))
            models = tuple(map(converted, models)) if many else converted(models)
            auto.register(converted(base), models, exist_ok=True)  # type: ignore[arg-type]


def write_recipe(model: Any) -> dict[str, Any]:
    """What stands where in a model whose attention was swapped, as plain JSON.

    Paths count from the base model, so that one with another head on it reads the same recipe.
    """
    layers = {
        name: to_entry(layer.mixer.config)  # type: ignore[arg-type]
        | {"convention": dataclasses.asdict(layer.convention)}  # type: ignore[call-overload]
        for name, layer in swapped(model.base_model).items()
    }
    return json.loads(json.dumps({"base": model.config.model_type, "layers": layers}))


def put_mixers(model: Any, recipe: dict[str, Any]) -> None:
    """Puts the recipe's mixers where it says; their weights are yet to come.

    Raises:
        ValueError: the recipe is not one of this model.
    """
    for name, entry in recipe["layers"].items():
        try:
            config = from_entry(entry)
            convention = TransformersConvention(**entry["convention"])
            mixer = config.mixer(config).to(torch.get_default_dtype())
            layer = SwappedAttention(mixer, None, convention)
            model.base_model.set_submodule(name, layer, strict=True)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"config.json: expected at {name} a mixer as convert writes it, got "
                f"{type(error).__name__}: {error}"
            ) from error


def _check(path: Any, info: dict[str, Any], judged: Callable[[str], bool]) -> None:
    """Raises where a judged weight is missing, not wanted, or of another shape."""
    missing, unexpected = (
        sorted(filter(judged, info[kind])) for kind in ("missing_keys", "unexpected_keys")
    )
    if missing or unexpected:
        raise ValueError(
            f"path: expected in {path} the weights that config.json says, got missing "
            f"{missing[:3]} and unexpected {unexpected[:3]}"
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"path: expected {name} of shape {tuple(wanted)}, as config.json says, got "
            f"{tuple(found)} from the weights in {path}"
        )


def adopt(model: Any, attention: str | None) -> None:
    """Gives a model whose attention was swapped the class and the config that save and load it.

    Args:
        model: the whole model, in place.
        attention: its attention implementation before the conversion, for ``release``.
    """
    before, seen = model.config, {}
    config = copy.deepcopy(before, seen)  # other models may share the object
    config.flacompile = write_recipe(model)
    config.__class__ = converted(type(before))
    for module in model.modules():
        if "config" in vars(module):
            module.config = seen.get(id(module.config), module.config)
    before._attn_implementation = attention
    model.__class__ = converted(type(model))
    model._attention_before = attention
    teacher = {name for name in model.state_dict() if ".original." in name}
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *teacher}


def release(model: Any) -> None:
    """The inverse of ``adopt``, for a model whose attention was put back."""
    model.__class__ = type(model).__mro__[2]
    model.config.__class__ = type(model.config).__mro__[2]
    del model.config.flacompile
    model._keys_to_ignore_on_save = {
        name for name in model._keys_to_ignore_on_save if ".original." not in name
    }
    model.set_attn_implementation(model._attention_before)
    del model._attention_before
