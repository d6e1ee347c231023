"""Linear attention as a citizen of torch.compile: convert, compile, distil, export."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

# The verbs share their names with the modules that hold them, and stand over those here.
from flacompile.convert import convert, finalize, keep_layers, report, unconvert
from flacompile.distill import distill
from flacompile.evaluate import evaluate
from flacompile.export import export
from flacompile.export.onnx import export_onnx
from flacompile.hf import load
from flacompile.hf_register import register_models

if TYPE_CHECKING:
    from flacompile.quantize import BitNet, Ternary, quantize_

register_models()

__all__ = [
    "BitNet",
    "Ternary",
    "convert",
    "distill",
    "evaluate",
    "export",
    "export_onnx",
    "finalize",
    "keep_layers",
    "load",
    "quantize_",
    "report",
    "unconvert",
]


def __getattr__(name: str) -> Any:
    """What needs torchao, which takes a second to import."""
    if name in ("BitNet", "Ternary", "quantize_"):
        from flacompile import quantize

        return getattr(quantize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
