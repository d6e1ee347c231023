"""Recipes as YAML: read with every mistake named, written so that a run can be repeated."""

from __future__ import annotations

import types
import typing
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flacompile.distill.recipe import PRESETS, Recipe
from flacompile.files import write_atomically


def read_recipe(source: str | Path) -> Recipe:
    """A recipe by the name of a preset, or from a YAML file.

    The file has the fields of ``Recipe``, and of ``Stage`` and ``DataOptions`` under align, logits,
    long and data; ``preset``, a name, says what fields that are not there are.

    Raises:
        ValueError: no such preset or file, no YAML, a key or value that a recipe does not have.
    """
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    import yaml

    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"recipe: expected a YAML file or one of {', '.join(PRESETS)}, got {source}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: expected YAML in {path}, got {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"recipe: expected keys and values in {path}, got {type(values).__name__}")
    preset = values.pop("preset", "small")
    if preset not in PRESETS:
        raise ValueError(f"recipe.preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    return _changed(PRESETS[preset], values, "recipe")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe, every field of it, as YAML."""
    import yaml

    text = yaml.safe_dump(asdict(recipe), sort_keys=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _changed(base: Any, values: dict[Any, Any], where: str) -> Any:
    """``base``, a dataclass, with these values in place of its own."""
    types_of = typing.get_type_hints(type(base))
    unknown = [str(key) for key in values if key not in types_of]
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(types_of)}, got {', '.join(unknown)}")
    changes = {}
    for name, value in values.items():
        place = f"{where}.{name}"
        if is_dataclass(types_of[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{place}: expected keys and values, got {value!r}")
            changes[name] = _changed(getattr(base, name), value, place)
        else:
            changes[name] = _value(types_of[name], value, place)
    try:
        return replace(base, **changes)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    """A plain value of the type of a field; YAML takes 1e-3 for a text."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = typing.get_args(kind) if union else (kind,)
    allowed = [x for k in kinds if typing.get_origin(k) is Literal for x in typing.get_args(k)]
    if (type(value) in kinds) or value in allowed:
        return value
    if float in kinds and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    names = [repr(x) for x in allowed]
    names += [k.__name__ for k in kinds if typing.get_origin(k) is not Literal]
    raise ValueError(f"{where}: expected {' or '.join(names)}, got {value!r}")
