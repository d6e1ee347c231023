"""A mixer's Config as JSON, as it stands in the recipe of a saved model."""

from __future__ import annotations

import dataclasses
from typing import Any

from flacompile.blocks import QKNorm, Rotary
from flacompile.layers import MIXERS, Mixer
from flacompile.ops.validate import expect
from flacompile.yarn import RopeScaling


def to_entry(config: Mixer.Config) -> dict[str, Any]:
    """{"mixer": registry name, "config": fields}; a Config among the fields becomes such a pair."""
    name = next((name for name, cls in MIXERS.items() if cls.Config is type(config)), None)
    expect(name is not None, "config", "that of a registered mixer", type(config).__qualname__)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {"mixer": name, "config": {key: _plain(value) for key, value in values.items()}}


def from_entry(entry: dict[str, Any]) -> Mixer.Config:
    """The Config that ``to_entry`` was given, also after a way through JSON."""
    fields = {name: _revived(name, value) for name, value in entry["config"].items()}
    return MIXERS[entry["mixer"]].Config(**fields)


def _plain(value: Any) -> Any:
    if isinstance(value, Mixer.Config):
        return to_entry(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _revived(name: str, value: Any) -> Any:
    if isinstance(value, dict) and "mixer" in value:
        return from_entry(value)
    if isinstance(value, dict) and name == "rotary":
        return Rotary.Config(**{k: _revived(k, v) for k, v in value.items()})
    if isinstance(value, dict) and name == "rope_scaling":
        return RopeScaling(**value)
    if isinstance(value, (list, tuple)):
        return QKNorm(*value) if name == "qk_norm" else tuple(value)
    return value
