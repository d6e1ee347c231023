"""ternary_linear: exact in integers on every path, and the op contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import error

from flacompile.ops import ternary_linear
from flacompile.ops.ternary import (
    decomposed,
    pack_ternary,
    round_rows,
    round_weight,
    unpack_ternary,
)
from flacompile.passes.decompose import decompose

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 7, 16), (3, 9, 30), (2, 5, 2051), (9, 64, 100), (70, 130, 132), (0, 4, 16))  # M N K


def draw(M, N, K, dtype=torch.float32, device="cpu"):
    """x, packed, scale and the weights as they are packed, -1 to 1."""
    generator = torch.Generator().manual_seed(K)
    x = (3 * torch.randn(M, K, generator=generator)).to(device, dtype)
    codes, scale = round_weight(torch.randn(N, K, generator=generator).to(device))
    return x, pack_ternary(codes), scale, codes


def exact(x, codes, scale):
    """y from sums that are those of integers whatever their order; a GPU divides by multiplying."""
    X, r = (part.to(x.device) for part in round_rows(x.cpu()))
    return ((X.double() @ codes.double().T).float() * scale * r).to(x.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_is_exact(shape, dtype):
    """The CPU's, and both of those that compilers see."""
    x, packed, scale, codes = draw(*shape, dtype)
    want = exact(x, codes, scale)
    assert torch.equal(ternary_linear(x, packed, scale), want)
    for form in (decomposed, decomposed_for_many):
        assert torch.equal(form(x, packed, scale), want)


def decomposed_for_many(x, packed, scale):
    """As it is for more rows than a few."""
    rows = torch.cat((x, x.new_zeros(5, x.shape[1])))
    return decomposed(rows, packed, scale)[: len(x)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, CUDA])],
)  # fmt: skip
def test_kernels_are_exact(shape, dtype, device, poisoned_empty):
    x, packed, scale, codes = draw(*shape, dtype, device)
    got = torch.ops.flacompile.ternary_linear_forward_cuda(x, packed, scale)
    assert torch.equal(got, exact(x, codes, scale))


@pytest.mark.parametrize("rows", [3, 9])
def test_kernels_keep_nan_to_its_row(rows, device):
    x, packed, scale, codes = draw(rows, 8, 100, torch.float16, device)
    want = exact(x, codes, scale)
    x[1, 70] = float("nan")
    got = torch.ops.flacompile.ternary_linear_forward_cuda(x, packed, scale)
    assert got[1].isnan().all() and torch.equal(got[2:], want[2:]) and torch.equal(got[0], want[0])


def test_packing():
    """Four weights a byte, zeros in the padding."""
    codes = draw(1, 6, 50)[-1]
    packed = pack_ternary(codes)
    assert packed.shape == (6, 16) and packed.dtype == torch.uint8
    assert torch.equal(unpack_ternary(packed), F.pad(codes, (0, 14)))
    assert packed[0, 3] == sum((codes[0, 3 + 16 * j] + 1).item() * 4**j for j in range(3)) + 64


def test_zeros_and_huge_values():
    x, packed, scale, codes = draw(4, 8, 32)
    x = x * torch.tensor([[0.0], [1e-8], [1e30], [1.0]])
    y = ternary_linear(x, packed, scale)
    assert torch.equal(y, exact(x, codes, scale)) and y.isfinite().all() and not y[0].any()


def test_contract():
    x, packed, scale, codes = draw(3, 8, 20)
    torch.library.opcheck(
        torch.ops.flacompile.ternary_linear_forward.default, (x.requires_grad_(), packed, scale)
    )
    dy = torch.randn(3, 8)
    (dx,) = torch.autograd.grad(ternary_linear(x, packed, scale), x, dy)
    assert error(dx, dy @ codes.float() * scale) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        low = ternary_linear(x, packed, scale)
    assert torch.equal(low, ternary_linear(x.bfloat16(), packed, scale))


def test_any_layout_of_x_and_a_bias():
    x, packed, scale, codes = draw(12, 8, 20)
    turned, bias = x.view(3, 4, 20).transpose(0, 1), torch.randn(8)
    want = exact(x, codes, scale).view(3, 4, 8).transpose(0, 1) + bias
    assert torch.equal(ternary_linear(turned, packed, scale, bias), want)
    assert torch.equal(ternary_linear(x[0], packed, scale), exact(x[:1], codes, scale)[0])


@pytest.mark.parametrize("rows", [2, 40])
def test_export_keeps_one_node_and_opens_it(rows):
    """The example's form is right for any number of rows."""

    class Model(torch.nn.Module):
        def forward(self, x, packed, scale):
            return ternary_linear(x, packed, scale)

    shapes = ({0: torch.export.Dim.DYNAMIC}, None, None)
    args = draw(rows, 8, 20)[:3]
    program = torch.export.export(Model(), args, dynamic_shapes=shapes)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("flacompile.ternary_linear_forward.default") == 1
    opened = decompose(program)
    assert not any("flacompile" in str(node.target) for node in opened.graph.nodes)
    for other in (rows, 3, 70):
        x, packed, scale, codes = draw(other, 8, 20)
        got = opened.module(check_guards=False)(x, packed, scale)
        assert torch.equal(got, exact(x, codes, scale))


def test_compiled_equals_eager(device):
    """Of few rows and of many, in one graph."""

    def both(x, packed, scale):
        return ternary_linear(x[0], packed, scale), ternary_linear(x, packed, scale)

    x, packed, scale, codes = draw(12, 8, 40, device=device)
    one, many = torch.compile(both, fullgraph=True)(x, packed, scale)
    want = exact(x, codes, scale)
    assert torch.equal(many, want) and torch.equal(one, want[0])


@pytest.mark.gpu
@CUDA
def test_package_on_a_gpu(tmp_path):
    """The kernels are in it, and right for any number of rows."""

    class Model(torch.nn.Module):
        def forward(self, x, packed, scale):
            return ternary_linear(x, packed, scale)

    shapes = ({0: torch.export.Dim("rows", min=2, max=4096)}, None, None)
    args = draw(40, 200, 500, torch.bfloat16, "cuda")[:3]
    program = torch.export.export(Model(), args, dynamic_shapes=shapes)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    package = torch._inductor.aoti_load_package(path)
    for rows in (2, 40, 300):
        x, packed, scale, codes = draw(rows, 200, 500, torch.bfloat16, "cuda")
        assert torch.equal(package(x, packed, scale), exact(x, codes, scale))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x: x.long()),
        ("x", lambda x: x.sum()),
        ("packed", lambda p: p[:, :4]),
        ("packed", lambda p: p.int()),
        ("packed", lambda p: p.to("meta")),
        ("packed", lambda p: p.repeat(1, 2)[:, ::2]),
        ("scale", lambda s: s[None]),
        ("scale", lambda s: s.double()),
        ("bias", lambda b: b[1:]),
        ("bias", lambda b: b.to("meta")),
    ],
)
def test_bad_input_is_named(name, change):
    x, packed, scale, _ = draw(3, 8, 20)
    args = {"x": x, "packed": packed, "scale": scale, "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ternary_linear(**{**args, name: change(args[name])})
