"""The Triton kernels of linear_attn against the token loop in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from flacompile.ops import spec
from flacompile.ops.kernels import linear_attn as kernels
from flacompile.ops.kernels.linear_attn import linear_attn_forward

pytestmark = pytest.mark.usefixtures("poisoned_empty")

KINDS = [None, "head", "channel"]
DECAYS = list(itertools.product(KINDS, KINDS))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
H = 2


def draw(device, time, kinds, K=16, V=24, *, batch=2, state=True, strength=1.0, dtype=None):
    """q, k, v, gk, gv, state, in fp32 or with q, k, v in dtype."""
    generator = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def decay(kind, dim):
        if kind is None:
            return None
        shape = (batch, time, H) if kind == "head" else (batch, time, H, dim)
        return -strength * normal(*shape).abs()

    q, k, v = (normal(batch, time, H, dim).to(dtype) for dim in (K, K, V))
    return [
        q,
        k,
        v,
        decay(kinds[0], K),
        decay(kinds[1], V),
        normal(batch, H, K, V) if state else None,
    ]


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item() if want.numel() else 0.0


def reference(args, reverse):
    q, k, v, gk, gv, state = [x if x is None else x.double() for x in args]
    return spec.linear_attn(q, k, v, gk, gv, 0.3, state, reverse)


def check(args, reverse, tolerance=None):
    *tensors, state = args
    o, final = linear_attn_forward(*tensors, state, None, 0.3, reverse)
    want_o, want_final = reference(args, reverse)
    tolerance = tolerance or TOLERANCE[args[2].dtype]
    assert o.dtype == args[2].dtype and final.dtype == torch.float32
    assert error(o, want_o) < tolerance
    assert error(final, want_final) < tolerance
    return o, final


@pytest.mark.parametrize("kinds", DECAYS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", [1, 15, 63])
def test_decays(device, kinds, reverse, time):
    check(draw(device, time, kinds), reverse)


@pytest.mark.parametrize("kinds", [("head", None), ("channel", "head"), ("channel", "channel")])
@pytest.mark.parametrize(
    ("time", "K", "V", "state"),
    [(0, 16, 24, True), (16, 40, 16, False), (100, 40, 16, True), (17, 8, 80, True)],
)
def test_sizes(device, kinds, time, K, V, state):
    check(draw(device, time, kinds, K, V, batch=1, state=state), time % 2 == 0)


def test_largest_key_dim(device):
    check(draw(device, 40, ("head", None), 256, 64, batch=1), False)
    check(draw(device, 20, ("channel", "channel"), 200, 40, batch=1), True)


@pytest.mark.parametrize("kinds", DECAYS[1:])
@pytest.mark.parametrize("reverse", [False, True])
def test_strong_decay_does_not_blur_the_weak_ones_after_it(device, kinds, reverse):
    args = draw(device, 40, kinds, strength=0.01)
    for g in (args[3], args[4]):
        if g is not None:
            g[:, ::9] = -100.0
            g[:, 4::9] = 0.0
            g[:, 14] = -torch.inf
    check(args, reverse)


@pytest.mark.parametrize("strength", [0.0, 100.0])
@pytest.mark.parametrize("kinds", [("head", "head"), ("channel", "channel")])
def test_no_and_total_decay(device, kinds, strength):
    check(draw(device, 63, kinds, strength=strength), False)


@pytest.mark.parametrize("kinds", [(None, None), ("head", "channel"), ("channel", None)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_is_separate(device, kinds, reverse, index):
    bounds = [0, 20, 20, 21, 63]  # the second sequence is empty
    q, k, v, gk, gv, _ = draw(device, 63, kinds, batch=1)
    state = draw(device, 1, kinds, batch=4)[5]
    cu_seqlens = torch.tensor(bounds, dtype=index, device=device)
    o, final = linear_attn_forward(q, k, v, gk, gv, state, cu_seqlens, 0.3, reverse)
    for n, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = [x if x is None else x[:, first:last] for x in (q, k, v, gk, gv)]
        want_o, want_final = reference([*part, state[n : n + 1]], reverse)
        assert error(o[:, first:last], want_o) < TOLERANCE[torch.float32]
        assert error(final[n : n + 1], want_final) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kinds", DECAYS[:1] + DECAYS[3::2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 70, 70, 75]])
def test_segments_are_the_whole(device, monkeypatch, kinds, reverse, bounds):
    args = draw(device, 75, kinds, batch=1 if bounds else 2, strength=0.1)
    args[5] = draw(device, 1, kinds, batch=3 if bounds else 2)[5]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    whole = linear_attn_forward(*args, cu_seqlens, 0.3, reverse)
    monkeypatch.setattr(kernels, "SHORTEST", 20)
    assert kernels.num_segments(4, 75) == 3
    cut = linear_attn_forward(*args, cu_seqlens, 0.3, reverse)
    assert all(error(a, b) < TOLERANCE[torch.float32] for a, b in zip(cut, whole, strict=True))


@pytest.mark.parametrize("kinds", [("head", None), ("channel", "channel")])
@pytest.mark.parametrize("reverse", [False, True])
def test_fp16(device, kinds, reverse):
    check(draw(device, 63, kinds, dtype=torch.float16), reverse)


def test_dtypes_may_differ_and_memory_may_be_strided(device):
    args = draw(device, 33, ("head", "channel"), dtype=torch.float16)
    args[2] = args[2].float()
    for i in (0, 2, 3, 5):
        args[i] = args[i].transpose(0, 1).contiguous().transpose(0, 1)
    check(args, False, TOLERANCE[torch.float32])
    *tensors, state = args
    o, _ = linear_attn_forward(*tensors, state, None, 0.3, False, out_dtype=torch.float16)
    assert o.dtype == torch.float16
    assert error(o, reference(args, False)[0]) < TOLERANCE[torch.float16]


def test_runs_are_bit_equal(device):
    args = draw(device, 40, ("channel", None))
    runs = [check(args, False) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("capability", "is_hopper"),
    [((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)],
)
def test_large_tiles_are_for_large_shared_memory(monkeypatch, capability, is_hopper):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.is_hopper(torch.device("cuda")) == is_hopper


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kinds", DECAYS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gpu(kinds, reverse, K, dtype):
    check(draw("cuda", 300, kinds, K, 128, dtype=dtype, strength=0.1), reverse)
