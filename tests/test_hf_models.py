"""Converted transformers models are saved, loaded, copied, adapted and taken back as any other."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from models import MODELS, VOCAB
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import flacompile
from flacompile.layers import MIXERS
from flacompile.passes.swap_attention import swapped

IDS = torch.randint(1, VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def convert(name: str, mixer: str = "gla", **options) -> nn.Module:
    return flacompile.convert(MODELS[name]().model, mixer, **options)


SAVED = {
    **{mixer: ("llama", mixer, (), torch.float32) for mixer in sorted(MIXERS)},
    "tied": ("llama_tied", "simple_gla", (), torch.float32),
    "norms and head_dim": ("qwen3", "gla", (), torch.float32),
    "a softmax window kept": ("mistral", "attn", (1,), torch.float32),
    "gpt2 with a softmax kept": ("gpt2", "linear_attn", (0,), torch.float32),
    "bfloat16": ("llama_yarn", "hgrn2", (), torch.bfloat16),
}


@pytest.mark.parametrize(("name", "mixer", "keep", "dtype"), SAVED.values(), ids=SAVED)
def test_saved_and_loaded_is_the_same(name, mixer, keep, dtype, tmp_path):
    """In one file and in shards, by our verb and by transformers', twice."""
    model = MODELS[name]().model.to(dtype)
    model = flacompile.convert(model, mixer, keep=keep, init="neutral")
    want = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = flacompile.load(tmp_path)
    assert logits(loaded).equal(want)
    assert all(layer.original is None for layer in swapped(loaded).values())
    assert list(swapped(loaded)) == list(swapped(model))
    assert loaded.config.tie_word_embeddings == (
        loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    )
    assert loaded.dtype == dtype and not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert logits(again).equal(want)
    assert (
        type(again) is type(model) and again.config.to_diff_dict() == loaded.config.to_diff_dict()
    )


FIRST_FLACOMPILE = """
import flacompile
from transformers import AutoModelForCausalLM
"""
FIRST_TRANSFORMERS = """
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "has model type `flacompile` but Transformers does not recognize" in str(error)
else:
    raise AssertionError("loaded without flacompile")
import flacompile
"""
READ = """
import torch
ids = torch.load(sys.argv[2])
with torch.no_grad():
    ours = flacompile.load(sys.argv[1])(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(sys.argv[1])(ids).logits
torch.save((ours, theirs), sys.argv[3])
"""


@pytest.mark.parametrize("order", [FIRST_FLACOMPILE, FIRST_TRANSFORMERS])
def test_loads_in_another_process(order, tmp_path):
    """Whichever is imported first, from several files; and not at all without flacompile."""
    model = convert("llama", "hgrn2", keep=(0,))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    torch.save(IDS, tmp_path / "ids.pt")
    files = [str(tmp_path / name) for name in (".", "ids.pt", "logits.pt")]
    code = "import sys" + order + READ
    subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=240)
    for got in torch.load(tmp_path / "logits.pt"):
        assert got.equal(logits(model))


def test_other_heads_read_the_same_checkpoint(tmp_path):
    model = convert("llama")
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = body(IDS).last_hidden_state
    assert model.lm_head(hidden).equal(logits(model))
    body.save_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert flacompile.load(tmp_path / "body")(IDS).last_hidden_state.equal(hidden)


def test_fresh_from_its_config(tmp_path):
    model = convert("llama", "hgrn")
    new = AutoModelForCausalLM.from_config(model.config)
    assert {k: v.shape for k, v in new.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items() if ".original." not in k
    }
    assert logits(new).isfinite().all()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map, tmp_path):
    model = convert("llama", "hgrn2")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert logits(loaded).equal(logits(model))


def test_dtype_on_loading(tmp_path):
    """The asked-for dtype for weights, and fp32 for what is computed in it."""
    convert("llama", "hgrn2").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    buffers = {name: b for layer in swapped(loaded).values() for name, b in layer.named_buffers()}
    assert buffers and all(b.dtype == torch.float32 for b in buffers.values())


def test_an_object_survives_copying_and_pickling():
    model = convert("llama", "linear_attn", keep=(1,))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    for other in copies:
        assert logits(other).equal(logits(model)) and type(other) is type(model)
        flacompile.unconvert(other)
    with torch.no_grad():
        next(copies[0].parameters()).zero_()
    assert not logits(copies[0]).equal(logits(copies[1]))


def edit(path, change):
    recipe = json.loads((path / "config.json").read_text())
    change(recipe)
    (path / "config.json").write_text(json.dumps(recipe))


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def first(config):
    return config["flacompile"]["layers"]["layers.0.self_attn"]


def without_head(path):
    from safetensors.torch import load_file, save_file

    state = load_file(path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, path / "model.safetensors", {"format": "pt"})


def another_mixer(config):
    del first(config)["config"]
    first(config).update(mixer="linear_attn", config={"hidden_size": 32, "num_heads": 4})


LAYER = r"config.json: expected at layers.0.self_attn a mixer .*"
BROKEN = {
    "no recipe": (lambda p: edit(p, lambda c: c.pop("flacompile")), "base model.*got None"),
    "no layers": (
        lambda p: edit(p, lambda c: c["flacompile"].pop("layers")), "and its layers, got {'base'",
    ),
    "another model": (
        lambda p: edit(p, lambda c: c["flacompile"].update(base="lamb")), "config.json.*'lamb'",
    ),
    "not converted": (lambda p: edit(p, lambda c: c.update(model_type="llama")), "got llama"),
    "unknown mixer": (
        lambda p: edit(p, lambda c: first(c).update(mixer="mamba9")), f"{LAYER}mamba9",
    ),
    "unknown field": (
        lambda p: edit(p, lambda c: first(c)["config"].update(colour=1)), f"{LAYER}colour",
    ),
    "another shape": (
        lambda p: edit(p, lambda c: first(c)["config"].update(gate_low_rank_dim=3)),
        r"gk_proj.* of shape \(.*3.*as config.json says, got \(.*16.* from the weights",
    ),
    "another mixer": (
        lambda p: edit(p, another_mixer), r"config.json says, got missing .* unexpected .*gk_proj",
    ),
    "no such layer": (
        lambda p: edit(p, lambda c: c["flacompile"]["layers"].update({"layers.9.x": first(c)})),
        "expected at layers.9.x",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json"),
    "cut config": (lambda p: cut(p / "config.json"), "config.json"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (lambda p: cut(p / "model.safetensors"), "safetensors|incomplete|header"),
    "no head": (without_head, r"missing \['lm_head.weight'\]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    convert("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folder(folder, tmp_path, damage, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        flacompile.load(tmp_path)


@pytest.mark.parametrize("case", ["another shape", "another mixer"])
def test_transformers_notices_a_mismatched_recipe_too(folder, tmp_path, case):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def snapshot(model: nn.Module):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    config = model.config.to_dict() if hasattr(model, "config") else None
    return type(model), type(getattr(model, "config", None)), config, grads, modules, state


def same(one, other) -> bool:
    *facts, state = one
    *other_facts, other_state = other
    equal = all(state[name].equal(other_state[name]) for name in state)
    return facts == other_facts and list(state) == list(other_state) and equal


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "handwritten"])
def test_unconverted_is_the_original(name, attention):
    """Bit for bit, also after the mixers were trained; the next conversion is as the first."""
    case = MODELS[name]()
    model, options = case.model, {"example_inputs": case.inputs}
    if hasattr(model, "config"):
        model.set_attn_implementation(attention)
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    flacompile.convert(model, "gla", keep=[0], **options)
    mixers = [layer.mixer for layer in swapped(model).values()]
    optimizer = torch.optim.SGD([p for mixer in mixers for p in mixer.parameters()], 1.0)
    out = model(*case.inputs)
    (out if isinstance(out, torch.Tensor) else out.logits).sum().backward()
    optimizer.step()
    assert flacompile.unconvert(model) is model
    assert same(snapshot(model), before)
    flacompile.convert(model, "gla", **options)
    assert len(swapped(model)) == 2


def test_unconvert_needs_the_originals():
    model = convert("llama")
    with pytest.raises(ValueError, match=r"expected converted attentions .* got none"):
        flacompile.unconvert(MODELS["llama"]().model)
    with pytest.raises(ValueError, match=r"layers.0.self_attn without its original, as finalize"):
        flacompile.unconvert(flacompile.finalize(model))


def test_half_converted_is_refused():
    model = convert("llama", keep=[0])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"got one with 1 attentions converted .*unconvert puts"):
        flacompile.convert(model)
    assert same(snapshot(model), before)


def test_a_shared_config_stays_as_it_was():
    one = MODELS["llama"]().model
    one.set_attn_implementation("eager")
    other = type(one)(one.config)
    config, before = one.config, one.config.to_dict()
    flacompile.convert(one)
    assert other.config is config and config.to_dict() == before
    assert config._attn_implementation == "eager"
    assert all(m.config is not config for m in one.modules() if hasattr(m, "config"))


def on_meta(model):
    return model.to("meta")


def quantised(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


UNFIT = {
    "meta": (on_meta, "weights in memory, got model.embed_tokens.weight on the meta device"),
    "quantised": (quantised, "plain floating-point weights, got .*convert before quantising"),
    "sharded": (sharded, "plain floating-point weights, got DTensor in .*or sharding"),
    "wrapped": (nn.DataParallel, "not wrapped, got DataParallel at its root; convert before"),
}


@pytest.fixture
def process_group():
    """One process that takes itself for a group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_weights_that_cannot_be_converted(change, message, process_group):
    model = change(MODELS["llama"]().model)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        flacompile.convert(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's call
@pytest.mark.parametrize("mixer", ["gla", "mamba2", "gated_deltanet"])
def test_adapters_train(mixer, tmp_path):
    """LoRA: only adapters get gradients, and merged they are the adapted model."""
    from peft import LoraConfig, get_peft_model

    model = flacompile.finalize(convert("llama", mixer)).train()
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = sorted(names & {"q_proj", "k_proj", "v_proj", "in_proj", "o_proj", "out_proj"})
    start = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_alpha=8))
    assert logits(adapted).equal(start)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
    got = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert got and all("lora_" in name for name in got)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in got} == set(targets)
    trained = logits(adapted.eval())
    assert not torch.allclose(trained, start, rtol=1e-3)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert logits(flacompile.load(tmp_path)).equal(logits(merged))


def test_configs_name_the_real_type(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "flacompile"
