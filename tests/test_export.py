"""One package: the model's values at any B and T, in processes that know nothing of flacompile."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from models import VOCAB, llama
from torch._inductor.package import load_package

import flacompile

pytestmark = pytest.mark.xdist_group("export")  # its fixtures are long in the making

exporting = import_module("flacompile.export")
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PROMPT, TOKENS = [3, 1, 4, 1, 5, 9, 2, 6], 12


def converted(mixer="simple_gla", **options):
    """A two-layer Llama with grouped keys and room for long prompts, as simple GLA."""
    case = llama(max_position_embeddings=8192)()
    return flacompile.convert(case.model, mixer=mixer, **options)


@pytest.fixture(scope="module")
def model():
    return flacompile.finalize(converted()).eval()


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    stages = []
    facts = flacompile.export(model, path, progress=stages.append)
    assert tuple(stages) == exporting.STAGES
    assert max(facts["errors"].values()) < 1e-5
    assert [p.name for p in path.parent.iterdir()] == ["model.pt2"]  # nothing partial is left
    return path


@pytest.fixture(scope="module")
def greedy(model):
    ids = torch.tensor([PROMPT])
    output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return output[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 200, 1023, 1024, 1025, 2049, 5000])
def test_values_at_any_shape(model, package, batch, time):
    prefill, decode = load_package(str(package), "prefill"), load_package(str(package), "decode")
    ids = torch.randint(VOCAB, (batch, time + 2), generator=torch.Generator().manual_seed(time))
    logits, *states = prefill(ids[:, :-2].contiguous())
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, want[:, -3], rtol=1e-4, atol=1e-5)
    for i in (-2, -1):
        logits, *states = decode(ids[:, i : i + 1 or None].contiguous(), tuple(states))
        torch.testing.assert_close(logits, want[:, i], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_runs_where_flacompile_cannot_be_imported(package, greedy):
    sys.path.insert(0, str(EXAMPLES))
    try:
        runner = import_module("demo").RUNNER
    finally:
        sys.path.remove(str(EXAMPLES))
    command = [sys.executable, "-c", runner, str(package), json.dumps(PROMPT), str(TOKENS)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1])[0] == greedy


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is missing")
@pytest.mark.skipif(shutil.which("c++") is None, reason="a C++ compiler is missing")
def test_runs_from_cpp(package, greedy, tmp_path):
    source = EXAMPLES / "cpp"
    assert len((source / "generate.cpp").read_text().splitlines()) <= 80
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", str(source), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=Release", prefix],
        ["cmake", "--build", str(tmp_path)],
    ):
        subprocess.run(command, capture_output=True, text=True, check=True)
    binary = [str(tmp_path / "generate"), str(package), str(TOKENS)]
    done = subprocess.run([*binary, *map(str, PROMPT)], capture_output=True, text=True, check=True)
    assert [int(i) for i in done.stdout.split()] == greedy
    assert "decode" in done.stderr and "tokens/s" in done.stderr
    wrong = subprocess.run([*binary, str(VOCAB)], capture_output=True, text=True)
    assert wrong.returncode == 2 and f"expected 0 to {VOCAB - 1}, got {VOCAB}" in wrong.stderr


@pytest.mark.slow
def test_the_gate_sees_wrong_values(model, package):
    other = converted()
    with torch.no_grad():
        other.model.layers[1].self_attn.mixer.o_proj.weight.mul_(1.01)
        with pytest.raises(ValueError, match="package: expected the model's values within"):
            exporting._gate(other.eval(), package, (65,))


def test_refusals(tmp_path):
    path = tmp_path / "model.pt2"
    plain = llama()().model
    cases = [
        (plain, path, "model: expected one that flacompile.convert converted"),
        (converted(keep=[0]), path, "1 softmax layers kept"),
        (converted(mixer="attn"), path, "expected linear mixers.*got Attention in model.layers.0"),
        (converted(), tmp_path / "model.so", "path: expected a name that ends in .pt2"),
    ]
    for model, where, message in cases:
        with pytest.raises(ValueError, match=message):
            flacompile.export(model, where)
    assert not list(tmp_path.iterdir())
