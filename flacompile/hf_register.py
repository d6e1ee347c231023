"""Makes AutoConfig know our checkpoints as soon as both packages are imported.

Importing flacompile does not import transformers, which takes seconds, and either may come first.
So a finder waits for the module that holds the Auto classes' table, lets the others load it, and
then adds our entries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

TABLE = "transformers.models.auto.configuration_auto"


class AfterImport(MetaPathFinder):
    """Calls ``then`` once the module ``name`` was imported, for the first time, by anybody."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Part of Python's import system; finds the module where anybody would."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec: Any = find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_then(module: Any) -> None:
            """The module's own code, and then what waited for it."""
            execute(module)
            self.then()

        spec.loader.exec_module = execute_then
        return spec


def after_import(name: str, then: Callable[[], None]) -> None:
    """Calls ``then`` now if the module is there, else right after its import."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, AfterImport(name, then))


def _register() -> None:
    from transformers import AutoConfig

    from flacompile.hf_models import MODEL_TYPE, ConvertedConfig
    from flacompile.lm.config import register

    AutoConfig.register(MODEL_TYPE, ConvertedConfig, exist_ok=True)  # type: ignore[arg-type]
    register()


def register_models() -> None:
    """Called when flacompile is imported."""
    after_import(TABLE, _register)
