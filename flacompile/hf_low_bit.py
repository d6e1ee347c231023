"""Low-bit weights in the checkpoints of converted transformers models, as plain tensors.

A ``BitNet`` weight is written as the floating-point one it trains. A ``Ternary`` weight is written
as its bytes, uint8 under the weight's own name, with ``weight_scale`` beside it. Which is which
stands in config.json, under ``flacompile`` and ``low_bit``: module name -> "bitnet" or "ternary".
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from flacompile.ops.validate import bytes_of_ternary

SCALE = "weight_scale"


def low_bit(model: Any) -> dict[str, str]:
    """Modules of the base model with a weight of ours that is not plain, and its kind.

    Raises:
        ValueError: a weight that no checkpoint of ours can hold.
    """
    if "torchao" not in sys.modules:  # then no weight is one of its
        return {}
    from torchao.utils import TorchAOBaseTensor

    from flacompile.quantize import BitNetTensor, TernaryTensor

    weights = {n: (m, m._parameters.get("weight")) for n, m in model.named_modules()}
    found = {n: (m, w) for n, (m, w) in weights.items() if isinstance(w, TorchAOBaseTensor)}
    inside, names = {m: n for n, m in model.base_model.named_modules()}, {}
    for name, (module, weight) in found.items():
        kind = {BitNetTensor: "bitnet", TernaryTensor: "ternary"}.get(type(weight))
        if kind is None or module not in inside:
            raise ValueError(
                f"{name}.weight: expected a plain weight, or one by BitNet or Ternary below the "
                f"head, got {type(weight).__name__}; save its state_dict with torch.save"
            )
        names[inside[module]] = kind
    return names


def plain_state(model: Any) -> dict[str, Tensor]:
    """The state_dict with every weight of ours as plain tensors."""
    from flacompile.quantize import BitNetTensor, TernaryTensor

    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, TernaryTensor):
            state[name] = value.packed
            state[name.removesuffix("weight") + SCALE] = value.scale
        else:
            state[name] = value._data if isinstance(value, BitNetTensor) else value
    return state


def hold_places(model: Any, names: dict[str, str]) -> None:
    """Gives a model that is yet to be filled the parameters that ``plain_state`` wrote."""
    for name, kind in names.items():
        module: Any = model.base_model.get_submodule(name)
        if kind == "ternary":
            size = (module.out_features, bytes_of_ternary(module.in_features))
            packed, scale = torch.empty(size, dtype=torch.uint8), torch.empty((), dtype=torch.float)
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))


def put_together(model: Any, names: dict[str, str]) -> None:
    """Makes weights of ours of what was read into those places."""
    if not names:
        return
    from flacompile.quantize import BitNet, TernaryTensor, quantize_, use_low_bit

    for name, kind in names.items():
        module: Any = model.base_model.get_submodule(name)
        if kind == "ternary":
            scale = getattr(module, SCALE).data
            delattr(module, SCALE)
            weight = TernaryTensor(module.weight.data, scale, module.in_features, model.dtype)
            use_low_bit(module, weight, trained=False)
    modules = {model.base_model.get_submodule(n) for n, kind in names.items() if kind == "bitnet"}
    if modules:
        quantize_(model, BitNet(), lambda module, name: module in modules)
