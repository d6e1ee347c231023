"""The Triton kernel of one token against the token loop in float64, for all three ops."""

import pytest
import torch
from op_cases import OPS, Draw, error, loop, rounded, step, tokens

from flacompile.ops import step as module
from flacompile.ops.kernels import step as kernels

poisoned = pytest.mark.usefixtures("poisoned_empty")

NAMES = ("linear_attn", "delta_rule", "dplr")
CASES = [(name, variant) for name in NAMES for variant in OPS[name].variants]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def draw(name, variant, device, dtype, key=24, value=40):
    """The tensors of one token, three sequences of two heads, and a state."""
    args = OPS[name].tensors(variant, Draw(3, 1, 0.5, key, value))
    *inputs, state = [x if x is None else x.to(device) for x in rounded(name, args, dtype)]
    return [*tokens(name, inputs, 0), state]


def truth(name, args):
    *inputs, state = [x if x is None else x.double() for x in args]
    inputs = [x if x is None else x[:, None] for x in inputs]
    o, last = loop(name)(*inputs, **OPS[name].options, state=state)
    return o[:, 0], last


def near(got, want, bound):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and error(a, b) < bound


@poisoned
@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernel(name, variant, dtype, device, monkeypatch):
    """The step itself, with the kernel in the place of plain PyTorch."""
    monkeypatch.setattr(module, "on_plain_cuda", lambda args: True)
    monkeypatch.setattr(module, "_by_kernel", kernels.step)
    args = draw(name, variant, device, dtype)
    got = step(name)(*args[:-1], **OPS[name].options, state=args[-1])
    assert got[0].dtype == dtype
    near(got, truth(name, args), TOLERANCE[dtype])


@poisoned
@pytest.mark.parametrize("name", ["linear_attn", "dplr"])
def test_states_of_many_rows(name, device, monkeypatch):
    """Registers hold 16 of the 40 rows."""
    monkeypatch.setattr(kernels, "ROWS", 16)
    monkeypatch.setattr(module, "on_plain_cuda", lambda args: True)
    monkeypatch.setattr(module, "_by_kernel", kernels.step)
    args = draw(name, list(OPS[name].variants)[-1], device, torch.float32, 40)
    near(step(name)(*args[:-1], **OPS[name].options, state=args[-1]), truth(name, args), 1e-6)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_compiled_and_with_gradients(name, variant, dtype):
    args = draw(name, variant, "cuda", dtype, 128, 128)

    def call(*args):
        return step(name)(*args[:-1], **OPS[name].options, state=args[-1])

    torch._dynamo.reset()
    want, bound = truth(name, args), 4e-3 if dtype == torch.bfloat16 else 1e-6
    near(call(*args), want, bound)
    near(torch.compile(call, fullgraph=True)(*args), want, bound)
    args[0].requires_grad_()
    o, state = call(*args)
    near((o.detach(), state.detach()), want, bound)
    assert torch.autograd.grad(o.sum(), args[0])[0].isfinite().all()


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, monkeypatch):
    """opcheck of the op behind the steps."""
    args, op, given = (
        draw(name, list(OPS[name].variants)[-1], "cuda", torch.float32),
        module._by_kernel,
        [],
    )
    monkeypatch.setattr(module, "_by_kernel", lambda *args: given.extend(args) or op(*args))
    step(name)(*args[:-1], **OPS[name].options, state=args[-1])
    torch.library.opcheck(op.on_cuda, tuple(given))
