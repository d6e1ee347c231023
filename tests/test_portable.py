"""What ONNX and ExecuTorch lack of aten, opened into what they have: same values, any length."""

import pytest
import torch
from mixer_inputs import WIDTH
from test_mixer_conversion import site
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from flacompile.layers import MIXERS
from flacompile.ops.chunked_dplr import LONGEST
from flacompile.ops.linear_attn import decomposed
from flacompile.passes.decompose import decompose
from flacompile.passes.portable import portable, portable_table, running_max, solve_unit_lower


class LacksBoth(torch.nn.Module):
    """[T, 32] -> running maxima, and a unit lower triangle solved for them."""

    def forward(self, x, A):
        m = x.cummax(0).values
        return m, torch.linalg.solve_triangular(A, m.mT, upper=False, unitriangular=True)


def test_a_program_says_the_same():
    generator = torch.Generator().manual_seed(0)
    A = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=generator).tril(-1)
    example = torch.randn(100, 32, generator=generator)
    shapes = ({0: Dim("time", min=2)}, None)
    program = portable(torch.export.export(LacksBoth(), (example, A), dynamic_shapes=shapes))
    assert not portable_table().keys() & {node.target for node in program.graph.nodes}
    for time in (2, 3, 64, 1000):
        x = torch.randn(time, 32, generator=generator)
        got, want = program.module()(x, A), LacksBoth()(x, A)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_running_max_reaches_as_far_as_an_export():
    x = torch.arange(LONGEST + 1, 0, -1.0)  # the first is the maximum of all
    assert torch.equal(running_max(x, 0)[0], x.cummax(0).values)
    x = torch.randn(3, 50, 2).masked_fill(torch.rand(3, 50, 2) < 0.5, -torch.inf)
    assert torch.equal(running_max(x, 1)[0], x.cummax(1).values)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_triangles(size):
    torch.manual_seed(0)
    A, B = torch.randn(2, 3, size, size, dtype=torch.float64), torch.randn(3, size, 5).double()
    options = {"upper": False, "unitriangular": True}
    want = torch.linalg.solve_triangular(A.tril(), B, **options)
    torch.testing.assert_close(solve_unit_lower(A, B, **options), want)
    for wrong in ({"upper": True}, {"left": False}, {"unitriangular": False}):
        with pytest.raises(ValueError, match="A: expected a unit lower triangle on the left"):
            solve_unit_lower(A, B, **(options | wrong))


class Calls(TorchDispatchMode):
    """Keeps the positional arguments of every call of one operation."""

    def __init__(self, op):
        super().__init__()
        self.op, self.args = op, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.args.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [(), (4,)])
def test_no_padding_is_negative(channels):
    """ExecuTorch pads by no negative number, though aten does."""
    q, state = torch.randn(1, 2000, 2, 4), torch.randn(1, 2, 4, 4)
    g = -torch.rand(1, 2000, 2, *channels)
    with Calls(torch.ops.aten.constant_pad_nd.default) as pads:
        decomposed(q, q, q, g, None, state, None, 1.0)
    assert pads.args and min(n for _, amounts, *_ in pads.args for n in amounts) >= 0


@torch.no_grad()
def test_no_product_is_of_nothing():
    """ExecuTorch leaves a product over no channels as the memory was, where aten gives zeros."""
    mixer = MIXERS["mla"](MIXERS["mla"].config_for(site()))
    state = mixer.init_state(1)
    with Calls(torch.ops.aten.bmm.default) as products:
        mixer.step(torch.randn(1, WIDTH), state)
    assert products.args and all(x.numel() for pair in products.args for x in pair)


@torch.no_grad()
def test_a_window_opens_by_the_strides_of_its_parts():
    """As docs/examples/pte.py traces it; a view of what a fused kernel gives would be lost."""
    mixer = MIXERS["attn"](MIXERS["attn"].config_for(site(window=9)))
    x = torch.randn(1, 300, WIDTH)
    shapes = {"x": {1: Dim.DYNAMIC}}
    with sdpa_kernel(SDPBackend.MATH):
        program = decompose(torch.export.export(mixer, (x,), dynamic_shapes=shapes, strict=False))
    opened = program.run_decompositions().module()
    torch.testing.assert_close(opened(x[:, :170])[0], mixer(x[:, :170])[0], rtol=1e-4, atol=1e-5)
