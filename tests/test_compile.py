"""A converted model is one graph: same values, gradients and steps, one recompilation for all T."""

from __future__ import annotations

import copy

import pytest
import torch
from models import MODELS, VOCAB
from torch._dynamo.testing import CompileCounterWithBackend

import flacompile
from flacompile.passes.swap_attention import swapped

CASES = {  # model, mixer, and a CPU's backend for training: test_mixers.py has Inductor on each op
    "llama gla": ("llama", "gla", "inductor"),
    "llama simple_gla": ("llama", "simple_gla", "aot_eager"),
    "llama linear_attn": ("llama", "linear_attn", "aot_eager"),
    "handwritten gla": ("handwritten", "gla", "inductor"),
}
LENGTHS = (32, 48, 70, 123)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def convert(name: str, mixer: str) -> torch.nn.Module:
    case = MODELS[name]()
    return flacompile.convert(case.model, mixer, example_inputs=case.inputs)


def ids_of(time: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(time)
    return torch.randint(0, VOCAB, (2, time), generator=generator)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    scores = logits(model, ids)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten())


def same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    error = (got - want).norm() / want.norm().clamp_min(1e-6)
    assert error < 1e-4, (what, error.item())


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "mixer", "on_cpu"), CASES.values(), ids=CASES)
def test_training_compiled_is_training_eagerly(name, mixer, on_cpu, device):
    eager = convert(name, mixer).to(device)
    other = copy.deepcopy(eager)
    backend = on_cpu if device == "cpu" else "inductor"
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3) for m in (eager, other)]
    for time in (40, 40):
        ids = ids_of(time).to(device)
        same(logits(compiled, ids), logits(eager, ids), "logits")
        for model in (eager, compiled):
            loss_of(model, ids).backward()
        pairs = list(zip(eager.named_parameters(), other.named_parameters(), strict=True))
        for (key, a), (_, b) in pairs:
            assert (a.grad is None) == (b.grad is None), key
            if a.grad is not None:
                same(b.grad, a.grad, f"gradient of {key}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for (key, a), (_, b) in pairs:
            same(b, a, key)
    assert any(p.requires_grad for layer in swapped(other).values() for p in layer.parameters())


@pytest.mark.parametrize(("name", "mixer"), [case[:2] for case in CASES.values()], ids=CASES)
def test_all_lengths_share_two_graphs(name, mixer):
    model, counter = convert(name, mixer), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for time in LENGTHS:
        with torch.no_grad():
            same(logits(compiled, ids_of(time)), logits(model, ids_of(time)), f"T = {time}")
    assert counter.frame_count <= 2
