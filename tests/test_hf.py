"""Converted transformers models generate, are cached, saved and loaded as any other."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from models import MODELS, VOCAB, llama
from transformers import DynamicCache

import flacompile
from flacompile.hf_cache import StateLayer
from flacompile.layers import MIXERS
from flacompile.passes.swap_attention import swapped

NEW = 8
PAIRS = [
    (name, mixer) for name in ("llama", "gpt2") for mixer in ("attn", "gla", "linear_attn")
] + [("mistral", "attn"), ("gpt_neox", "simple_gla")]


@pytest.fixture(scope="module")
def converted():
    """Models by (name, mixer, keep), each converted once; ``eos`` never ends a text early."""
    made = {}

    def get(name: str, mixer: str, keep: tuple[int, ...] = ()):
        if (name, mixer, keep) not in made:
            model = flacompile.convert(MODELS[name]().model, mixer, keep=keep)
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
            made[name, mixer, keep] = model
        return made[name, mixer, keep]

    return get


def prompt(batch: int = 2, time: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, VOCAB, (batch, time), generator=generator)


def generate(model, ids, count: int = NEW, **options):
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


def argmax_loop(model, ids: torch.Tensor, count: int = NEW) -> torch.Tensor:
    """Greedy continuation that runs the whole text again for every token."""
    for _ in range(count):
        with torch.no_grad():
            last = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize(("name", "mixer"), PAIRS)
def test_greedy_with_cache_is_the_argmax_loop(converted, name, mixer):
    model = converted(name, mixer)
    assert generate(model, prompt()).equal(argmax_loop(model, prompt()))


@pytest.mark.parametrize("keep", [(0,), (1,)])
def test_kept_softmax_layers_share_the_cache(converted, keep):
    model = converted("llama", "gla", keep)
    assert generate(model, prompt()).equal(argmax_loop(model, prompt()))


@pytest.mark.parametrize(("name", "mixer"), PAIRS)
def test_beam_search(converted, name, mixer):
    model = converted(name, mixer)
    options = {"num_beams": 3, "num_return_sequences": 2}
    want = generate(model, prompt(), use_cache=False, **options)
    assert generate(model, prompt(), **options).equal(want)
    assert not want.equal(generate(model, prompt()).repeat_interleave(2, 0))


@pytest.mark.parametrize(("name", "mixer"), PAIRS)
def test_padded_batch_is_each_prompt_alone(converted, name, mixer):
    model, ids = converted(name, mixer), prompt(3)
    pads = (0, 4, 7)
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
    got = generate(model, ids.where(mask.bool(), 0), attention_mask=mask)
    for row, pad in enumerate(pads):
        assert got[row : row + 1, pad:].equal(generate(model, ids[row : row + 1, pad:])), row


@pytest.mark.parametrize(("name", "mixer"), PAIRS)
def test_text_in_pieces_is_the_whole(converted, name, mixer):
    """Chunks of several tokens, and single ones, after a returned cache."""
    model, ids, cache, pieces = converted(name, mixer), prompt(2, 17), None, []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for piece in ids.split((6, 1, 9, 1), 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    assert (torch.cat(pieces, 1) - whole).norm() / whole.norm() < 1e-5
    assert cache.get_seq_length() == 17


@pytest.mark.parametrize("mixer", ["attn", "gla"])
def test_generation_continues_from_a_returned_cache(converted, mixer):
    model = converted("llama", mixer)
    want = generate(model, prompt(), 2 * NEW)
    first = generate(model, prompt(), NEW, return_dict_in_generate=True)
    got = generate(model, first.sequences, NEW, past_key_values=first.past_key_values)
    assert got.equal(want)


def state_size(cache) -> int:
    leaves = torch.utils._pytree.tree_leaves([layer.state for layer in cache.layers])
    return sum(leaf.numel() for leaf in leaves)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_state_does_not_grow(converted, mixer):
    model = converted("llama", mixer)
    sizes = [
        state_size(generate(model, prompt(), count, return_dict_in_generate=True).past_key_values)
        for count in (10, 50)
    ]
    keeps = {layer.mixer.keeps_size for layer in swapped(model).values()}
    assert {sizes[0] == sizes[1]} == keeps


def test_cache_of_another_model_is_refused(converted):
    ids, teacher = prompt(), MODELS["llama"]().model
    with torch.no_grad():
        foreign = {
            "softmax keys": teacher(ids, use_cache=True).past_key_values,
            "another mixer": converted("llama", "attn")(ids, use_cache=True).past_key_values,
            "another batch": converted("llama", "gla")(ids[:1], use_cache=True).past_key_values,
        }
    expected = {
        "softmax keys": "past_key_values: expected an empty cache or one of this model",
        "another mixer": "state: expected RecurrentState, got AttentionState",
        "another batch": "state.position: expected shape",
    }
    for name, cache in foreign.items():
        with pytest.raises(ValueError, match=expected[name]):
            converted("llama", "gla")(ids, past_key_values=cache)


def test_teacher_refuses_the_cache_of_its_student(converted):
    ids = prompt()
    with torch.no_grad():
        cache = converted("llama", "gla")(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="this layer was converted and holds no keys"):
            MODELS["llama"]().model(ids, past_key_values=cache)


def test_empty_caches_are_taken_over_and_reset(converted):
    model, cache = converted("llama", "gla"), DynamicCache()
    with torch.no_grad():
        want = model(prompt(), past_key_values=cache).logits
        assert all(isinstance(layer, StateLayer) for layer in cache.layers)
        cache.reset()
        assert model(prompt(), past_key_values=cache).logits.equal(want)


SAVED = {
    "gla": ("llama", "gla", (), torch.float32),
    "tied": ("llama_tied", "simple_gla", (), torch.float32),
    "norms and head_dim": ("qwen3", "gla", (), torch.float32),
    "attn": ("mistral", "attn", (), torch.float32),
    "gpt2 with a softmax kept": ("gpt2", "linear_attn", (0,), torch.float32),
    "bfloat16": ("llama_yarn", "gla", (), torch.bfloat16),
}
READ = """
import sys, torch, flacompile
model = flacompile.load(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.parametrize(("name", "mixer", "keep", "dtype"), SAVED.values(), ids=SAVED)
def test_saved_and_loaded_is_the_same(name, mixer, keep, dtype, tmp_path):
    model = flacompile.convert(MODELS[name]().model.to(dtype), mixer, keep=keep)
    with torch.no_grad():
        want = model(prompt()).logits
    model.save_pretrained(tmp_path)
    loaded = flacompile.load(tmp_path)
    with torch.no_grad():
        assert loaded(prompt()).logits.equal(want)
    assert all(layer.original is None for layer in swapped(loaded).values())
    assert list(swapped(loaded)) == list(swapped(model))
    assert loaded.config.tie_word_embeddings == (
        loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    )
    assert loaded.dtype == dtype
    loaded.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert flacompile.load(tmp_path / "again")(prompt()).logits.equal(want)


def test_loads_in_another_process(converted, tmp_path):
    model = converted("llama", "gla")
    model.save_pretrained(tmp_path)
    torch.save(prompt(), tmp_path / "ids.pt")
    files = [str(tmp_path / name) for name in (".", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", READ, *files], check=True, timeout=120)
    with torch.no_grad():
        assert torch.load(tmp_path / "logits.pt").equal(model(prompt()).logits)


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def edit_recipe(path, change):
    recipe = json.loads((path / "flacompile.json").read_text())
    change(recipe)
    (path / "flacompile.json").write_text(json.dumps(recipe))


def first(recipe):
    return next(iter(recipe["layers"].values()))


BROKEN = {
    "no recipe": (lambda p: (p / "flacompile.json").unlink(), "a folder with flacompile.json"),
    "cut recipe": (lambda p: cut(p / "flacompile.json"), "flacompile.json"),
    "recipe without layers": (lambda p: edit_recipe(p, lambda r: r.clear()), "flacompile.json"),
    "unknown mixer": (
        lambda p: edit_recipe(p, lambda r: first(r).update(mixer="mamba9")),
        "flacompile.json.*mamba9",
    ),
    "unknown field": (
        lambda p: edit_recipe(p, lambda r: first(r)["config"].update(colour=1)),
        "flacompile.json.*colour",
    ),
    "another shape": (
        lambda p: edit_recipe(p, lambda r: first(r)["config"].update(gate_low_rank_dim=3)),
        "gk_proj",
    ),
    "no such layer": (
        lambda p: edit_recipe(p, lambda r: r["layers"].update({"model.layers.9.x": first(r)})),
        "flacompile.json.*model.layers.9.x",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json"),
    "cut config": (lambda p: cut(p / "config.json"), "config.json"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "missing"),
    "cut weights": (lambda p: cut(p / "model.safetensors"), "model.safetensors"),
}


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    converted("llama", "gla").save_pretrained(path)
    return path


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folder(folder, tmp_path, damage, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        flacompile.load(tmp_path)


def test_lost_head_is_noticed(folder, tmp_path):
    """transformers lists the head among tied weights even where this model does not tie it."""
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
        flacompile.load(tmp_path)


def test_only_converted_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="expected a converted model, got LlamaForCausalLM"):
        flacompile.save(llama()().model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_copies_are_independent(converted):
    model = converted("llama", "gla")
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(swapped(other).values())).mixer.o_proj.weight.zero_()
        assert not other(prompt()).logits.equal(model(prompt()).logits)
