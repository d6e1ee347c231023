"""The Dynamo backend: attention swapped inside torch.compile, everything else left to it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import DIM, MODELS, REJECTED, VOCAB, Case, PackedAttention
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend

from flacompile import backend
from flacompile.backend import MIXINGS, flacompile, linear_attention, read_options, swap_calls
from flacompile.layers import MIXERS


def dpfp(x: Tensor, j: int) -> Tensor:
    """r_i r_{i-j} of r = relu([x, -x])."""
    r = torch.cat((x, -x), -1).relu()
    return r * r.roll(j, -1)


# Weights of the tokens as the papers write them, of scaled products a [H, T, T], of φ for linear.
WEIGHTS: dict[str, tuple[dict[str, str], Callable[..., Tensor], bool]] = {
    "based": ({}, lambda a, **_: 1 + a + a**2 / 2, True),
    "rebased": ({}, lambda a, **_: (2 + a) ** 2, True),
    "linear_attn elu": (
        {"feature_map": "elu"},
        lambda q, k, **_: (F.elu(q) + 1) @ (F.elu(k) + 1).mT,
        True,
    ),
    "linear_attn dpfp": (
        {"feature_map": "dpfp"},
        lambda q, k, **_: torch.stack([dpfp(q, j) @ dpfp(k, j).mT for j in range(1, 5)]).sum(0),
        True,
    ),
    "linear_attn relu": ({"feature_map": "relu"}, lambda q, k, **_: q.relu() @ k.relu().mT, True),
    "simple_gla retention": (
        {"decay": "retention"},
        lambda a, h, age, **_: a * (1 - 2.0 ** (-5 - h)) ** age,
        False,
    ),
    "simple_gla alibi": (
        {"decay": "alibi"},
        lambda a, h, age, **_: a * torch.exp(-age * 2.0 ** (-8 * (h + 1) / 4)),
        False,
    ),
}


LENGTHS = (20, 33)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_mixings_against_quadratic_forms(name, scale):
    """Four query heads to two key heads, K unlike V, a ragged T."""
    choices, weight, normalised = WEIGHTS[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 37, d) for h, d in ((4, 6), (2, 6), (2, 5)))
    got = linear_attention(q, k, v, scale, mixer=name.split()[0], choices=choices)
    q, k, v = q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v))
    a = (1 / math.sqrt(6) if scale is None else scale) * q @ k.mT
    age = (torch.arange(37)[:, None] - torch.arange(37)).clamp(min=0)
    heads = torch.arange(4.0, dtype=torch.float64)[:, None, None]
    w = weight(a=a, q=q, k=k, h=heads, age=age).tril()
    want = (w / (w.sum(-1, keepdim=True) + 1e-10) if normalised else w) @ v
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_every_mixing_is_a_mixer_and_tested():
    assert set(MIXINGS) < set(MIXERS)
    assert {name.split()[0] for name in WEIGHTS} == set(MIXINGS)


def eagerly(gm: torch.fx.GraphModule, inputs: Any, *, options: dict[str, Any]) -> Any:
    """The backend without Inductor."""
    mixer, choices, _ = read_options(options)
    swap_calls(gm, mixer, choices)
    return lookup_backend("aot_eager")(gm, inputs)


def ids_of(time: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, time), generator=torch.Generator().manual_seed(time))


def logits(model: Any, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits if "logits" in out else out[0]


def swap_eagerly(monkeypatch: pytest.MonkeyPatch, mixer: str) -> None:
    """Makes every attention of an eager model what the backend should make of it."""

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        return linear_attention(q, k, v, scale, mixer=mixer, choices={})

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize(
    ("name", "mixer", "dynamic"),
    [("handwritten_even_odd", "based", None), ("llama", "simple_gla", True)],
)
def test_compiled_model_is_the_swapped_one(monkeypatch, name, mixer, dynamic):
    """Grouped heads, a scale, any length, gradients; two graphs at most."""
    model = MODELS[name]().model.train()
    counter = CompileCounterWithBackend("aot_eager")

    def inner(gm, inputs, *, options):
        swap_calls(gm, *read_options(options)[:2])
        return counter(gm, inputs)

    options = {"mixer": mixer}
    compiled = torch.compile(model, backend=inner, options=options, fullgraph=True, dynamic=dynamic)
    results = []
    for time in LENGTHS:
        y = logits(compiled, ids_of(time))
        results.append((y, torch.autograd.grad(y.square().mean(), list(model.parameters()))))
    assert counter.frame_count <= 2
    swap_eagerly(monkeypatch, mixer)
    for time, (got, gradients) in zip(LENGTHS, results, strict=True):
        want = logits(model, ids_of(time))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        wanted = torch.autograd.grad(want.square().mean(), list(model.parameters()))
        torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_inductor_takes_the_rest(monkeypatch):
    """By the name that the installed package gives it."""
    torch.manual_seed(0)
    model, x = PackedAttention(), torch.randn(2, 20, DIM)
    options = {"mixer": "linear_attn", "feature_map": "elu", "max_autotune": False}
    compiled = torch.compile(model, backend="flacompile", options=options, fullgraph=True)
    got = compiled(x)
    gradients = torch.autograd.grad(got.square().mean(), list(model.parameters()))
    softmax = model(x)
    swap_eagerly(monkeypatch, "linear_attn")
    want = model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (want - softmax).norm() > 0.1 * softmax.norm()
    wanted = torch.autograd.grad(want.square().mean(), list(model.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-5)


def decoding() -> Case:
    """More keys than queries: queries of the last tokens."""

    class Last(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, -1)).transpose(1, 2)
            return F.scaled_dot_product_attention(q[:, :, -3:], q, q, is_causal=True)

    return Case(Last(), (torch.randn(2, 20, 32),), {})


def masked_by_input() -> Case:
    class Masked(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, -1)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, mask)

    return Case(Masked(), (torch.randn(2, 9, 32), torch.ones(9, 9, dtype=torch.bool).tril()), {})


LEFT = {
    "bidirectional": (REJECTED["bidirectional"][0], "2 x bidirectional"),
    "dropout": (REJECTED["dropout"][0], "2 x dropout is active"),
    "dilated": (REJECTED["dilated"][0], "2 x other mask"),
    "alibi": (REJECTED["alibi"][0], "2 x the mask adds a bias"),
    "window": (MODELS["mistral"], "2 x the mask is a sliding window"),
    "decoding": (decoding, "1 x queries and keys differ in number"),
    "a mask from outside": (masked_by_input, "1 x a mask that is an input"),
}


@pytest.mark.parametrize("name", LEFT)
def test_the_rest_stays_softmax_and_is_counted(name):
    build, reason = LEFT[name]
    case = build()
    compiled = torch.compile(case.model, backend=eagerly, options={"mixer": "based"})
    with pytest.warns(UserWarning, match=f"attentions that stay softmax: {reason}"):
        got = compiled(*case.inputs, **case.kwargs)
    if name != "dropout":
        want = case.model(*case.inputs, **case.kwargs)
        first = [torch.utils._pytree.tree_leaves(y)[0] for y in (got, want)]
        torch.testing.assert_close(*first, rtol=1e-5, atol=1e-5)


def test_a_causal_mask_is_causal(caplog):
    """Decided by value: this one is a tensor made of comparisons."""
    case = MODELS["handwritten"]()
    for block in case.model.blocks:
        block.attention.is_causal = False
        block.attention.mask = lambda time: torch.ones(time, time, dtype=torch.bool).tril()
    compiled = torch.compile(
        case.model, backend=eagerly, options={"mixer": "based"}, fullgraph=True
    )
    with caplog.at_level("INFO", logger=backend.__name__):
        compiled(*case.inputs)
    assert "2 attentions became based" in caplog.text


BAD = {
    "none": (None, r"options\['mixer'\]: expected one of based, .*simple_gla, .*, got None"),
    "unknown": ({"mixer": "gla"}, r"options\['mixer'\]: .*, got gla"),
    "choice": (
        {"mixer": "linear_attn", "feature_map": "t2r"},
        r"options\['feature_map'\]: expected one of \('dpfp', 'elu', 'relu'\), got t2r",
    ),
    "of another": (
        {"mixer": "based", "decay": "alibi"},
        "options: .* option of based .*, got decay",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        flacompile(torch.fx.symbolic_trace(torch.nn.Identity()), [], options=options)


def test_entry_point():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    section = re.search(
        r"\[project.entry-points.torch_dynamo_backends\]\n(\w+) = \"(.*?):(.*)\"", text
    )
    assert section is not None
    name, module, attribute = section.groups()
    assert name == "flacompile"
    assert getattr(importlib.import_module(module), attribute) is flacompile
    installed = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert (name in installed.names) == (name in torch._dynamo.list_backends())
