"""Linear attention as a citizen of torch.compile: convert, compile, distil, export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flacompile.convert import convert, finalize, report
    from flacompile.distill import distill
    from flacompile.export import export
    from flacompile.hf import load, save

__version__ = "0.1.0"
__all__ = ["convert", "distill", "export", "finalize", "load", "report", "save"]

_HOME = {
    "convert": "convert", "finalize": "convert", "report": "convert",
    "distill": "distill", "export": "export", "load": "hf", "save": "hf",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a verb at its first use: ``import flacompile`` alone loads nothing else."""
    if name not in _HOME:
        raise AttributeError(f"module 'flacompile' has no attribute {name!r}")
    from importlib import import_module

    verb = getattr(import_module(f"flacompile.{_HOME[name]}"), name)
    globals()[name] = verb  # over the submodule of the same name
    return verb
