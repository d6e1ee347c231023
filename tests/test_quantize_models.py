"""Low-bit projections in converted models: every mixer, through training, files and back."""

from __future__ import annotations

import json

import pytest
import torch
from models import MODELS, VOCAB, llama
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM

import flacompile
from flacompile import BitNet, Ternary, quantize_
from flacompile.distill import Recipe, Stage
from flacompile.export.programs import Step, all_mixers
from flacompile.layers import MIXERS
from flacompile.passes.decompose import decompose
from flacompile.passes.swap_attention import swapped
from flacompile.quantize import BitNetTensor, TernaryTensor, mixer_projections

IDS = torch.randint(1, VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))


def convert(mixer: str, **options) -> nn.Module:
    return flacompile.convert(MODELS["llama"]().model, mixer, init="neutral", **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def low_bit(model: nn.Module) -> dict[str, type]:
    return {n: type(p) for n, p in model.named_parameters() if type(p) is not nn.Parameter}


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer(mixer):
    """Training reaches each weight; what ships has its values, at once and token by token."""
    model = convert(mixer, quantize=BitNet())
    found = low_bit(model)
    assert set(found.values()) == {BitNetTensor}
    assert all(".mixer." in name for name in found)
    (out := model(IDS, labels=IDS)).loss.backward()
    grads = [model.get_parameter(name).grad for name in found]
    assert all(g is not None and g.isfinite().all() for g in grads) and any(g.any() for g in grads)
    quantize_(model, Ternary(), mixer_projections(model))
    assert set(low_bit(model).values()) == {TernaryTensor}
    assert logits(model).equal(out.logits)
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        last = model(IDS[:, -1:], past_key_values=cache).logits[:, 0]
    want = out.logits[:, -1]
    assert (last - want).norm() < 0.02 * want.norm()  # an ulp may turn a rounding


def test_all_of_a_model(tmp_path):
    """Also what convert left alone, but neither head nor teachers; and it loads as it was."""
    model = convert("gla")
    quantize_(model, BitNet())
    names = list(low_bit(model))
    assert any("mlp" in name for name in names)
    assert not any("lm_head" in name or ".original." in name for name in names)
    want = logits(model)
    model.save_pretrained(tmp_path)
    loaded = flacompile.load(tmp_path)
    assert list(low_bit(loaded)) == names and logits(loaded).equal(want)
    quantize_(loaded, Ternary()).save_pretrained(tmp_path / "packed")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    weight = swapped(half)["model.layers.0.self_attn"].mixer.q_proj.weight
    assert weight.dtype == torch.bfloat16 and weight.scale.dtype == torch.float32
    assert torch.equal(weight.scale, loaded.get_parameter(names[0]).scale)


@torch.no_grad()
def decode_step() -> tuple[torch.export.ExportedProgram, tuple, torch.Tensor]:
    """A ternary model's decode as it is exported, its inputs and the model's logits."""
    model = llama(num_hidden_layers=1)().model
    flacompile.convert(model, "linear_attn", init="neutral", quantize=Ternary())
    with all_mixers(flacompile.finalize(model)):
        step, token = Step(model, None), IDS[:, :1].contiguous()
        args = (token, step.begin(len(token)))
        program = decompose(torch.export.export(step, args))
    return program, args, model(token).logits[:, -1]


def test_an_exported_program_holds_the_bytes():
    """Plain tensors and aten operations alone, with the model's values."""
    program, args, want = decode_step()
    got = program.module()(*args)[0]
    assert not any("flacompile" in str(node.target) for node in program.graph.nodes)
    assert any(w.dtype == torch.uint8 for w in program.state_dict.values())
    assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.slow
def test_a_package_holds_the_bytes(tmp_path):
    """It runs without Python, and has the model's values."""
    program, args, want = decode_step()
    path = str(tmp_path / "decode.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    package = torch._inductor.aoti_load_package(path)
    assert (package(*args)[0] - want).norm() < 0.02 * want.norm()


def test_distillation_through_the_quantiser(tmp_path):
    """Losses fall on the same tokens again, and what ships has the values that were trained."""
    model, rates = convert("gla", quantize=BitNet()), {"mixer_lr": 1e-2, "rest_lr": 1e-3}
    recipe = Recipe(
        align=Stage(steps=8, **rates), logits=Stage(steps=8, **rates), sequence_length=16,
        batch_size=2, eval_tokens=64,
    )  # fmt: skip
    flacompile.distill(model, IDS[0].repeat(40), recipe, out=tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for stage in ("align", "logits"):
        losses = [row["loss"] for row in log if row["stage"] == stage]
        assert losses[-1] < 0.9 * losses[0]
    want = logits(model)
    quantize_(model, Ternary(), mixer_projections(model))
    assert logits(model).equal(want)


def test_unconvert_gives_the_original_back():
    before = MODELS["llama"]().model
    want = logits(before)
    model = convert("gla", quantize=Ternary())
    assert "Ternary()" in str(flacompile.report(model))
    assert logits(flacompile.unconvert(model)).equal(want) and not low_bit(model)


def test_a_config_of_torchao():
    model = convert("gla", quantize=Int8WeightOnlyConfig())
    assert {kind.__name__ for kind in low_bit(model).values()} == {"Int8Tensor"}
    assert (logits(model) - logits(convert("gla"))).norm() < 0.1 * logits(model).norm()
    with pytest.raises(ValueError, match="expected a plain weight, or one by BitNet or Ternary"):
        model.save_pretrained("never written")


@pytest.mark.parametrize("mixer", ["mla", "rwkv6"])
def test_a_weight_that_is_read_directly(mixer):
    model = convert(mixer)
    with pytest.raises(ValueError, match="expected a weight that is only multiplied with"):
        quantize_(model, BitNet(), lambda module, name: name.endswith("_proj.2"))


def test_nothing_happens_by_half():
    model = MODELS["llama"]().model
    with pytest.raises(ValueError, match="config: expected a config"):
        flacompile.convert(model, "gla", init="neutral", quantize="ternary")
    assert not swapped(model)


def test_the_file_says_what_is_packed(tmp_path):
    convert("gla", quantize=Ternary()).save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["flacompile"]["low_bit"]
    assert set(entry.values()) == {"ternary"}
    again = flacompile.load(tmp_path)
    again.save_pretrained(tmp_path / "again")
    files = [path / "model.safetensors" for path in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
