"""One package: the model's values at any B and T, in processes that know nothing of flacompile."""

import json
from importlib import import_module

import pytest
import torch
from models import MODELS, VOCAB, llama
from packages import converted
from safetensors.torch import load_file
from torch._inductor import config
from torch._inductor.cpp_builder import CppTorchOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa

import flacompile
from flacompile.export.gate import compare, load_programs, references
from flacompile.export.processor import compile_options, instructions
from flacompile.export.programs import Step, all_mixers

pytestmark = pytest.mark.xdist_group("export")  # its fixtures are long in the making

exporting = import_module("flacompile.export")


@pytest.fixture
def model(exported):
    return exported.model


@pytest.fixture(scope="module")
def programs(exported):
    return load_programs(exported.path)


def begin(programs, batch):
    """The empty states, as the metadata describes them."""
    facts = programs["decode"].get_metadata()
    shapes, dtypes = (json.loads(facts[f"state_{name}"]) for name in ("shapes", "dtypes"))
    pairs = zip(shapes, dtypes, strict=True)
    return [torch.zeros(batch, *shape[1:], dtype=getattr(torch, name)) for shape, name in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_values_at_any_shape(model, programs, batch):
    lengths = (1, 2, 63, 64, 65, 200, 1023, 1024, 1025)
    cases = references(model, lengths, 1200)
    cases = [case._replace(ids=case.ids[:1].repeat(batch, 1)) for case in cases]
    cases = [case._replace(logits=case.logits[:1].repeat(batch, 1, 1)) for case in cases]
    errors = compare(programs, lambda batch: begin(programs, batch), cases)
    assert max(errors.values()) < 1e-5


@pytest.mark.slow
def test_a_long_prompt_goes_in_by_pieces(model, programs):
    ids = torch.randint(VOCAB, (2, 1100), generator=torch.Generator().manual_seed(5))
    states = begin(programs, 2)
    for piece in ids.split(97, 1):
        logits, *states = programs["prefill"](piece.contiguous(), tuple(states))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_metadata(model, programs):
    for program in programs.values():
        facts = program.get_metadata()
        assert json.loads(facts["config"])["hidden_size"] == model.config.hidden_size
        names, dtypes = json.loads(facts["state_names"]), json.loads(facts["state_dtypes"])
        assert {"0.recurrent.0", "1.recurrent.0", "2.recurrent.0", "3.cached.0"} < set(names)
        assert dtypes[json.loads(facts["position"])] == "int64"
        assert json.loads(facts["context"]) == 1200 and json.loads(facts["device"]) == "cpu"


@pytest.mark.slow
def test_nothing_partial_is_left(exported):
    assert tuple(exported.stages) == exporting.STAGES
    assert max(exported.facts["errors"].values()) < 1e-5
    assert [p.name for p in exported.path.parent.iterdir()] == ["model.pt2"]


@pytest.mark.slow
def test_weights_beside_and_a_transformer_as_it_is(tmp_path):
    model = llama(num_hidden_layers=1, tie_word_embeddings=True)().model
    path, lengths = tmp_path / "model.pt2", (1, 40)
    facts = flacompile.export(model, path, max_length=80, weights="beside", lengths=lengths)
    assert facts["weights"] == "model.safetensors" and max(facts["errors"].values()) < 1e-5
    weights = load_file(tmp_path / "model.safetensors")
    loaded = load_programs(path, weights)
    cases = references(model, lengths, 80)
    assert max(compare(loaded, lambda batch: begin(loaded, batch), cases).values()) < 1e-5
    weights["model.model.norm.weight"].zero_()  # read where it lies, by both
    for program in loaded.values():
        assert not program(torch.tensor([[3]]), tuple(begin(loaded, 1)))[0].any()


@torch.no_grad()
def test_the_gate_sees_wrong_values():
    model = flacompile.finalize(converted(keep=[])).eval()
    cases = references(model, (65,), None)
    model.model.layers[1].self_attn.mixer.o_proj.weight.mul_(1.01)
    with all_mixers(model), pytest.raises(ValueError, match="expected the model's values within"):
        step = Step(model, None)
        compare({"prefill": step, "decode": step}, step.begin, cases)


def test_code_asks_for_what_it_says():
    """And not for all that the processor at hand has; on others than x86 nothing is said."""
    with config.patch(compile_options()):
        compiler = CppTorchOptions(vec_isa=pick_vec_isa())
    flags = " ".join([*compiler.get_cflags(), *compiler.get_passthrough_args()]).replace("-", "")
    assert "march=native" not in flags
    assert all(f"m{name.replace('_', '')}" in flags for name in instructions())
    assert bool(instructions()) == ("mavx" in flags)


def test_refusals(tmp_path):
    path, room = tmp_path / "model.pt2", {"max_length": 100}
    case = MODELS["handwritten"]().model
    backbone = converted().model
    cases = [
        (case, path, {}, "model: expected a causal language model of transformers, got GPT"),
        (backbone, path, room, "model: expected one with a language model's head, got Llama"),
        (
            converted(),
            path,
            {},
            "max_length: expected a number of tokens, as Attention keeps every",
        ),
        (converted(), path, {"max_length": 1}, "max_length: expected a number of tokens, at least"),
        (converted(), path, room | {"lengths": [100]}, "lengths: expected one below the 100 token"),
        (converted(), path, {"decode_for": "2"}, "decode_for: expected 'one' or 'many', got '2'"),
        (converted(), tmp_path / "model.so", {}, "path: expected a name that ends in .pt2"),
    ]
    for model, where, options, message in cases:
        with pytest.raises(ValueError, match=message):
            flacompile.export(model, where, **options)
    assert not list(tmp_path.iterdir())
