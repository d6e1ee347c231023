"""A model over several devices: mixers split by heads, through PyTorch's own DTensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
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
from flacompile.ops.validate import expect
from flacompile.passes.swap_attention import swapped


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
        expect(isinstance(module, RecurrentMixer), "module", "a recurrent mixer", type(module))
        heads, ranks = module.output_heads, device_mesh.size()
        expect(heads % ranks == 0, "device_mesh", f"a divisor of the {heads} heads", ranks)
        groups = getattr(module.config, "n_groups", heads)
        expect(groups in (1, heads) or groups % ranks == 0, "n_groups", f"times {ranks}", groups)
        split = module.layers_by_head
        if getattr(module, "kv_heads", heads) % ranks:
            split = [module.projection("q")]
        styles: dict[str, ParallelStyle] = {}
        for name, layer in module.named_children():
            if layer is module.output_layer:
                styles[name] = RowwiseParallel(use_local_output=False)
            elif layer in split:
                styles[name] = ColwiseParallel(use_local_output=False)
        parallelize_module(module, device_mesh, styles)
        distribute_module(module, device_mesh)
        for name in ("forward", "step"):
            setattr(module, name, _on_dtensors(getattr(module, name), device_mesh))
        return module


def _on_dtensors(function: Callable[..., Any], mesh: DeviceMesh) -> Callable[..., Any]:
    """``function`` of whole tensors, told that they are; its first result is a whole tensor."""

    def known(x: Any) -> Any:
        plain = isinstance(x, Tensor) and not isinstance(x, DTensor)
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False) if plain else x

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(known, (args, kwargs))
        with implicit_replication():
            y, state = function(*args, **kwargs)
        return y.redistribute(mesh, [Replicate()]).to_local(), state

    return call


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    return {f"{path}.mixer": MixerParallel() for path in swapped(model)}
