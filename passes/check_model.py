"""Models that cannot be looked at, refused by name before any work."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# by name, as importing them takes long
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_model(model: nn.Module) -> None:
    """Raises ValueError for weights that are not plain numbers and for a rotary that changes."""
    for path, module in model.named_modules():
        if type(module).__name__ in WRAPPERS:
            raise ValueError(
                f"model: expected one that is not wrapped, got {type(module).__name__} at "
                f"{path or 'its root'}; convert before wrapping"
            )
    if getattr(model, "hf_quantizer", None) is not None:
        config: Any = model.config
        raise ValueError(
            f"model: expected one that is not quantised, got {config.quantization_config}; "
            "convert before quantising"
        )
    for name, parameter in model.named_parameters():
        _check_weight(name, parameter)
    for path, module in model.named_modules():
        for name in ("weight", "qweight"):
            weight = getattr(module, name, None)
            if callable(weight):  # packed, as by torch.ao.quantization
                _refuse(f"{path}.{name}", type(module).__name__)
            elif isinstance(weight, Tensor):
                _check_weight(f"{path}.{name}", weight)
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_type: expected one with the same frequencies at all lengths, got "
                f"{module.rope_type} in {path}; load the model with another, such as 'yarn'"
            )


def _check_weight(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(
            f"model: expected weights in memory, got {name} on the meta device; load them first"
        )
    if is_traceable_wrapper_subclass(weight):
        _refuse(name, type(weight).__name__)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        _refuse(name, str(weight.dtype))


def _refuse(name: str, kind: str) -> None:
    raise ValueError(
        f"model: expected plain floating-point weights, got {kind} in {name}; "
        "convert before quantising or sharding"
    )
