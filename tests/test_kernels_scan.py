"""The Triton kernels of scan and selective_scan over several blocks of tokens, against the loop."""

import itertools

import pytest
import torch
from op_cases import OPS, Draw, error, gradients, leaves, loop, rounded, tokens

from flacompile.ops.kernels import linear_attn as linear_attn_kernels
from flacompile.ops.kernels import scan as scan_kernels
from flacompile.ops.kernels import selective_scan as selective_kernels
from flacompile.ops.selective_scan import SPAN, _starts_shape

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
BOUNDS = [0, 20, 20, 21, 70]  # the second sequence is empty
over_ops = pytest.mark.parametrize(
    ("name", "variant"), [("scan", "plain"), ("selective_scan", "2 groups")]
)


def draw(name, variant, time, device, *, dtype=torch.float32, batch=2, sequences=None):
    """The op's tensors and a state, two channels a group and few states."""
    case = Draw(batch, time, 0.1, 4, 4)
    args = OPS[name].tensors(variant, case)
    args[-1] = OPS[name].state(args, case, sequences)
    return [x.to(device) for x in rounded(name, args, dtype)]


def run(name, args, cu_seqlens=None):
    """y, the final state, and the gradients of ``gradients`` by the kernels."""
    *inputs, state = args
    if name == "scan":
        outputs = scan_kernels.scan_forward(*inputs, state, cu_seqlens)
        inputs, saved = [inputs[0], state], [outputs[0]]
        backward, options = scan_kernels.scan_backward, ()
    else:
        starts = state.new_empty(_starts_shape(inputs[0], state, cu_seqlens, SPAN))
        outputs = selective_kernels.selective_scan_forward(*inputs, state, cu_seqlens, starts, SPAN)
        backward, saved, options = selective_kernels.selective_scan_backward, [starts], (SPAN,)
    given = leaves(outputs)
    return outputs, backward(*inputs, cu_seqlens, *saved, *gradients(given, given), *options)


def check(name, args, got, bounds=None):
    """Everything against the loop in float64, sequence by sequence."""
    exact = leaves([x.double().cpu() for x in args])
    spans = [(slice(None), slice(None))] if bounds is None else []
    for n, span in enumerate(itertools.pairwise(bounds or [])):
        spans.append((slice(n, n + 1), slice(*span)))
    found = [
        loop(name)(*tokens(name, exact[:-1], span), state=exact[-1][rows]) for rows, span in spans
    ]
    want = torch.cat([y for y, _ in found], 1), torch.cat([state for _, state in found])
    bound = TOLERANCE[args[-2].dtype]
    for a, b in zip((*got[0], *got[1]), (*want, *gradients(want, exact)), strict=True):
        assert error(a, b) < bound


@over_ops
@pytest.mark.parametrize("time", [0, 1, 16, 70])
def test_blocks(name, variant, time, device):
    args = draw(name, variant, time, device)
    check(name, args, run(name, args))


@over_ops
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_is_separate(name, variant, index, device):
    args = draw(name, variant, BOUNDS[-1], device, batch=1, sequences=len(BOUNDS) - 1)
    got = run(name, args, torch.tensor(BOUNDS, dtype=index, device=device))
    check(name, args, got, BOUNDS)


@over_ops
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_segments(name, variant, bounds, device, monkeypatch):
    """Of 24 or 32 tokens; those of a pack end inside one, and some sequences have none in one."""
    args = draw(name, variant, 70, device, batch=1, sequences=bounds and len(bounds) - 1)
    for tile in ("FORWARD", "BACKWARD"):
        sizes = {**getattr(scan_kernels, tile), "ROWS": 16, "STRIPS": 2}
        monkeypatch.setattr(scan_kernels, tile, sizes)
    monkeypatch.setattr(linear_attn_kernels, "SHORTEST", 20)
    if name == "scan":
        tile = scan_kernels.tiles(4, torch.float32, sizes)
        sizes = scan_kernels.cut(4, 70, 4, tile, device)[1]
    else:
        tile = selective_kernels.tiles(2, 4, selective_kernels.FORWARD)
        sizes = selective_kernels._cut(args[1], args[2], 2, 4, SPAN, tile)[1]
    assert sizes == ((24, 3) if name == "scan" else (32, 3))
    check(name, args, run(name, args, bounds and torch.tensor(bounds, device=device)), bounds)


@over_ops
def test_fp16(name, variant, device):
    args = draw(name, variant, 40, device, dtype=torch.float16)
    got = run(name, args)
    assert got[0][0].dtype == torch.float16 and got[0][1].dtype == torch.float32
    check(name, args, got)


@over_ops
def test_strong_and_no_decay(name, variant, device):
    args = draw(name, variant, 70, device)
    decay = args[0] if name == "scan" else args[1]
    decay[:, ::9], decay[:, 4::9] = -100.0 if name == "scan" else 100.0, 0.0
    check(name, args, run(name, args))


@over_ops
def test_strided_memory_and_bit_equal_runs(name, variant, device):
    args = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in draw(name, variant, 33, device)]
    runs = [run(name, args) for _ in range(2)]
    check(name, args, runs[0])
    for a, b in zip(*([*outputs, *found] for outputs, found in runs), strict=True):
        assert torch.equal(a, b)
