"""Every op of ``OPS`` against its token loop and the op contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_cases import (
    OPS,
    Draw,
    error,
    function,
    gradients,
    leaves,
    loop,
    rounded,
    step,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

from flacompile.passes.decompose import decompose

CASES = [(name, variant) for name, op in OPS.items() for variant in op.variants]
over_cases = pytest.mark.parametrize(("name", "variant"), CASES)
FIRST = [  # linear_attn with heads that share q and k, and without
    (n, v) for n, o in OPS.items() for v in [*o.variants][: 2 if n == "linear_attn" else 1]
]
over_ops = pytest.mark.parametrize(("name", "variant"), FIRST)
over_graphs = pytest.mark.parametrize(  # of quadratic_attn a CPU compiles linear_attn
    ("name", "variant"), [case for case in FIRST if OPS[case[0]].on_cpu]
)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
over_devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])]
)


def draw(name, variant, time, *, batch=2, strength=1.0, dtype=torch.float64, device="cpu"):
    """The op's tensors and a state."""
    args = OPS[name].tensors(variant, Draw(batch, time, strength))
    return [x if x is None else x.to(device) for x in rounded(name, args, dtype)]


def call(name, args, **options):
    """The op on tensors and state."""
    return function(name)(*args[:-1], **OPS[name].options, state=args[-1], **options)


def truth(name, args):
    """The loop in float64."""
    wide = [x if x is None else x.double() for x in args]
    return loop(name)(*wide[:-1], **OPS[name].options, state=wide[-1])


def agree(name, got, want, bound):
    """Gradients alike: each to the size of the largest entry."""
    for key, a, b in zip((*OPS[name].names, "state"), got, want, strict=True):
        if b is not None and b.numel():
            assert a.shape == b.shape and a.isfinite().all(), key
            assert (a - b).abs().max() < bound * (1 + b.abs().max()), key


@over_cases
@pytest.mark.parametrize("time", [0, 1, 5, 63, 100, 300])
@pytest.mark.parametrize("strength", [0.0, 0.1, 100.0])
def test_values_and_gradients(name, variant, time, strength):
    args, want_args = (leaves(draw(name, variant, time, strength=strength)) for _ in range(2))
    got, want = call(name, args), truth(name, want_args)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12
    agree(name, gradients(got, args), gradients(want, want_args), 1e-10)


@over_cases
def test_fp32(name, variant):
    args = draw(name, variant, 2000, strength=0.05)
    got = call(name, rounded(name, args, torch.float32))
    assert max(error(a, b) for a, b in zip(got, truth(name, args), strict=True)) < 1e-5


@over_ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounding_alone(name, variant, dtype):
    args = draw(name, variant, 200, strength=0.1, dtype=dtype)
    (y, state), (exact, exact_state) = call(name, args), truth(name, args)
    assert y.dtype == dtype and state.dtype == args[-1].dtype
    assert error(y, exact) < torch.finfo(dtype).eps
    assert error(state, exact_state) < 1e-5


@over_cases
def test_split_is_whole_is_stepwise(name, variant):
    args = draw(name, variant, 150)
    whole, final = call(name, args)
    parts, carried = [], args[-1]
    for span in (slice(0, 70), slice(70, 149)):
        y, carried = call(name, [*tokens(name, args[:-1], span), carried])
        parts.append(y)
    token = tokens(name, args[:-1], 149)
    y, carried = step(name)(*token, **OPS[name].options, state=carried)
    assert error(torch.cat([*parts, y[:, None]], 1), whole) < 1e-12
    assert error(carried, final) < 1e-12


@over_cases
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_is_separate(name, variant, index):
    bounds = [0, 15, 15, 100, 101, 170]
    args = draw(name, variant, 170, batch=1)
    args[-1] = OPS[name].state(args, Draw(5, 170, 1.0))
    args, want_args = leaves(args), leaves(args)
    got = call(name, args, cu_seqlens=torch.tensor(bounds, dtype=index))
    pieces = [
        truth(name, [*tokens(name, want_args[:-1], slice(*span)), want_args[-1][i : i + 1]])
        for i, span in enumerate(itertools.pairwise(bounds))
    ]
    want = torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces])
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12
    agree(name, gradients(got, args), gradients(want, want_args), 1e-10)


@over_ops
def test_runs_are_bit_equal(name, variant):
    args = leaves(draw(name, variant, 100, dtype=torch.float32))
    runs = [(*(out := call(name, args)), *gradients(out, args)) for _ in range(2)]
    assert all(a is b or torch.equal(a, b) for a, b in zip(*runs, strict=True))


@over_ops
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_zero_and_huge_inputs_stay_finite(name, variant, size):
    args = draw(name, variant, 300, dtype=torch.float32)
    sized = {"q", "v", "x", "u", "state"}
    args = [
        x if key not in sized else x * size
        for key, x in zip((*OPS[name].names, "state"), args, strict=True)
    ]
    args = leaves(args)
    got = call(name, args)
    found = [*got, *(x for x in gradients(got, args) if x is not None)]
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize(
    ("name", "variant"), [(n, list(o.variants)[len(o.variants) // 2]) for n, o in OPS.items()]
)
def test_linear_in_time(name, variant):
    """A quadratic form would hold 2^30 pairs here, and states a token would be 2^15 of them.

    Gradients too, and decays of a token from none to less than e^-100.
    """
    args = OPS[name].tensors(variant, Draw(1, 2**15 + 3, 30.0))
    args = leaves(rounded(name, args, torch.float32))
    got = call(name, args)
    found = [*got, *(x for x in gradients(got, args) if x is not None)]
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("name", ["linear_attn", "delta_rule", "dplr", "selective_scan"])
def test_no_state_a_token(name):
    """Forward and backward hold nothing near as large as the states of all tokens would be."""
    variant, time = list(OPS[name].variants)[-1], 512
    args = OPS[name].tensors(variant, Draw(1, time, 0.1, 32, 32))
    args = leaves(rounded(name, args, torch.float32))
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients(call(name, args), args)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < time * args[-1].nbytes / 4


class Recorder(TorchDispatchMode):
    """Calls of ops of ours, with what came out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace == "flacompile":
            self.calls.append((op, args, out))
        return out


def recorded(name, args, **options):
    """Every call of an op of ours in a forward and backward."""
    args = leaves(args)
    with Recorder() as recorder:
        gradients(call(name, args, **options), args)
    return recorder.calls


@over_devices
@over_ops
def test_opcheck(name, variant, device):
    args = draw(name, variant, 70, strength=0.1, dtype=torch.float32, device=device)
    calls = recorded(name, args)
    assert len(calls) == 2  # one forward, one backward
    for op, inputs, _ in calls:
        inputs = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        if op is calls[0][0]:
            inputs = [
                x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for x in inputs
            ]
        torch.library.opcheck(op, tuple(inputs))


@over_cases
@pytest.mark.parametrize("packed", [False, True])
def test_triton_route_is_the_cpu_route(name, variant, packed, device, poisoned_empty):
    """Forward and backward of the CUDA op on what the CPU op was called with."""
    args = draw(name, variant, 40, batch=1, strength=0.1, dtype=torch.float32)
    options = {}
    if packed:
        options = {"cu_seqlens": torch.tensor([0, 17, 17, 40])}
        args[-1] = OPS[name].state(args, Draw(3, 40, 1.0)).float()
    for op, inputs, want in recorded(name, args, **options):
        on_cuda = getattr(torch.ops.flacompile, f"{op._schema.name.split('::')[1]}_cuda").default
        inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
        with torch.no_grad():
            got = on_cuda(*inputs)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert error(a, b) < 1e-4, (op, i)


@pytest.mark.gpu
@CUDA
@over_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 2])
def test_gpu(name, variant, dtype, size):
    """Values and gradients against the loop in float64, of sizes a model has."""
    op = OPS[name]
    args = rounded(name, op.tensors(variant, Draw(2, 300, 0.1, *op.sizes[size])), dtype)
    args = leaves([x if x is None else x.cuda() for x in args])
    wide = leaves([x if x is None else x.double() for x in args])
    got, want = call(name, args), truth(name, wide)
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 8e-3}[dtype]
    bound *= 1 if op.on_cpu else 2  # features in memory are rounded too
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < bound
    pairs = zip((*op.names, "state"), gradients(got, args), gradients(want, wide), strict=True)
    for key, a, b in pairs:
        assert b is None or error(a, b) < (10 * bound if key in op.decays else bound), key


@pytest.mark.gpu
@CUDA
@over_ops
def test_compiled_pack_equals_eager(name, variant):
    """Compilers take pointers for written that are not: bounds of a pack are saved for later."""
    torch._dynamo.reset()
    bounds = torch.tensor([0, 17, 17, 150], device="cuda")
    args = draw(name, variant, 150, batch=1, strength=0.1, dtype=torch.float32, device="cuda")
    args[-1] = OPS[name].state(args, Draw(3, 150, 1.0)).float().cuda()

    def loss(bounds, *args):
        y, final = call(name, args, cu_seqlens=bounds)
        return y.square().sum() + final.sum()

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        given = leaves(args)
        inputs = [x for x in given if x is not None]
        found.append(torch.autograd.grad(run(bounds, *given), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@over_devices
@over_graphs
def test_compiled_equals_eager(name, variant, device):
    torch._dynamo.reset()

    def loss(*args):
        y, final = call(name, args)
        return y.square().sum() + final.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for time in (50, 77, 200):
        args = draw(name, variant, time, strength=0.1, dtype=torch.float32, device=device)
        eager, args = leaves(args), leaves(args)
        given = [x for x in args if x is not None]
        found = torch.autograd.grad(compiled(*args), given)
        want = torch.autograd.grad(loss(*eager), [x for x in eager if x is not None])
        assert max(error(a, b) for a, b in zip(found, want, strict=True)) < 1e-5


@over_graphs
def test_export_keeps_one_node_and_opens_it(name, variant):
    """As an exporter sees it: one node, then aten alone, right at any B and T."""

    class Model(torch.nn.Module):
        def forward(self, args):
            return call(name, args)

    args = draw(name, variant, 200, strength=0.1, dtype=torch.float32)
    batch, time = torch.export.Dim("B", min=1), torch.export.Dim("T", min=1)
    shapes = [
        None if x is None else {} if key in OPS[name].weights else {0: batch, 1: time}
        for key, x in zip(OPS[name].names, args, strict=False)
    ]
    program = torch.export.export(
        Model(), (args,), dynamic_shapes=([*shapes, {0: batch}],), strict=False
    )
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(n.startswith("flacompile.") for n in names) == 1
    opened = decompose(program)
    assert not any("flacompile" in str(node.target) for node in opened.graph.nodes)
    model = opened.module(check_guards=False)  # the values are checked
    for rows, length in ((2, 200), (1, 1), (3, 50), (2, 64), (1, 65), (2, 129), (1, 1000)):
        args = draw(name, variant, length, batch=rows, strength=0.1, dtype=torch.float32)
        for a, b in zip(model(args), call(name, args), strict=True):
            assert error(a, b) < 1e-5, (rows, length)


@over_ops
def test_autocast_keeps_states_and_sums_in_fp32(name, variant):
    args = leaves(draw(name, variant, 70, strength=0.1, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y, final = call(name, args)
        found = gradients((y, final), args)
    assert y.dtype == torch.bfloat16
    assert final.dtype == (torch.bfloat16 if name == "conv" else torch.float32)
    low = rounded(
        name,
        rounded(name, [x if x is None else x.detach() for x in args], torch.bfloat16),
        torch.float32,
    )
    exact, exact_final = truth(name, low)
    assert error(y, exact) < torch.finfo(torch.bfloat16).eps
    assert error(final, exact_final) < (1e-2 if name == "conv" else 1e-5)
    assert all(x is None or (x.dtype == torch.float32 and x.isfinite().all()) for x in found)


@over_ops
def test_bad_input_is_named(name, variant):
    op, args = OPS[name], draw(name, variant, 9, dtype=torch.float32)
    named = dict(zip((*op.names, "state"), args, strict=True))
    first = op.names[0]
    bad = [(key, x[..., 0]) for key, x in named.items() if x is not None]
    bad += [(key, x.long()) for key, x in named.items() if x is not None]
    bad += [(key, x.to("meta")) for key, x in named.items() if x is not None and key != first]
    bad += [
        (key, x.abs() + 0.5)
        for key, x in named.items()
        if key in op.decays and key[0] == "g" and x is not None
    ]
    bad += [("state", args[-1][:1]), ("cu_seqlens", torch.tensor([0.0, 9.0]))]
    for key, x in bad:
        given = {**named, key: x, "state": x if key == "state" else None}
        with pytest.raises(ValueError) as raised:
            function(name)(**given, **op.options)
        assert str(raised.value).split(":")[0].split()[0] in (key, first), (key, raised.value)
        assert key in str(raised.value), (key, raised.value)
    with pytest.raises(ValueError, match="a batch of 1"):
        function(name)(**{**named, "state": None}, **op.options, cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("v", (1, 9, 5, 4), "v: expected heads by the 2 of q, got 5"),
        ("k", (1, 9, 3, 4), r"k: expected shape \(1, 9, 2, 4\), got \(1, 9, 3, 4\)"),
        ("gk", (1, 9, 2), r"gk: expected shape \(1, 9, 6\) where heads share q and k, got"),
        ("gk", (1, 9, 6, 4), r"gk: expected shape \(1, 9, 6\) where heads share q and k, got"),
        ("gv", (1, 9, 6, 4), r"gv: expected shape \(1, 9, 6\) where heads share q and k, got"),
        ("state", (1, 2, 4, 4), r"state: expected shape \(1, 6, 4, 4\), got \(1, 2, 4, 4\)"),
    ],
)
def test_heads_that_share_q_and_k(key, shape, message):
    q = torch.ones(1, 9, 2, 4)
    named = {"q": q, "k": q, "v": torch.ones(1, 9, 6, 4), key: -torch.ones(shape)}
    with pytest.raises(ValueError, match=message):
        function("linear_attn")(**named)
