"""The Triton kernels of conv against the token loop in float64, values and gradients."""

import itertools

import pytest
import torch
from op_cases import error, leaves

from flacompile.ops import spec
from flacompile.ops.kernels.conv import RUN, conv_backward, conv_forward

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
BOUNDS = [0, 1, 20, 20, 22, 90]  # sequences shorter than a filter, an empty one, one of two blocks


def draw(device, taps, channels, rows, time, sequences, dtype=torch.float32):
    """x, weight, bias, state, dy, dfinal."""
    generator = torch.Generator().manual_seed(taps)
    tokens, past = (rows, time, channels), (sequences, taps - 1, channels)
    shapes = (tokens, (channels, taps), (channels,), past, tokens, past)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def truth(x, weight, bias, state, dy, dfinal, bounds=None):
    """y, final, dx, dweight, dbias, dstate by the loop in float64, sequence by sequence."""
    args = leaves([i.double() for i in (x, weight, bias, state)])
    x, weight, bias, state = args
    parts, whole = [], [(0, x.shape[1])]
    for i, (first, last) in enumerate(whole if bounds is None else itertools.pairwise(bounds)):
        past = state if bounds is None else state[i : i + 1]
        parts.append(spec.conv(x[:, first:last], weight, bias, past))
    y, final = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    loss = (y * dy.double()).sum() + (final * dfinal.double()).sum()
    return [y, final, *torch.autograd.grad(loss, args, materialize_grads=True)]


def kernels(x, weight, bias, state, dy, dfinal, cu_seqlens=None):
    y, final = conv_forward(x, weight, bias, state, cu_seqlens)
    return [y, final, *conv_backward(x, weight, bias, state, cu_seqlens, dy, dfinal)]


def check(args, bounds=None, index=torch.int64):
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=index).to(args[0].device)
    got, want = kernels(*args, cu_seqlens), truth(*args, bounds)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert error(a, b) < TOLERANCE[args[0].dtype], i
    return got


@pytest.mark.parametrize("taps", range(1, 9))
@pytest.mark.parametrize("time", [0, 1, 5, 63, 100])
def test_taps(device, taps, time):
    check(draw(device, taps, 6, 2, time, 2))


@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed(device, taps, index):
    check(draw(device, taps, 6, 1, BOUNDS[-1], len(BOUNDS) - 1), BOUNDS, index)


@pytest.mark.parametrize("bounds", [None, [0, RUN - 2, RUN + 1, RUN + 1, 2 * RUN + 6]])
def test_more_than_one_run(device, bounds):
    """Taps and sequences across its end, and a second row that starts a run."""
    rows, sequences = (2, 2) if bounds is None else (1, len(bounds) - 1)
    check(draw(device, 4, 6, rows, 2 * RUN + 6 if bounds else RUN + 6, sequences), bounds)


@pytest.mark.parametrize("channels", [1, 64, 100, 130])
def test_channels(device, channels):
    check(draw(device, 4, channels, 2, 40, 2))


@pytest.mark.parametrize("packed", [False, True])
def test_fp16(device, packed):
    rows, sequences = (1, len(BOUNDS) - 1) if packed else (3, 3)
    args = draw(device, 4, 70, rows, BOUNDS[-1], sequences, torch.float16)
    got = check(args, BOUNDS if packed else None)
    assert [x.dtype for x in got] == [torch.float16] * 6


def test_memory_may_be_strided(device):
    args = draw(device, 3, 20, 3, 30, 3)
    check([x.mT.contiguous().mT if x.ndim > 1 else x for x in args])


def test_runs_are_bit_equal(device):
    args = draw(device, 4, 70, 2, 300, 2)
    assert all(torch.equal(a, b) for a, b in zip(kernels(*args), kernels(*args), strict=True))
