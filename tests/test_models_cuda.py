"""A pretrained model on a GPU: converted there, compiled, trained and asked for tokens."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import flacompile
from flacompile.layers import MIXERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEACHER = Path(__file__).parent / "teacher"
IDS = torch.randint(3, 200, (2, 150), generator=torch.Generator().manual_seed(0))


def near(got, want, bound):
    assert ((got.cpu() - want).norm() / want.norm()).item() < bound


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"hybrid"}))
def test_converts_compiles_and_trains(mixer):
    """The values of the CPU, and its gradients; the calibration is wherever it is."""
    torch._dynamo.reset()
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True).eval()
    there = flacompile.convert(copy.deepcopy(teacher).cuda(), mixer, calibration=[IDS])
    here = flacompile.convert(teacher, mixer, calibration=[IDS])
    for name, weight in here.named_parameters():
        near(there.get_parameter(name).detach(), weight.detach(), 1e-2)
    there.load_state_dict(here.state_dict())

    @torch.compile(fullgraph=True)
    def loss(ids):
        return there(input_ids=ids, labels=ids, use_cache=False).loss

    for ids in (IDS, IDS[:, :77]):
        want = here(input_ids=ids, labels=ids, use_cache=False).loss
        want.backward()
        got = loss(ids.cuda())
        got.backward()
        near(got.detach(), want.detach(), 1e-4)
    for name, weight in here.named_parameters():
        if weight.grad is not None and weight.grad.norm() > 1e-6:
            near(there.get_parameter(name).grad, weight.grad, 1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        assert loss(IDS.cuda()).isfinite()
    tokens = there.generate(IDS[:, :20].cuda(), max_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, 28)
