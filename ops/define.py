"""One Python function a primitive, two registered ops behind it.

Under torch.compile a CPU body that Inductor can see costs minutes of compile time and gains little,
so the CPU op is opaque there; export opens it through ``flacompile.passes.decompose``. On CUDA the
op is a ``triton_op``, whose kernels Inductor and AOTInductor do see. The device is known while
tracing, so one plain function chooses, and each op keeps one device.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "flacompile"


class Op:
    """Calls the op of the first tensor's device; of an op for CUDA alone, that.

    A call of plain CUDA tensors that nobody watches goes to the kernels itself: the way through the
    dispatcher costs more than the launches of a small call.
    """

    def __init__(
        self, on_cuda: CustomOpDef, kernels: Callable[..., Any], on_cpu: CustomOpDef | None = None
    ) -> None:
        self.on_cpu, self.on_cuda = on_cpu, on_cuda
        self.kernels, self.function = kernels, None

    def __call__(self, *args: Any) -> Any:
        if self.on_cpu is not None and not args[0].is_cuda:
            return self.on_cpu(*_placed(args))
        if torch.compiler.is_compiling() or not unwatched(args):
            return self.on_cuda(*_placed(args))
        with set_wrap_triton_enabled(False):
            if self.function is not None and needs_grad(args):
                return self.function.apply(*args)
            return self.kernels(*args)

    def differentiate(
        self, setup: Callable[..., None], backward: Callable[..., Any], flops: Callable[..., int]
    ) -> None:
        """Registers the gradients and what a call costs.

        Args:
            setup: ``(ctx, inputs, output)``, what the backward needs.
            backward: ``(ctx, *gradients of the outputs)``, those of the inputs.
            flops: the shapes of the inputs to floating-point operations.
        """
        for op in filter(None, (self.on_cpu, self.on_cuda)):
            op.register_autograd(backward, setup_context=setup)
            register_flop_formula(op._opoverload.overloadpacket)(flops)
        self.function = direct(self.kernels, setup, backward)


def direct(
    kernels: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> Any:
    """The gradients of ``differentiate`` without the dispatcher."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            """The kernels on the inputs."""
            return kernels(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """What ``setup`` keeps of inputs and output."""
            setup(ctx, inputs, output)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            """One gradient an input, of those of the outputs."""
            return backward(ctx, *gradients)

    return Direct


def unwatched(args: tuple[Any, ...]) -> bool:
    """Whether no mode, no functorch transform and no subclass of tensors would see the call."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(x) in (Tensor, Parameter) for x in args if isinstance(x, Tensor))
    )


def on_plain_cuda(args: tuple[Any, ...]) -> bool:
    """Whether all tensors are on a GPU, and none is a DTensor, which has a device mesh."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    return all(x.is_cuda and not hasattr(x, "device_mesh") for x in tensors)


def needs_grad(args: tuple[Any, ...]) -> bool:
    """Whether autograd would record a call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in args if isinstance(x, Tensor))


def define(
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    visible: Callable[..., Any] | None = None,
) -> Op:
    """Registers ``flacompile::<name>`` (CPU) and ``flacompile::<name>_cuda`` (Triton).

    Args:
        cpu: the CPU form; its name is the op's and its annotations are the schema.
        cuda: the same signature over Triton launchers.
        fake: the shapes: same signature, empty outputs.
        visible: the same signature; what torch.compile sees on a CPU, where it should see it.
    """
    name = cpu.__name__
    if visible is None:
        on_cpu: Any = torch.library.custom_op(
            f"{NAMESPACE}::{name}", cpu, mutates_args=(), device_types="cpu"
        )
    else:
        on_cpu = torch.library.triton_op(
            f"{NAMESPACE}::{name}", _unsearched(visible), mutates_args=()
        )
        on_cpu.register_kernel("cpu")(cpu)
    on_cpu.register_fake(fake)
    return Op(define_cuda(name, cuda, fake), cuda, on_cpu)


def define_cuda(name: str, cuda: Callable[..., Any], fake: Callable[..., Any]) -> CustomOpDef:
    """Registers ``flacompile::<name>_cuda`` alone: launchers, and the shapes that they give."""
    op: Any = torch.library.triton_op(
        f"{NAMESPACE}::{name}_cuda", _unsearched(cuda), mutates_args=()
    )
    op.register_fake(fake)
    return op


def _unsearched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same without a source, which ``triton_op`` would search for kernels.

    That imports Inductor, a second, and finds none: launchers are imported where they are called.
    Bounds of packs are copied: compilers take them for written, as what a kernel's functions load
    of them tells the places of stores.
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        """``function``, behind a wrapper that has no source."""
        return function(*map(_apart, args))

    call.__wrapped__ = partial(function)  # whose signature is known, and whose source is not
    return call


def _apart(x: Any) -> Any:
    is_index = isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)
    return x.clone() if is_index else x


def _placed(args: tuple[Any, ...]) -> tuple[Any, ...] | list[Any]:
    if type(args[0]) in (Tensor, Parameter):
        return args
    from flacompile.ops import sharding  # DTensor takes half a second to import

    return sharding.placed(args)
