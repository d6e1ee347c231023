"""linear_attn on the CPU: values, gradients and the op contract against the token loop."""

import itertools
from importlib import import_module

import pytest
import torch
from torch import Tensor

from flacompile.ops import linear_attn, linear_attn_step, spec

module = import_module("flacompile.ops.linear_attn")

DECAYS = list(itertools.product([None, "head", "channel"], [None, "head", "channel"]))


def draw(time, kinds=(None, None), *, batch=2, dtype=torch.float64, strength=1.0, seed=0):
    """q, k, v, gk, gv, state with H 2, K 6, V 10."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def decay(kind, dim):
        shape = (batch, time, 2) if kind == "head" else (batch, time, 2, dim)
        return None if kind is None else -strength * normal(*shape).abs() - 1e-3

    q, k, v = normal(batch, time, 2, 6), normal(batch, time, 2, 6), normal(batch, time, 2, 10)
    return [q, k, v, decay(kinds[0], 6), decay(kinds[1], 10), normal(batch, 2, 6, 10)]


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / (want.norm() + 1e-30)).item()


def leaves(args):
    return [x if x is None else x.detach().clone().requires_grad_() for x in args]


@pytest.mark.parametrize("kinds", DECAYS)
@pytest.mark.parametrize("time", [1, 5, 63, 100, 300])
@pytest.mark.parametrize("strength", [0.0, 0.1, 100.0])
def test_values_and_gradients(kinds, time, strength):
    args, want_args = (
        leaves(draw(time, kinds, strength=strength)),
        leaves(draw(time, kinds, strength=strength)),
    )
    got = linear_attn(*args[:5], state=args[5], scale=0.3)
    want = spec.linear_attn(*want_args[:5], state=want_args[5], scale=0.3)
    weights = [torch.randn_like(x) for x in want]
    for out in (got, want):
        sum((x * w).sum() for x, w in zip(out, weights, strict=True)).backward()
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12
    for name, a, b in zip(("q", "k", "v", "gk", "gv", "state"), args, want_args, strict=True):
        if a is not None:
            assert (a.grad - b.grad).abs().max() < 1e-10 * (1 + b.grad.abs().max()), name


@pytest.mark.parametrize("kinds", [("head", None), ("channel", None), (None, "channel")])
def test_fp32(kinds):
    exact = draw(2000, kinds, strength=0.05)
    got = linear_attn(*[x if x is None else x.float() for x in exact[:5]])
    want = spec.linear_attn(*exact[:5])
    assert max(error(a.double(), b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounding_alone(dtype):
    args = [x if x is None else x.to(dtype) for x in draw(200, ("channel", None), strength=0.1)]
    o, state = linear_attn(*args[:3], args[3].float())
    exact, exact_state = spec.linear_attn(*[x.double() for x in args[:4]])
    assert o.dtype == dtype and state.dtype == torch.float32
    assert error(o.double(), exact) < torch.finfo(dtype).eps
    assert error(state.double(), exact_state) < 1e-5


@pytest.mark.parametrize("kinds", DECAYS)
def test_split_is_whole_is_stepwise(kinds):
    q, k, v, gk, gv, state = draw(150, kinds)
    whole, final = linear_attn(q, k, v, gk, gv, state=state)
    parts, carried = [], state
    for span in (slice(0, 70), slice(70, 149)):
        part = [x if x is None else x[:, span] for x in (q, k, v, gk, gv)]
        o, carried = linear_attn(*part, state=carried)
        parts.append(o)
    token = [x if x is None else x[:, 149] for x in (q, k, v, gk, gv)]
    o, carried = linear_attn_step(*token, state=carried)
    assert error(torch.cat([*parts, o[:, None]], 1), whole) < 1e-12
    assert error(carried, final) < 1e-12


@pytest.mark.parametrize("kinds", DECAYS)
def test_packed_is_separate(kinds):
    bounds = torch.tensor([0, 15, 15, 100, 170], dtype=torch.int32)
    args = leaves(draw(170, kinds, batch=1)[:5]) + leaves([draw(1, batch=4)[5]])
    want_args = leaves(args)
    o, final = linear_attn(*args[:5], state=args[5], cu_seqlens=bounds)
    pieces = [
        spec.linear_attn(
            *[x if x is None else x[:, a:b] for x in want_args[:5]], state=want_args[5][i : i + 1]
        )
        for i, (a, b) in enumerate(itertools.pairwise(bounds.tolist()))
    ]
    want = torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces])
    assert error(o, want[0]) < 1e-12 and error(final, want[1]) < 1e-12
    (o.square().sum() + final.square().sum()).backward()
    (want[0].square().sum() + want[1].square().sum()).backward()
    for a, b in zip(args, want_args, strict=True):
        if a is not None:
            assert (a.grad - b.grad).abs().max() < 1e-10 * (1 + b.grad.abs().max())


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
@pytest.mark.parametrize("kinds", [(None, None), ("head", None), ("channel", "channel")])
def test_opcheck(kinds, device):
    suffix = "_cuda" if device == "cuda" else ""
    forward, backward = (
        getattr(torch.ops.flacompile, f"linear_attn_{name}{suffix}").default
        for name in ("forward", "backward")
    )
    args = [
        x if x is None else x.to(device) for x in draw(70, kinds, dtype=torch.float32, strength=0.1)
    ]
    torch.library.opcheck(forward, (*leaves(args), None, 0.4))
    o, final = linear_attn(*args[:5], state=args[5])
    torch.library.opcheck(backward, (*args, None, 0.4, o, final, o, final))


def test_compiled_equals_eager():
    def loss(q, k, v, gk, state):
        o, final = linear_attn(q, k, v, gk, state=state)
        return o.square().sum() + final.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for time in (50, 77, 200):
        q, k, v, gk, _, state = draw(time, ("head", None), dtype=torch.float32)
        eager_args, args = leaves([q, k, v, gk, state]), leaves([q, k, v, gk, state])
        loss(*eager_args).backward()
        compiled(*args).backward()
        assert max(error(a.grad, b.grad) for a, b in zip(args, eager_args, strict=True)) < 1e-5


def test_autocast_keeps_states_and_sums_in_fp32():
    q, k, v, g, _, state = leaves(draw(70, ("channel", None), dtype=torch.float32, strength=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        o, final = linear_attn(q, k, v, g, state=state)
        o2, _ = linear_attn(q, k, v, g, state=final)
        (o.float().sum() + o2.float().sum()).backward()
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    low = [x.detach().bfloat16().float() for x in (q, k, v)]
    exact, exact_final = spec.linear_attn(*low, g, state=state)
    assert error(final, exact_final) < 1e-5
    assert error(o.float(), exact) < torch.finfo(torch.bfloat16).eps
    assert g.grad.dtype == torch.float32 and g.grad.isfinite().all()


def test_linear_in_time():
    """A quadratic form would hold 2^31 pairs here."""
    q = torch.randn(1, 2**15 + 3, 1, 8)
    o, _ = linear_attn(q, q, q, -torch.rand(1, 2**15 + 3, 1, 8))
    assert o.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 9, 2)}, "q: expected shape"),
        ({"k": torch.zeros(2, 9, 2, 7)}, "k: expected shape"),
        ({"v": torch.zeros(2, 8, 2, 10)}, "v: expected shape"),
        ({"v": torch.zeros(2, 9, 2, 10).half()}, "v: expected the dtype of q"),
        ({"q": torch.zeros(2, 9, 2, 6, dtype=torch.long)}, "q: expected a floating dtype"),
        ({"gk": torch.zeros(2, 9, 6)}, "gk: expected shape"),
        ({"gk": torch.full((2, 9, 2), 0.5)}, "gk must be a log decay <= 0"),
        ({"gv": torch.full((2, 9, 2, 10), 0.5)}, "gv must be a log decay <= 0"),
        ({"state": torch.zeros(2, 2, 10, 6)}, "state: expected shape"),
        ({"state": torch.zeros(2, 2, 6, 10).half()}, "state: expected torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "q: expected a batch of 1"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens: expected int32 or int64"),
        ({"k": torch.zeros(2, 9, 2, 6, device="meta")}, "k: expected the device of q"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v, *_ = draw(9, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_attn(**{"q": q, "k": k, "v": v, **change})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kinds", [(None, None), ("head", None), ("channel", "channel")])
def test_triton_route_gives_the_same_gradients(kinds, packed, device):
    """What the CUDA op runs, forward and backward: in the interpreter without a GPU."""
    q, k, v, gk, gv, state = draw(40, kinds, batch=1, dtype=torch.float32, strength=0.1)
    bounds = torch.tensor([0, 17, 17, 40], device=device) if packed else None
    state = torch.randn(3, *state.shape[1:]) if packed else state
    args = [x if x is None else x.to(device) for x in (q, k, v, gk, gv, state)]
    o, final = module._forward_cuda(*args, bounds, 0.4)
    do, dfinal = torch.randn_like(o), torch.randn_like(final)
    got = module._backward_cuda(*args, bounds, 0.4, o, final, do, dfinal)
    wide = leaves([x if x is None else x.double().cpu() for x in args])
    cpu_bounds = None if bounds is None else bounds.cpu()
    want_o, want_final = linear_attn(*wide[:5], state=wide[5], scale=0.4, cu_seqlens=cpu_bounds)
    loss = (want_o * do.double().cpu()).sum() + (want_final * dfinal.double().cpu()).sum()
    loss.backward()
    assert error(o.double().cpu(), want_o) < 1e-5
    for name, a, b in zip(("q", "k", "v", "gk", "gv", "state"), got, wide, strict=True):
        if b is not None:
            assert error(a.double().cpu(), b.grad) < 1e-4, name
