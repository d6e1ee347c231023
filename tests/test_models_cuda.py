"""A pretrained model on a GPU: converted there, compiled, trained and asked for tokens."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flacompile
from flacompile.layers import MIXERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEACHER = Path(__file__).parent / "teacher"
TEXT = (TEACHER / "heldout.txt").read_text()
MIXERS_OF_A_SITE = sorted(set(MIXERS) - {"hybrid"})


def near(got, want, bound):
    assert (got.cpu() - want).norm() <= bound * want.norm() + 1e-6


@pytest.fixture(scope="module")
def ids():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)
    return tokenizer(TEXT, return_tensors="pt").input_ids[0, :300].view(2, 150)


def pretrained():
    torch.manual_seed(0)  # some mixers begin with random weights
    return AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True).eval()


@pytest.mark.parametrize("mixer", MIXERS_OF_A_SITE)
def test_converts_compiles_and_trains(mixer, ids):
    """The values of the CPU and its gradients."""
    torch._dynamo.reset()
    there, here = (
        flacompile.convert(pretrained().to(device), mixer, init="neutral")
        for device in ("cuda", "cpu")
    )
    for name, weight in here.named_parameters():
        torch.testing.assert_close(there.get_parameter(name).cpu(), weight)

    @torch.compile(fullgraph=True)
    def loss(ids):
        return there(input_ids=ids, labels=ids, use_cache=False).loss

    for part in (ids, ids[:, :77]):
        want = here(input_ids=part, labels=part, use_cache=False).loss
        want.backward()
        got = loss(part.cuda())
        got.backward()
        near(got.detach(), want.detach(), 1e-4)
    for name, weight in here.named_parameters():
        if weight.grad is not None:
            near(there.get_parameter(name).grad, weight.grad, 1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        assert loss(ids.cuda()).isfinite()
    tokens = there.generate(ids[:, :20].cuda(), max_new_tokens=8, min_new_tokens=8)
    assert tokens.shape == (2, 28)


@pytest.mark.parametrize("mixer", MIXERS_OF_A_SITE)
def test_calibrates_where_the_model_is(mixer, ids):
    model = flacompile.convert(pretrained().cuda(), mixer, calibration=[ids])
    for layer in flacompile.report(model).layers:
        assert layer.after <= layer.before
