"""One Python function a primitive, two registered ops behind it.

Under torch.compile a CPU body that Inductor can see costs minutes of compile time and gains little,
so the CPU op is opaque there; export opens it through ``flacompile.passes.decompose``. On CUDA the
op is a ``triton_op``, whose kernels Inductor and AOTInductor do see. The device is known while
tracing, so one plain function chooses, and each op keeps one device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import register_sharding

from flacompile.ops.sharding import AXES, rules

NAMESPACE = "flacompile"


def define(
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    visible: Callable[..., Any] | None = None,
) -> tuple[Callable[..., Any], tuple[CustomOpDef, CustomOpDef]]:
    """Registers ``flacompile::<name>`` (CPU) and ``flacompile::<name>_cuda`` (Triton).

    Args:
        cpu: the CPU form; its name is the op's and its annotations are the schema.
        cuda: the same signature over Triton launchers.
        fake: the shapes: same signature, empty outputs.
        visible: the same signature; what torch.compile sees on a CPU, where it should see it.

    Returns:
        A function that calls the op of the first tensor's device, and the two ops.
    """
    name = cpu.__name__
    if visible is None:
        on_cpu: Any = torch.library.custom_op(
            f"{NAMESPACE}::{name}", cpu, mutates_args=(), device_types="cpu"
        )
    else:
        on_cpu = torch.library.triton_op(f"{NAMESPACE}::{name}", visible, mutates_args=())
        on_cpu.register_kernel("cpu")(cpu)
    on_cuda: Any = torch.library.triton_op(f"{NAMESPACE}::{name}_cuda", cuda, mutates_args=())
    for op in (on_cpu, on_cuda):
        op.register_fake(fake)
        if name in AXES:
            register_sharding(op._opoverload)(partial(rules, name))

    def call(*args: Any) -> Any:
        op = on_cuda if args[0].is_cuda else on_cpu
        return op(*(_as_dtensors(args) if isinstance(args[0], DTensor) else args))

    return call, (on_cpu, on_cuda)


def _as_dtensors(args: tuple[Any, ...]) -> list[Any]:
    """Plain tensors too, whole on every rank: autograd makes such zeros for missing gradients."""
    mesh = args[0].device_mesh
    whole = [Replicate()] * mesh.ndim

    def known(x: Any) -> Any:
        plain = isinstance(x, Tensor) and not isinstance(x, DTensor)
        return DTensor.from_local(x, mesh, whole, run_check=False) if plain else x

    return [known(x) for x in args]
