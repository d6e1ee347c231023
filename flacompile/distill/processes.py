"""A run of several processes, as ``torchrun`` starts them; one process needs nothing of this.

Weights, gradients and the optimizer's state are split by FSDP2 over all processes, each of which
reads its own rows. Gradients are sums over the processes of losses that are shares of a mean, so a
step is that of one process that goes through all the rows, part by part.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flacompile.distill.prepare import blocks
from flacompile.passes.swap_attention import student_state, swapped

if TYPE_CHECKING:  # where needed it is imported inside: DTensor takes half a second
    from torch.distributed.tensor import DeviceMesh


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that ``torchrun`` started know each other; others are as they were."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        # What is not split yet is on the CPU.
        backend = f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator)}"
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        dist.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block, then the others: they find what it wrote."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def mean(x: Tensor) -> Tensor:
    """Of a number of every process."""
    if size() > 1:
        dist.all_reduce(x)
    return x / size()


def of_the_first(value: int) -> int:
    """The number that the first process has."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def whole(x: Any) -> Any:
    """A tensor that may be split, gathered; its gradient is summed over the processes."""
    if size() == 1:
        return x
    from torch.distributed.tensor import DTensor, Partial

    return x.full_tensor(grad_placements=[Partial()]) if isinstance(x, DTensor) else x


@contextmanager
def shared(model: nn.Module) -> Iterator[nn.Module]:
    """A model to train in place of this one, which has its weights after: itself, or its parts."""
    if size() == 1:
        yield model
        return
    parts = split(copy.deepcopy(model))
    yield parts
    own = student_state(model)
    for name, tensor in student_state(parts).items():
        own[name].copy_(whole(tensor))


def split(model: nn.Module) -> nn.Module:
    """Splits a transformers language model in place, as the first process has it; returns it.

    A mixer, which align calls by itself, a block, and the rest of the body are gathered one at a
    time. The head, of which the loss reads the weights, is gathered by ``whole``.

    Raises:
        ValueError: the head shares the embeddings.
    """
    if size() == 1:
        return model
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), 0)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    mesh = init_device_mesh("cpu" if accelerator is None else accelerator.type, (size(),))
    body: Any = model.base_model
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for name, parameter in list(head.named_parameters()):
        part = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        setattr(head, name, nn.Parameter(part, parameter.requires_grad))
    mixers = [layer.mixer for layer in swapped(model).values()]
    for module in (*mixers, *blocks(model), body):
        if any(True for _ in module.parameters()):
            _split(module, mesh)
    return model


def _split(module: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    fully_shard(module, mesh=mesh)
    assert isinstance(module, FSDPModule)
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)  # a loss is a share of the mean already
