"""The Triton kernels of quadratic_attn against the token loop in float64, and who takes them."""

import itertools
from importlib import import_module

import pytest
import torch
from mixer_inputs import WIDTH
from op_cases import OPS, Draw, error, gradients, leaves
from test_mixers import build
from test_ops import CUDA, Recorder
from torch._subclasses import FakeTensorMode

from flacompile.ops import quadratic_attn, spec
from flacompile.ops.kernels import linear_attn as linear_attn_kernels

module = import_module("flacompile.ops.quadratic_attn")  # in the package its name is a function's
TAYLOR, SQUARE, MOVED = (1.0, 0.25, 0.03125), (0.0, 0.0, 0.1), (4.0, 1.0, 0.0625)
EPS = 1e-3


@pytest.fixture
def dtype(monkeypatch, poisoned_empty, device):
    """All that has no decay goes by the kernels: in bf16, or where it is interpreted in fp32."""
    monkeypatch.setattr(module, "in_registers", lambda q, gk: gk is None)
    return torch.bfloat16 if device == "cuda" else torch.float32


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(time, K, V, weights, sequences, masked, dtype, device):
    """q, k, v, the state after three tokens, and a mask; a pack is one row."""
    draw = Draw(1 if sequences > 2 else 2, time, 1.0, K, V)
    q, k, v = (draw.at_tokens(2, size) for size in (K, K, V))
    early, values = draw.normal(sequences, 3, 2, K), draw.normal(sequences, 3, 2, V)
    state = spec.quadratic_attn(early, early, values, weights=weights)[1]
    args = [*(x.to(dtype) for x in (q, k, v)), state.float()]
    mask = draw.at_tokens() < 0.5 if masked else None
    return leaves([x.to(device) for x in args]), mask if mask is None else mask.to(device)


def truth(args, weights, mask, bounds):
    """o and the last states by the loop, sequence by sequence, and all gradients."""
    q, k, v, state = wide = leaves([x.double() for x in args])
    spans = [(0, q.shape[1])] if bounds is None else itertools.pairwise(bounds)
    states, parts = [state] if bounds is None else state.split(1), []
    for (first, last), before in zip(spans, states, strict=True):
        tokens = [x if x is None else x[:, first:last] for x in (q, k, v, mask)]
        loop = spec.quadratic_attn(*tokens[:3], None, weights, EPS, before, tokens[3])
        parts.append(loop)
    outputs = torch.cat([o for o, _ in parts], 1), torch.cat([S for _, S in parts])
    return *outputs, *gradients(outputs, wide)


def found(args, weights, mask, bounds):
    """The same by the kernels."""
    cu = None if bounds is None else torch.tensor(bounds, device=args[0].device)
    *tensors, state = args
    options = {"weights": weights, "eps": EPS, "mask": mask, "cu_seqlens": cu}
    outputs = quadratic_attn(*tensors, state=state, **options)
    return *outputs, *gradients(outputs, args)


def check(case, dtype, device):
    time, K, V, weights, bounds, masked = case
    sequences = 2 if bounds is None else len(bounds) - 1
    args, mask = draw(time, K, V, weights, sequences, masked, dtype, device)
    got, want = (f(args, weights, mask, bounds) for f in (found, truth))
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    names = ("o", "final", "dq", "dk", "dv", "dstate")
    for name, a, b in zip(names, got, want, strict=True):
        assert error(a, b) < TOLERANCE[dtype], name
    return got


CASES = {  # T, K, V, weights, bounds of a pack, whether there is a mask
    "no token": (0, 16, 24, TAYLOR, None, False),
    "one token": (1, 16, 24, TAYLOR, None, False),
    "one channel": (20, 1, 5, MOVED, None, False),
    "whole chunks": (64, 16, 16, TAYLOR, None, False),
    "squares alone": (40, 15, 24, SQUARE, None, True),
    "blocks of values": (40, 7, 72, TAYLOR, None, True),
    "a pack": (41, 5, 40, MOVED, [0, 0, 20, 20, 21, 41], True),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, device):
    check(CASES[case], dtype, device)


@pytest.mark.parametrize("bounds", [None, [0, 50, 50, 63]])
def test_segments(bounds, dtype, device, monkeypatch):
    monkeypatch.setattr(linear_attn_kernels, "SHORTEST", 20)
    check((63, 6, 16, TAYLOR, bounds, True), dtype, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="no tiles for it there: it is not taken")
def test_fp16(dtype):
    check((40, 6, 24, TAYLOR, None, False), torch.float16, "cpu")


def test_runs_are_bit_equal(dtype, device):
    case = (40, 6, 16, TAYLOR, [0, 3, 4, 40], True)
    runs = [check(case, dtype, device) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tokens_before_the_first_real_one(dtype, device):
    """Nothing is known there: o is zero, and no gradient is but finite."""
    args, _ = draw(40, 6, 10, TAYLOR, 2, False, dtype, device)
    mask = torch.arange(40, device=device).expand(2, 40) >= 35
    o, final = quadratic_attn(*args[:3], weights=TAYLOR, mask=mask)
    assert not o[:, :35].any() and o[:, 35:].all()
    given = torch.autograd.grad(o[:, 35:].square().sum() + final.sum(), args[:3])
    assert all(dx.isfinite().all() and not dx[:, :35].any() for dx in given)


def test_mixer(dtype, device, monkeypatch):
    """Padded rows, a pack and a carried state: as with features in memory."""
    mixer = build("based", dtype=dtype).to(device)
    x = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    mask = torch.arange(12, device=device) < torch.tensor([[12], [7]], device=device)

    def outputs():
        y, state = mixer(x, mask=mask)
        more, state = mixer(x, state, mask=mask.flip(1))
        bounds = torch.tensor([0, 3, 12], device=device)
        packed, last = mixer(x[:1], cu_seqlens=bounds)
        found = y, more, state.recurrent[0], packed, last.recurrent[0]
        return *found, *torch.autograd.grad(
            sum(z.square().sum() for z in found), mixer.parameters()
        )

    with Recorder() as calls:
        got = outputs()
    assert {op.name().split(".")[0] for op, *_ in calls.calls} == {
        "flacompile::quadratic_attn_forward_cuda", "flacompile::quadratic_attn_backward_cuda"
    }  # fmt: skip
    monkeypatch.setattr(module, "in_registers", lambda q, gk: False)
    for a, b in zip(got, outputs(), strict=True):
        assert error(a, b) < 3 * TOLERANCE[dtype]


TAKEN = {  # K, dtype, whether there is a decay
    (16, torch.bfloat16, False): True,
    (16, torch.bfloat16, True): False,
    (17, torch.bfloat16, False): False,
    (16, torch.float16, False): False,
    (16, torch.float32, False): False,
}


@pytest.mark.parametrize("case", TAKEN)
def test_who_goes_by_the_kernels(case):
    K, dtype, decay = case
    with FakeTensorMode():
        q = torch.empty(1, 70, 2, K, dtype=dtype, device="cuda")
        gk = torch.empty(1, 70, 2, device="cuda") if decay else None
    assert module.in_registers(q, gk) == TAKEN[case]
    assert not module.in_registers(torch.empty(1, 70, 2, K, dtype=dtype), None)


def test_exported_with_any_length(dtype):
    """As for a GPU: one node, whose shapes any batch and length have."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v, state):
            return quadratic_attn(q, k, v, weights=TAYLOR, state=state)

    args, _ = draw(70, 16, 24, TAYLOR, 2, False, torch.float32, "cpu")
    B, T = torch.export.Dim("B", min=1), torch.export.Dim("T", min=1)
    shapes = [{0: B, 1: T}] * 3 + [{0: B}]
    program = torch.export.export(Model(), tuple(args), dynamic_shapes=shapes, strict=False)
    names = [str(node.target) for node in program.graph.nodes if "flacompile" in str(node.target)]
    assert names == ["flacompile.quadratic_attn_forward_cuda.default"]


@pytest.mark.gpu
@CUDA
def test_contract():
    """opcheck of the forward and the backward."""
    args, mask = draw(70, 16, 64, TAYLOR, 2, True, torch.bfloat16, "cuda")
    with Recorder() as calls:
        found(args, TAYLOR, mask, None)
    assert len(calls.calls) == 2
    for op, inputs, _ in calls.calls:
        inputs = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        if op is calls.calls[0][0]:
            inputs[:3] = [x.requires_grad_() for x in inputs[:3]]
        torch.library.opcheck(op, tuple(inputs))


@pytest.mark.gpu
@CUDA
def test_compiled_equals_eager():
    torch._dynamo.reset()
    op = OPS["quadratic_attn"]

    def loss(q, k, v, state, mask, bounds):
        o, final = quadratic_attn(q, k, v, state=state, mask=mask, cu_seqlens=bounds, **op.options)
        return o.square().sum() + final.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for time in (50, 77, 700):
        args, mask = draw(time, 16, 64, TAYLOR, 3, True, torch.bfloat16, "cuda")
        bounds = torch.tensor([0, 17, 17, time], device="cuda")
        both = [torch.autograd.grad(f(*args, mask, bounds), args) for f in (loss, compiled)]
        assert max(error(a, b) for a, b in zip(*both, strict=True)) < 1e-2
