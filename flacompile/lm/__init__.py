"""A language model over any mixer, in the layout of flash-linear-attention's checkpoints.

embedding, L x [norm, mixer, norm, MLP], norm, head. A table of model types says what each names its
parts and which config fields its mixer takes: ``KINDS``. Each type has classes named as the
published ones, ``GLAConfig``, ``GLAModel``, ``GLAForCausalLM``: transformers' models, which load,
save and generate. What the published library's ``fuse_*`` fields choose between is one form here.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("flacompile.lm needs transformers: pip install 'flacompile[hf]'") from error

from flacompile.lm.kinds import KINDS
from flacompile.lm.registry import MODELS, from_pretrained, register

for _classes in MODELS.values():
    globals().update({cls.__name__: cls for cls in _classes})
register()

__all__ = ["KINDS", "MODELS", "from_pretrained", "register"]
