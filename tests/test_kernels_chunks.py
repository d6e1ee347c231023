"""The kernels that go by chunks, outputs and every gradient, against the token loop in float64."""

import itertools

import pytest
import torch
from op_cases import (
    OPS,
    Draw,
    error,
    gradients,
    leaves,
    loop,
    rounded,
    tokens,
    weighting,
)

from flacompile.ops.kernels import linear_attn, shared_heads, walk

pytestmark = pytest.mark.usefixtures("poisoned_empty")

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="interpreted bf16 is wrong")
GPU = (pytest.mark.gpu, NO_CUDA)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DECAYS = {
    "linear_attn": ["None-None", "head-None", "channel-None", "2 groups"],
    "delta_rule": ["None", "head", "channel"],
    "dplr": ["None", "head", "channel"],
}
OF_VALUES = [("linear_attn", kind) for kind in ("None-channel", "head-channel")]
over_cases = pytest.mark.parametrize(
    ("name", "variant"),
    [(name, kind) for name, kinds in DECAYS.items() for kind in kinds] + OF_VALUES,
)
over_kernels = pytest.mark.parametrize(  # dplr has one for every kind of decay
    ("name", "variant"),
    [(n, kind) for n, kinds in DECAYS.items() for kind in kinds[2 if n == "dplr" else 0 :]],
)
over_strong = pytest.mark.parametrize(
    ("name", "variant"),
    [(n, kind) for n, kinds in DECAYS.items() for kind in kinds[2 if n == "dplr" else 1 :]]
    + OF_VALUES[:1],
)
over_channels = pytest.mark.parametrize(
    ("name", "variant"), [(name, kinds[2]) for name, kinds in DECAYS.items()]
)


def draw(name, variant, time, K=16, V=24, *, device, batch=1, strength=0.1, dtype=torch.float32):
    """The op's tensors and a state."""
    args = OPS[name].tensors(variant, Draw(batch, time, strength, K, V))
    return [x if x is None else x.to(device) for x in rounded(name, args, dtype)]


def truth(name, args, bounds):
    """Outputs of the loop, sequence by sequence, and gradients of their weighting."""
    wide = leaves([x if x is None else x.double() for x in args])
    states = wide[-1].split(1) if bounds else [wide[-1]]
    spans = itertools.pairwise(bounds or [0, args[0].shape[1]])
    parts = [
        loop(name)(*tokens(name, wide[:-1], slice(*span)), **OPS[name].options, state=state)
        for span, state in zip(spans, states, strict=True)
    ]
    o, final = zip(*parts, strict=True)
    outputs = torch.cat(o, 1), torch.cat(final)
    return outputs, gradients(outputs, wide)


def run(name, args, bounds=None):
    """Outputs of the kernels, and gradients of their weighting."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=args[0].device)
    inputs, ops = (*args, cu_seqlens, *OPS[name].options.values()), torch.ops.flacompile
    with torch.no_grad():
        o, final, *u = getattr(ops, f"{name}_forward_cuda")(*inputs)
        seeds = weighting((o, final))
        return (o, final), getattr(ops, f"{name}_backward_cuda")(*inputs, *u, final, *seeds)


def check(name, args, bounds=None):
    outputs, found = run(name, args, bounds)
    want_outputs, want = truth(name, args, bounds)
    tolerance = TOLERANCE[args[0].dtype]
    for key, x, like, y in zip(
        ("o", "final"), outputs, (args[2], args[-1]), want_outputs, strict=True
    ):
        assert x.dtype == like.dtype and error(x, y) < tolerance, key
    for key, x, like, y in zip((*OPS[name].names, "state"), found, args, want, strict=True):
        if like is None:
            assert not x.numel(), key
        else:
            assert x.dtype == like.dtype and error(x, y) < tolerance, key
    return *outputs, *found


@over_cases
@pytest.mark.parametrize(("time", "K", "V"), [(0, 16, 24), (1, 40, 16), (20, 80, 24), (33, 8, 40)])
def test_sizes(device, name, variant, time, K, V):
    check(name, draw(name, variant, time, K, V, device=device))


@over_channels
def test_large_states(device, name, variant):
    check(name, draw(name, variant, 20, 40, 152, device=device))
    check(name, draw(name, variant, 20, 136, 16, device=device))


@pytest.mark.parametrize("variant", DECAYS["linear_attn"][:3])
def test_odd_widths(device, variant):
    """Rows that begin anywhere, and one value more than a tile has."""
    check("linear_attn", draw("linear_attn", variant, 20, 21, 129, device=device))


@over_cases
def test_packed_is_separate(device, name, variant):
    bounds = [0, 0, 20, 20, 21, 40]  # the first and the third sequence are empty
    args = draw(name, variant, bounds[-1], device=device)
    args[-1] = draw(name, variant, 1, batch=len(bounds) - 1, device=device)[-1]
    check(name, args, bounds)


@over_kernels
@pytest.mark.parametrize("bounds", [None, [0, 50, 50, 63]])
def test_segments(device, monkeypatch, name, variant, bounds):
    args = draw(name, variant, 63, 16, 16, device=device)
    args[-1] = draw(name, variant, 1, 16, 16, batch=3 if bounds else 1, device=device)[-1]
    monkeypatch.setattr(linear_attn, "SHORTEST", 20)
    assert linear_attn.num_segments(6, 63, walk.FEWEST) == 3
    check(name, args, bounds)


@pytest.mark.parametrize(("programs", "parts"), [(1, 1), (9, 2)])
def test_heads_of_a_group_in_parts(device, monkeypatch, programs, parts):
    """A program sums over all three heads of a group, or over two where another has the third."""
    monkeypatch.setattr(shared_heads, "PROGRAMS", programs)
    assert shared_heads.parts_of(4, 3) == parts
    check("linear_attn", draw("linear_attn", "2 groups", 40, 16, 16, device=device))


@over_strong
def test_strong_decay(device, name, variant):
    """Of every channel, too strong to be factored over a chunk."""
    check(name, draw(name, variant, 20, 16, 16, strength=5.0, device=device))


@over_strong
def test_strong_decay_does_not_blur_the_weak_ones_after_it(device, name, variant):
    """Neither of its chunk nor of the chunks after it, which are factored."""
    args = draw(name, variant, 40, 16, 16, strength=0.01, device=device)
    g = args[4] if args[3] is None else args[3]
    g[:, :10:9], g[:, 4], g[:, 14] = -100.0, 0.0, -torch.inf
    check(name, args)


@over_kernels
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=GPU)])
@pytest.mark.parametrize("strength", [0.1, 5.0])
def test_sixteen_bits(device, name, variant, dtype, strength):
    check(name, draw(name, variant, 40, 16, 16, strength=strength, dtype=dtype, device=device))


@pytest.mark.parametrize("name", ["delta_rule", "dplr"])
def test_equal_directions(device, name):
    """The powers of such a matrix are of 10^4, its inverse is of ones."""
    args = draw(name, "None", 40, device=device)
    written = {"delta_rule": 1, "dplr": 5}[name]
    args[written] = args[written][:, :1].expand_as(args[written])
    if name == "dplr":
        args[4] = -args[5]
    check(name, args)


@over_channels
def test_memory_may_be_strided_and_runs_are_bit_equal(device, name, variant):
    args = draw(name, variant, 20, batch=2, device=device)
    strided = [x if x is None else x.mT.contiguous().mT for x in args]
    runs = [check(name, x) for x in (args, strided)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
