"""A language model over any mixer, in the layout of flash-linear-attention's checkpoints.

embedding, L x [norm, mixer, norm, MLP], norm, head. A table of model types says what each names its
parts and which config fields its mixer takes: ``KINDS``. Each type has classes named as the
published ones, ``GLAConfig``, ``GLAModel``, ``GLAForCausalLM``: transformers' models, which load,
save and generate. What the published library's ``fuse_*`` fields choose between is one form here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("flacompile.lm needs transformers: pip install 'flacompile[hf]'") from error


def __getattr__(name: str) -> Any:
    """The classes, made at first use: the Auto classes ask for the configs while they load."""
    registry = import_module("flacompile.lm.registry")
    if name in ("from_pretrained", "KINDS", "MODELS"):
        return getattr(registry, name)
    for cls in (cls for classes in registry.MODELS.values() for cls in classes):
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
