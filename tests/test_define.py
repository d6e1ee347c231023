"""How a call reaches its op: by the dispatcher wherever somebody watches, else directly."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flacompile import ops
from flacompile.ops.define import direct, unwatched


def test_modes_transforms_and_subclasses_watch():
    x = torch.ones(2)
    assert unwatched((x, None, torch.nn.Parameter(x), 0.5))
    with FlopCounterMode(display=False):
        assert not unwatched((x,))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not unwatched((fake,))
    seen = []
    torch.func.vmap(lambda y: seen.append(unwatched((x,))) or y)(x)
    assert seen == [False]


def test_direct_gradients_are_those_of_the_op():
    op = torch.ops.flacompile.scan_forward.default
    torch.manual_seed(0)
    args = [-torch.rand(2, 9, 3), torch.randn(2, 9, 3), torch.randn(2, 3)]
    args = [x.requires_grad_() for x in args]
    by_op = op(*args, None)
    backward = torch.ops.flacompile.scan_backward.default

    def setup(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[2], output[0])

    def gradients(ctx, *grads):
        g, state, h = ctx.saved_tensors
        return *backward(g, state, None, h, *grads), None

    function = direct(lambda *inputs: op(*(x if x is None else x.detach() for x in inputs)),
                      setup, gradients)  # fmt: skip
    by_function = function.apply(*args, None)
    for a, b in zip(by_op, by_function, strict=True):
        assert torch.equal(a, b)
    want = torch.autograd.grad([x.sum() for x in by_op], args)
    got = torch.autograd.grad([x.sum() for x in by_function], args)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_direct_calls_are_those_of_the_op():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 2, 64, device="cuda", requires_grad=True) for _ in range(3))
    g = -torch.rand(2, 70, 2, device="cuda")
    o, _state = ops.linear_attn(q, k, v, g)
    with FlopCounterMode(display=False):
        watched, _state = ops.linear_attn(q, k, v, g)
    assert "Direct" in type(o.grad_fn).__name__ != type(watched.grad_fn).__name__
    assert torch.equal(o, watched)
    pairs = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (o, watched))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
