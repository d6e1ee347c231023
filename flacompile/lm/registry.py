"""The classes of every published model type, told to transformers; reading a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from flacompile.lm.config import CONFIGS, Config
from flacompile.lm.kinds import KINDS
from flacompile.lm.model import Backbone, LanguageModel
from flacompile.ops.validate import expect


def classes(model_type: str) -> tuple[type[Config], type[Backbone], type[LanguageModel]]:
    """Config, backbone and language model of one type."""
    stem, prefix = KINDS[model_type].stem, KINDS[model_type].names.backbone
    config: Any = CONFIGS[model_type]
    place = {
        "__module__": "flacompile.lm", "config_class": config, "base_model_prefix": prefix,
    }  # fmt: skip
    backbone: Any = type(f"{stem}Model", (Backbone,), place)
    tied = {"lm_head.weight": f"{prefix}.embeddings.weight"}
    own = {"backbone_class": backbone, "_tied_weights_keys": tied}
    return config, backbone, type(f"{stem}ForCausalLM", (LanguageModel,), place | own)


MODELS = {model_type: classes(model_type) for model_type in KINDS}


for _model_type, (_config, _backbone, _model) in MODELS.items():
    if CONFIG_MAPPING[_model_type] is _config:
        AutoModel.register(_config, _backbone)
        AutoModelForCausalLM.register(_config, _model)


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
    expect(bool(config), "path", f"a config.json in {path}", "none")
    model_type: Any = config.get("model_type")
    expect(model_type in MODELS, "model_type", f"one of {sorted(MODELS)}", model_type)
    loaded: Any = MODELS[model_type][2].from_pretrained(
        path,
        dtype="auto" if dtype is None else dtype,
        device_map=device_map,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    model, found = loaded
    wrong = {name: sorted(map(str, keys))[:3] for name, keys in found.items() if keys}
    expect(not wrong, "path", f"the weights of {type(model).__name__}", wrong)
    return model
