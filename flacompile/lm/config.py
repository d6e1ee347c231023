"""The config of every published model type; a subclass per type knows its fields."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from flacompile.lm.kinds import KINDS, Kind
from flacompile.ops.validate import expect

ATTENTION = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}


class Config(PreTrainedConfig):
    """Fields as in a published config.json; those that it lacks have the published defaults.

    ``attn`` makes a hybrid: {"layers": [1, 3], "num_heads": 8}, or a list of such, with
    num_kv_heads, qkv_bias, window_size and rope_theta where they are not the default.
    """

    keys_to_ignore_at_inference = ("past_key_values",)
    if TYPE_CHECKING:  # an annotation would be a field
        attn: dict[str, Any] | list[dict[str, Any]] | None
        attnres_block_size: int | None
        num_hidden_layers: int

    # transformers hands over every key that is no field of its own.
    def __post_init__(self, **kwargs: Any) -> None:
        import_module("flacompile.lm.registry")  # tells the Auto classes of the models
        for name, value in self.kind.defaults.items():
            setattr(self, name, kwargs.pop(name, deepcopy(value)))
        super().__post_init__(**kwargs)
        block_size = self.attnres_block_size
        expect(block_size is None, "attnres_block_size", "None", block_size)
        layers = [layer for spec in self._specs for layer in spec["layers"]]
        wanted = f"layers 0 to {self.num_hidden_layers - 1}, each once"
        fits = set(layers) <= set(range(self.num_hidden_layers)) and len(set(layers)) == len(layers)
        expect(fits, "attn", wanted, layers)

    @property
    def kind(self) -> Kind:
        """What the models of this type have in common."""
        return KINDS[self.model_type]

    @property
    def _specs(self) -> list[dict[str, Any]]:
        specs = self.attn if isinstance(self.attn, list | tuple) else [self.attn or {"layers": []}]
        for spec in specs:
            complete = "layers" in spec and ("num_heads" in spec or not spec["layers"])
            expect(complete, "attn", "layers and num_heads", spec)
        return list(specs)

    def attention(self, layer: int) -> dict[str, Any] | None:
        """What ``attn`` says of this layer: fields of ``Attention.Config``."""
        for spec in self._specs:
            if layer in spec["layers"]:
                given = {name: spec.get(name, value) for name, value in ATTENTION.items()}
                return {"num_heads": spec["num_heads"], **given}
        return None


def _config_class(model_type: str) -> type[Config]:
    name = f"{KINDS[model_type].stem}Config"
    return type(name, (Config,), {"model_type": model_type, "__module__": "flacompile.lm"})


CONFIGS = {model_type: _config_class(model_type) for model_type in KINDS}


def register() -> None:
    """Tells AutoConfig of every type whose name is free; three are transformers' own.

    The model classes follow with the first config: the Auto classes read their table of configs
    before there are any models to inherit from.
    """
    for model_type, config in CONFIGS.items():
        if model_type not in CONFIG_MAPPING:
            AutoConfig.register(model_type, config)
