"""A package for CUDA: its values, one graph a token, and the same tokens from C++."""

import pytest
import torch
from packages import converted
from test_runner import PROMPT, WARM, run

import flacompile
from flacompile.runner import DecodeGraph, Package, Sampling, generate

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model on the GPU, its package, and the errors of the gate."""
    model = flacompile.finalize(converted("gated_deltanet")).eval().cuda()
    path = tmp_path_factory.mktemp("cuda") / "model.pt2"
    return model, path, flacompile.export(model, path, max_length=1200)["errors"]


@pytest.fixture(scope="module")
def loaded(exported):
    return Package(exported[1])


def test_values(exported):
    assert 0 < max(exported[2].values()) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_a_graph_is_decode(loaded, batch):
    logits, *states = loaded.prefill(torch.tensor([PROMPT] * batch, device="cuda"))
    graph = DecodeGraph(loaded, [x.clone() for x in states]).capture()
    for _ in range(5):
        token = logits.argmax(-1, keepdim=True)
        logits, *states = loaded.decode(token, states)
        torch.testing.assert_close(graph(token), logits, rtol=1e-5, atol=1e-5)
    assert graph(token * 0 - 1).isnan().all()
    with pytest.raises(ValueError, match=rf"token: expected shape \[{batch}, 1\], got"):
        graph(token.repeat(2, 1))
    with pytest.raises(ValueError, match="token: expected device cuda, got cpu"):
        graph(token.cpu())


@torch.inference_mode()
def test_a_graph_knows_the_room(loaded):
    states = loaded.begin(1)
    states[loaded.facts["position"]].fill_(1199)
    graph, token = DecodeGraph(loaded, states).capture(), torch.tensor([[3]], device="cuda")
    assert graph(token).isfinite().all()
    with pytest.raises(ValueError, match="token: expected a sequence with room for it, got a full"):
        graph(token)


def test_greedy_tokens_are_those_of_the_model(exported, loaded):
    ids = torch.tensor([PROMPT], device="cuda")
    want = exported[0].generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert PROMPT + list(generate(loaded, PROMPT, tokens=12)) == want[0].tolist()


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_same_tokens_from_cpp(sampling, exported, loaded, cpp):
    want = list(generate(loaded, PROMPT, tokens=12, sampling=sampling, stop=loaded.facts["end"]))
    done = run(
        cpp / "generate", exported[1], "--ids", ",".join(map(str, PROMPT)), "--tokens", 12,
        "--temperature", sampling.temperature, "--top-p", sampling.top_p, "--seed", sampling.seed,
    )  # fmt: skip
    assert [int(i) for i in done.stdout.split()] == PROMPT + want, done.stderr


def test_inputs_of_the_cpu_are_refused(loaded):
    ids, states = torch.ones(1, 3, dtype=torch.int64), loaded.begin(1)
    with pytest.raises(ValueError, match="ids: expected device cuda, got cpu"):
        loaded.prefill(ids)
    with pytest.raises(ValueError, match=r"states\[0\]: expected device cuda, got cpu"):
        loaded.decode(ids[:, :1].contiguous().cuda(), [x.cpu() for x in states])
