"""Low-bit projections through torchao: ``flacompile.quantize_``.

``BitNet`` trains: torchao's ternary weights, rounded in every forward, under int8 activations, with
the gradient that passes the rounding (BitNet b1.58, Ma et al. 2024, arXiv 2402.17764). ``Ternary``
ships: the same weights at two bits each, in ``flacompile.ops.ternary_linear``, with the integers of
the training forward. Any other config is torchao's own and does what it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.core.config import AOBaseConfig
from torchao.prototype.quantized_training.bitnet import (
    BitNetTrainingLinearWeight,
    _BitNetTrainingLinear,
)
from torchao.prototype.safetensors import safetensors_utils
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from flacompile.layers.base import Mixer
from flacompile.layers.bitattn import BitLinear, scale_to_ternary_
from flacompile.ops.ternary import pack_ternary, round_weight, ternary_linear, unpack_ternary
from flacompile.ops.validate import expect
from flacompile.passes.swap_attention import SwappedAttention

aten = torch.ops.aten
Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class BitNet(AOBaseConfig):
    """Training with ternary weights: torchao's BitNet, of any shape of input and under autocast.

    Weights stay in their dtype, so that optimizers and ``state_dict`` see what they saw before.
    """


@dataclass(frozen=True)
class Ternary(AOBaseConfig):
    """Inference with ternary weights of two bits and one scale a matrix.

    Of a layer that ``BitNet`` trained the values are those of its forward; of any other, its
    weights are rounded so now.
    """


def quantize_(model: nn.Module, config: AOBaseConfig, filter_fn: Filter | None = None) -> nn.Module:
    """Replaces the weights of chosen linear layers by low-bit ones, in place.

    Args:
        model: any module; a converted one before or after distillation. The teachers that
            ``convert`` keeps aside are never touched.
        config: ``BitNet()`` to train, ``Ternary()`` to ship, or any config of torchao.
        filter_fn: (module, its name) -> whether to quantise it. Default ``projections``: every
            linear layer with a weight of its own but the output head.

    Returns:
        The same model.

    Raises:
        ValueError: nothing was chosen, or a chosen module is no linear layer with a plain, loaded
            floating-point weight of its own, or one that the config does not take; then nothing
            has changed.
    """
    expect(isinstance(config, AOBaseConfig), "config", "a config of torchao's kind", config)
    chosen = dict(_chosen(model, filter_fn or projections(model)))
    expect(bool(chosen), "filter_fn", "to choose at least one linear layer", "none")
    for name, module in chosen.items():
        _check(name, module, config, model)
    _apply(model, config, chosen)
    return model


def _apply(model: nn.Module, config: AOBaseConfig, chosen: dict[str, nn.Module]) -> None:
    """To all of them or to none; torchao finds out at each layer what it does not take."""
    before: dict[nn.Module, Any] = {module: module.weight for module in chosen.values()}
    begun: list[str] = []

    def is_chosen(module: nn.Module, name: str) -> bool:
        if module in before:
            begun.append(name)
        return module in before

    try:
        torchao_quantize_(model, config, is_chosen)
    except (RuntimeError, ValueError, AssertionError) as error:
        for module, weight in before.items():
            module.weight = weight
        name, shape = begun[-1], tuple(before[chosen[begun[-1]]].shape)
        raise ValueError(
            f"{name}.weight: expected a shape that {type(config).__name__} takes, got {shape}: "
            f"{error}; leave it out by filter_fn"
        ) from error


def projections(model: nn.Module) -> Filter:
    """A filter: every linear layer with a weight of its own, except the output head.

    Also left out are the few whose weights a mixer does not only multiply with.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    others, shared = {head, *_read_directly(model)}, _shared_weights(model)

    def is_projection(module: nn.Module, name: str) -> bool:
        """Whether torchao's ``quantize_`` shall take this module."""
        return isinstance(module, nn.Linear) and module not in others and name not in shared

    return is_projection


@torch.no_grad()
def quantize_mixers_(model: nn.Module, config: AOBaseConfig) -> nn.Module:
    """``quantize_`` for the mixers that ``convert`` put in, and nothing else.

    For ``BitNet`` and ``Ternary`` each matrix is scaled first, so that its ternary values are as
    near to it as any scale brings them.
    """
    chosen = mixer_projections(model)
    if isinstance(config, BitNet | Ternary):
        for _, module in _chosen(model, chosen):
            scale_to_ternary_(module.weight)  # type: ignore[arg-type]
    return quantize_(model, config, chosen)


def mixer_projections(model: nn.Module) -> Filter:
    """A filter: the ``projections`` of the mixers that ``convert`` put in, and no others."""
    mixers = [m.mixer for m in model.modules() if isinstance(m, SwappedAttention)]
    inside = {module for mixer in mixers for module in mixer.modules()}
    of_model = projections(model)
    return lambda module, name: module in inside and of_model(module, name)


def _chosen(model: nn.Module, filter_fn: Filter) -> Iterator[tuple[str, nn.Module]]:
    """What the filter wants, without what belongs to a teacher."""
    layers = [m for m in model.modules() if isinstance(m, SwappedAttention)]
    teachers = {x for m in layers if m.original is not None for x in m.original.modules()}
    for name, module in model.named_modules():
        if module not in teachers and filter_fn(module, name):
            yield name, module


def _read_directly(model: nn.Module) -> set[nn.Module]:
    """Linear layers whose weights mixers read for what ``F.linear`` does not see."""
    mixers = [m for m in model.modules() if isinstance(m, Mixer)]
    return {mixer.get_submodule(name) for mixer in mixers for name in mixer.weights_read}


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Module name -> the first other module that has the same weight."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(name)
    groups = [names for names in owners.values() if len(names) > 1]
    return {name: names[name == names[0]] for names in groups for name in names}


def _check(name: str, module: nn.Module, config: AOBaseConfig, model: nn.Module) -> None:
    """Raises for a module that cannot be quantised, by name."""
    kind = type(module).__name__
    expect(isinstance(module, nn.Linear), name, "a linear layer, as filter_fn chose it", kind)
    weight: Tensor = module.weight  # type: ignore[assignment]
    of_layer = f"{name}.weight".removeprefix(".")
    trained = isinstance(config, Ternary) and isinstance(weight, BitNetTrainingLinearWeight)
    if type(weight) is not nn.Parameter and not trained:
        raise ValueError(
            f"{of_layer}: expected a plain parameter, got {type(weight).__name__}, which is "
            "quantised or sharded already; leave it out by filter_fn"
        )
    expect(weight.is_floating_point(), of_layer, "a floating dtype", weight.dtype)
    expect(not weight.is_meta, of_layer, "a loaded weight", "one on meta")
    takes = isinstance(config, BitNet | Ternary) or not isinstance(module, BitLinear)
    kind = type(config).__name__
    expect(takes, of_layer, "BitNet or Ternary, as its layer rounds to three values", kind)
    read = module in _read_directly(model)
    expect(not read, of_layer, "a weight that is only multiplied with", "one that its mixer reads")
    other = _shared_weights(model).get(name)
    expect(other is None, of_layer, "a weight of its own", f"that of {other} too")


def _describe(tensor: Tensor, *inner: Tensor) -> str:
    """What a compiled graph depends on, for its cache."""
    parts = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in inner]
    return repr((type(tensor).__name__, tuple(tensor.shape), tensor.requires_grad, parts))


class BitNetTensor(BitNetTrainingLinearWeight):
    """torchao's training weight; inputs and gradients may have any strides and dimensions."""

    def _stable_hash_for_caching(self) -> str:
        return _describe(self, self._data)


@BitNetTensor.implements_torch_function(F.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _train(*args, **kwargs)


def _train(input: Tensor, weight: BitNetTensor, bias: Tensor | None = None) -> Tensor:
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)  # type: ignore[assignment]
        bias = None if bias is None else bias.to(dtype)
    rows = input.reshape(-1, input.shape[-1])
    y = _BitNetTrainingLinear.apply(rows, weight, bias)
    return y.reshape(*input.shape[:-1], weight.shape[0])


class TernaryTensor(TorchAOBaseTensor):
    """A weight [N, K] of -1, 0 and 1 times one scale, four to a byte.

    Args:
        packed: [N, P / 4] uint8, as ``flacompile.ops.ternary`` lays it out.
        scale: fp32, of no dimensions.
        in_features: K.
        dtype: what the weight passes for; the scale stays fp32.
    """

    tensor_data_names = ["packed", "scale"]  # noqa: RUF012
    tensor_attribute_names = ["in_features", "dtype"]  # noqa: RUF012

    def __new__(
        cls, packed: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype
    ) -> TernaryTensor:
        shape = (packed.shape[0], in_features)
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=packed.device, requires_grad=False
        )

    def __init__(self, packed: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.scale, self.in_features = packed, scale, in_features

    def __repr__(self) -> str:
        return f"TernaryTensor(shape={tuple(self.shape)}, dtype={self.dtype}, scale={self.scale})"

    def _stable_hash_for_caching(self) -> str:
        return _describe(self, self.packed, self.scale)

    @classmethod
    def from_weight(cls, weight: Tensor) -> TernaryTensor:
        """Rounds a weight [N, K] as the training forward does."""
        codes, scale = round_weight(weight)
        return cls(pack_ternary(codes), scale, weight.shape[1], weight.dtype)

    def dequantize(self) -> Tensor:
        """The values as a plain tensor [N, K]."""
        codes = unpack_ternary(self.packed)[:, : self.in_features]
        return (codes * self.scale).to(self.dtype)


@TernaryTensor.implements(aten.linear.default)
@TernaryTensor.implements_torch_function(F.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _multiply(*args, **kwargs)


def _multiply(input: Tensor, weight: TernaryTensor, bias: Tensor | None = None) -> Tensor:
    expect(input.shape[-1] == weight.in_features, "input", f"shape [..., {weight.in_features}]",
           tuple(input.shape))  # fmt: skip
    return ternary_linear(input, weight.packed, weight.scale, bias)


@TernaryTensor.implements(aten._to_copy.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> TernaryTensor:
    """To another device or dtype: only the dtype that it passes for changes."""
    weight: TernaryTensor = args[0]
    device = kwargs.get("device") or weight.device
    packed, scale = weight.packed.to(device), weight.scale.to(device)
    dtype = kwargs.get("dtype") or weight.dtype
    new = TernaryTensor(packed, scale, weight.in_features, dtype)
    return return_and_correct_aliasing(func, args, kwargs, new)  # type: ignore[return-value]


torch.serialization.add_safe_globals([TernaryTensor, BitNetTensor])
safetensors_utils.ALLOWED_CLASSES["TernaryTensor"] = TernaryTensor
safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append("TernaryTensor")


@register_quantize_module_handler(BitNet)
def _to_bitnet(module: nn.Linear, config: BitNet) -> nn.Linear:
    weight: Any = BitNetTensor(module.weight.detach())  # type: ignore[misc]
    return use_low_bit(module, weight, trained=module.weight.requires_grad)


@register_quantize_module_handler(Ternary)
@torch.no_grad()
def _to_ternary(module: nn.Linear, config: Ternary) -> nn.Linear:
    weight = module.weight.detach()
    plain = weight._data if isinstance(weight, BitNetTrainingLinearWeight) else weight
    return use_low_bit(module, TernaryTensor.from_weight(plain), trained=False)


def use_low_bit(module: nn.Linear, weight: Tensor, *, trained: bool) -> nn.Linear:
    """Puts the weight in; a layer that rounds by itself leaves that to it."""
    module.weight = nn.Parameter(weight, requires_grad=trained)
    if isinstance(module, BitLinear):
        module.rounds = False
    return module
