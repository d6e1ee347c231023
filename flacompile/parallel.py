"""A model over several devices: mixers split by heads, through PyTorch's own DTensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.experimental import implicit_replication, register_sharding
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map

from flacompile.layers.base import RecurrentMixer
from flacompile.layers.qkv import QKVMixer
from flacompile.ops.context import context_parallel
from flacompile.ops.validate import expect
from flacompile.passes.swap_attention import swapped

__all__ = ["MixerParallel", "context_parallel", "tensor_parallel_plan"]


@register_sharding(torch.ops.aten.log_sigmoid_backward.default)
def _log_sigmoid_backward(dy: Any, x: Any, buffer: Any) -> list[Any]:
    """Elementwise; the buffer of a GPU is empty. PyTorch has the rule of the forward alone."""
    rules: list[Any] = [([Replicate()], [Replicate()] * 3)]
    for dim in range(x.ndim):
        split = Shard(dim)
        rules.append(([split], [split, split, split if buffer.shape == x.shape else Replicate()]))
    return rules


class MixerParallel(ParallelStyle):
    """Splits a mixer by heads, or by channels: projections by rows, the output's by columns.

    What the mixer works on inside are DTensors, which have the sizes of the whole: no view counts
    the heads of a rank, and every op of ``flacompile.ops`` runs on a rank's own. A projection whose
    rows are not in the order of heads, such as Mamba's of everything at once, is whole on each rank
    and so is what is small: gates of low rank, norms, rates. x and y are whole.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, RecurrentMixer):
            raise ValueError(f"module: expected a recurrent mixer, got {type(module).__name__}")
        parallelize_module(module, device_mesh, _styles(module, device_mesh.size()))
        distribute_module(module, device_mesh)
        for name in ("forward", "step"):
            setattr(module, name, _on_dtensors(getattr(module, name), device_mesh))
        return module


def _styles(mixer: RecurrentMixer, ranks: int) -> dict[str, ParallelStyle]:
    """How each projection is split; those that are not named stay whole."""
    heads, split = mixer.output_heads, mixer.layers_by_head
    expect(heads % ranks == 0, "device_mesh", f"a divisor of the {heads} heads", ranks)
    groups = getattr(mixer.config, "n_groups", 1)
    fits = groups == 1 or groups % ranks == 0
    expect(fits, "device_mesh", f"a divisor of the {groups} groups of B and C", ranks)
    if isinstance(mixer, QKVMixer) and mixer.kv_heads % ranks:
        split = [mixer.projection("q")]
    styles: dict[str, ParallelStyle] = {}
    for name, layer in mixer.named_modules():
        if layer is mixer.output_layer:
            styles[name] = RowwiseParallel(use_local_output=False)
        elif layer in split:
            styles[name] = ColwiseParallel(use_local_output=False)
    return styles


def _on_dtensors(function: Callable[..., Any], mesh: DeviceMesh) -> Callable[..., Any]:
    """``function`` of whole tensors, told that they are; its first result is a whole tensor."""

    def known(x: Any) -> Any:
        """A tensor as one that every process of the mesh has whole."""
        plain = isinstance(x, Tensor) and not isinstance(x, DTensor)
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False) if plain else x

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        """As ``function``, with what it creates counted as whole too."""
        args, kwargs = tree_map(known, (args, kwargs))
        with implicit_replication(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")
            y, state = function(*args, **kwargs)
        return y.redistribute(mesh, [Replicate()]).to_local(), state

    return call


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """For ``torch.distributed.tensor.parallel.parallelize_module``: every mixer, split by heads.

    The plan of the original model goes with it, for all but its attention:

        parallelize_module(model, mesh, tensor_parallel_plan(model) | {
            "model.layers.*.mlp.up_proj": ColwiseParallel(), ...})

    Args:
        model: a converted model.

    Raises:
        ValueError: the model has no converted attention.
    """
    expect(bool(swapped(model)), "model", "a converted model", type(model).__name__)
    return {f"{path}.mixer": MixerParallel() for path in swapped(model)}
