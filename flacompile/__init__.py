"""Linear attention as a citizen of torch.compile: convert, compile, distil, export."""

__version__ = "0.1.0"

# The verbs share their names with the modules that hold them, and stand over those here.
from flacompile.convert import convert, finalize, report, unconvert
from flacompile.distill import distill
from flacompile.evaluate import evaluate
from flacompile.export import export
from flacompile.hf import load
from flacompile.hf_register import register_models

register_models()

__all__ = [
    "convert",
    "distill",
    "evaluate",
    "export",
    "finalize",
    "load",
    "report",
    "unconvert",
]
