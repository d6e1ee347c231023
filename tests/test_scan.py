"""scan and selective_scan on the CPU: what the table of all ops does not ask."""

import itertools

import pytest
import torch
from op_cases import error, gradients, leaves
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flacompile.ops import scan, selective_scan, spec
from flacompile.ops.pairs import scan_, scan_chunks

LENGTHS = [*range(1, 18), 64, 100, 1000]


def draw(time, *, groups=2):
    """u, dt, A, B, C, state with D 6, N 3, in float64."""
    generator = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, dt, A = normal(2, time, 6), normal(2, time, 6).abs(), -normal(6, 3).exp()
    return [u, dt, A, normal(2, time, groups, 3), normal(2, time, groups, 3), normal(2, 6, 3)]


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
def test_pairs(time, reverse):
    links, x = torch.rand(2, time - 1, 3).double(), torch.randn(2, time, 3).double()
    want = x.clone()
    steps = range(1, time)
    for t in (time - 1 - i for i in steps) if reverse else steps:
        near = t + 1 if reverse else t - 1
        want[:, t] += links[:, min(t, near)] * want[:, near]
    assert error(scan_(links, x, reverse), want) < 1e-14


@pytest.mark.parametrize("time", LENGTHS)
def test_chunks(time):
    g, x = -torch.rand(2, time, 3).double(), torch.randn(2, time, 3).double()
    state = torch.randn(2, 3).double()
    for got, want in zip(scan_chunks(g, x, state), spec.scan(g, x, state), strict=True):
        assert error(got, want) < 1e-14


def test_strong_decays_blur_nothing_after_them():
    g = -0.01 * torch.rand(1, 300, 4, dtype=torch.float64)
    g[:, ::9], g[:, 4::9], g[:, 14::50] = -100.0, 0.0, -torch.inf
    x, state = torch.randn(1, 300, 4).double(), torch.randn(1, 4).double()
    args, exact = leaves([g.float(), x.float(), state.float()]), leaves([g, x, state])
    got, want = scan(*args[:2], state=args[2]), spec.scan(*exact)
    for a, b in itertools.chain(
        zip(got, want, strict=True),
        zip(gradients(got, args), gradients(want, exact), strict=True),
    ):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("dt", [0.0, 100.0])
def test_steps_of_zero_and_of_total_decay(dt):
    u, _, A, B, C, state = draw(100)
    dt, A = torch.full_like(u, dt), A.clamp(max=-1.0)
    args, exact = leaves([u, dt, A, B, C, state]), leaves([u, dt, A, B, C, state])
    got, want = selective_scan(*args[:5], state=args[5]), spec.selective_scan(*exact)
    for a, b in itertools.chain(
        zip(got, want, strict=True),
        zip(gradients(got, args), gradients(want, exact), strict=True),
    ):
        assert (a - b).abs().max() < 1e-12 * (1 + b.abs().max())


def test_an_overflow_stays_in_its_sequence():
    x = torch.randn(1, 40, 3)
    x[:, 7] = torch.inf
    bounds = torch.tensor([0, 20, 40])
    h, final = scan(-torch.rand(1, 40, 3), x, cu_seqlens=bounds)
    assert not h[:, 7:20].isfinite().any()
    assert h[:, 20:].isfinite().all() and final[1].isfinite().all()


class Zeros(TorchDispatchMode):
    """Numbers of dimensions of the zeros that are made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if "zeros" in str(op):
            self.made.append(out.ndim)
        return out


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output(output):
    """As of both, the other times zero; none of 4 dimensions, as states before spans, is made."""
    args = leaves([x.float() for x in draw(40)])

    def loss(weights):
        outputs = selective_scan(*args[:5], state=args[5])
        return sum(w * x.sum() for w, x in zip(weights, outputs, strict=True) if w is not None)

    one, both = loss([(1.0, None), (None, 1.0)][output]), loss([(1.0, 0.0), (0.0, 1.0)][output])
    with Zeros() as zeros:
        found = torch.autograd.grad(one, args, allow_unused=True, materialize_grads=True)
    assert 4 not in zeros.made
    want = torch.autograd.grad(both, args)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_flops():
    u, dt, A, B, C, _ = draw(20)
    with FlopCounterMode(display=False) as counter:
        scan(-dt, u)
        selective_scan(u, dt, A, B, C)
    assert counter.get_total_flops() == 2 * 20 * 6 * (2 + 6 * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": -torch.ones(2, 9, 6)}, "dt: expected dt >= 0"),
        ({"A": torch.ones(6, 3)}, "A: expected dt >= 0 and A <= 0"),
        ({"B": torch.zeros(2, 9, 4, 3)}, "B: expected G to divide 6, got 4"),
        ({"C": torch.zeros(2, 9, 1, 3)}, "C: expected shape"),
        ({"C": torch.zeros(2, 9, 2, 3).half()}, "C: expected the dtype of u"),
    ],
)
def test_bad_input_is_named(change, message):
    named = dict(zip(("u", "dt", "A", "B", "C"), [x.float() for x in draw(9)[:5]], strict=True))
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**named, **change})
