"""The published model types: their checkpoints load, and mean what their equations say."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from mixer_inputs import close
from published_models import IDS, KEPT, PATH, weights
from safetensors.torch import load_file, save_file
from textbook import TEXTBOOK
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from flacompile import lm
from flacompile.layers import Attention
from flacompile.layers.base import RecurrentMixer
from flacompile.lm.kinds import KINDS, OWN

PUBLISHED = json.loads(PATH.read_text())
TAKEN = {"bitnet", "mamba", "mamba2"}  # names that transformers has itself
CASES = [
    pytest.param(entry, id=f"{name}-{i}")
    for name, (_, *entries) in PUBLISHED.items()
    for i, entry in enumerate(entries)
]
LAST = {name: entries[-1] for name, entries in PUBLISHED.items()}
over_cases = pytest.mark.parametrize("entry", CASES)
over_types = pytest.mark.parametrize("name", PUBLISHED)
NEW = 5


def write(folder: Path, entry: dict, **changed) -> dict[str, torch.Tensor]:
    """A checkpoint as the published class leaves it, with random weights."""
    (folder / "config.json").write_text(json.dumps(entry["config"] | changed))
    made = weights(entry["state_dict"])
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of each type in float64, loaded once."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            write(folder, LAST[name])
            made[name] = lm.from_pretrained(folder).double()
        return made[name]

    return get


def prompt(batch: int = 2, time: int = 11) -> torch.Tensor:
    return torch.randint(1, 97, (batch, time), generator=torch.Generator().manual_seed(5))


def generate(model, ids, count: int = NEW, **options):
    """Without a token that ends a text, greedy where nothing else is said."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.generate(
        ids, **{"attention_mask": torch.ones_like(ids), "do_sample": False} | options,
        max_new_tokens=count,
    )  # fmt: skip


@over_types
def test_defaults_are_the_published(name):
    """A config.json that says nothing but its depth gives the published config and shapes."""
    config, shapes = PUBLISHED[name][0]["config"], PUBLISHED[name][0]["state_dict"]
    given = {key: config[key] for key in config.keys() & {"num_hidden_layers", "attn"}}
    ours = lm.MODELS[name][0](**given)
    known = json.loads(ours.to_json_string())
    for key in KINDS[name].defaults.keys() & config.keys():
        derived = known[key] in (None, "auto")  # from other fields, as the shapes show
        assert derived or known[key] == config[key], key
    with torch.device("meta"):
        model = lm.MODELS[name][2](ours)
    assert {key: list(x.shape) for key, x in model.state_dict().items()} == shapes


@over_cases
def test_published_checkpoints_load(entry, tmp_path):
    name, written = entry["config"]["model_type"], write(tmp_path, entry)
    loaders = [lm.from_pretrained]
    if name not in TAKEN:
        loaders.append(AutoModelForCausalLM.from_pretrained)
    for load in loaders:
        model = load(tmp_path)
        assert type(model).__name__ == f"{KINDS[name].stem}ForCausalLM"
        state = model.state_dict()
        if entry["config"]["tie_word_embeddings"]:
            assert model.lm_head.weight is model.get_input_embeddings().weight
            del state["lm_head.weight"]
        assert state.keys() == written.keys()
        assert all(state[key].equal(written[key]) for key in written)
        assert generate(model, prompt(1, 4), 2).shape == (1, 6)


@pytest.mark.parametrize("entry", [c for c in CASES if "logits" in c.values[0]])
def test_logits_are_the_published(entry, tmp_path):
    """Those of the published classes' own kernels, interpreted."""
    write(tmp_path, entry)
    with torch.no_grad():
        got = lm.from_pretrained(tmp_path)(IDS).logits[0, -1, :KEPT]
    assert close(got, torch.tensor(entry["logits"]))


@over_cases
def test_logits_are_the_equations(entry, tmp_path):
    write(tmp_path, entry, norm_eps=1e-5)
    model, ids = lm.from_pretrained(tmp_path).double(), prompt(2, 9)
    with torch.no_grad():
        assert close(model(ids).logits, by_hand(copy.deepcopy(model), ids))


@pytest.mark.parametrize("name", OWN)
def test_types_of_layers_published_alone(name, tmp_path):
    """Their equations, a text with a cache and without, and what a folder of theirs gives."""
    config, _, model = lm.MODELS[name]
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}
    made, ids = model(config(**sizes, norm_eps=1e-5)).double(), prompt(2, 9)
    for p in made.parameters():
        torch.nn.init.normal_(p, p.mean().item(), 0.3)
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        assert close((got, got), (made(ids).logits, by_hand(copy.deepcopy(made), ids)))
    assert generate(made, ids).equal(generate(made, ids, use_cache=False))


def normed(w, name, x):
    """RMS norm, or where the published model has one, layer norm."""
    if KINDS[w["type"]].ffn in ("rwkv6", "rwkv7"):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], 1e-5)


def by_hand(model, ids):
    """The model by the names of its weights, its mixers by the loops of the textbook."""
    config, names = model.config, KINDS[model.config.model_type].names
    w, root, v_first = {**model.state_dict(), "type": config.model_type}, names.backbone, None
    x = w[f"{root}.embeddings.weight"][ids]
    if f"{root}.lower_bounds" in w:
        bounds = w[f"{root}.lower_bounds"].softmax(0).cumsum(0)
    for i in range(config.num_hidden_layers):
        at = f"{root}.layers.{i}"
        m = model.get_submodule(f"{at}.{names.mixer}")
        if hasattr(m, "forget") and f"{root}.lower_bounds" in w:
            m.forget.lower_bound = bounds[i] - bounds[0]
        x = normed(w, f"{at}.pre_norm", x) if f"{at}.pre_norm.weight" in w else x
        h, loop = normed(w, f"{at}.{names.norm}", x), TEXTBOOK[KINDS[config.model_type].mixer]
        loop = TEXTBOOK["attn"] if type(m) is Attention else loop
        x = x + (loop(m, h) if v_first is None else loop(m, h, v_first))
        if config.model_type == "rwkv7" and i == 0:
            v_first = m.v_proj(h + (before(h) - h) * m.x_v)
        if KINDS[config.model_type].ffn is not None:
            x = x + feed_forward(w, f"{at}.{names.ffn}", normed(w, f"{at}.{names.ffn_norm}", x))
    return normed(w, f"{root}.{names.last}", x) @ w["lm_head.weight"].T


def before(x):
    return F.pad(x, (0, 0, 1, -1))


def feed_forward(w, at, x):
    def mixed(mu):
        return x + (before(x) - x) * w[f"{at}.{mu}"]

    if KINDS[w["type"]].ffn == "gated":
        gate, up, down = (w[f"{at}.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        return (F.silu(x @ gate) * (x @ up)) @ down
    if w["type"] == "rwkv7":
        return (mixed("x_k") @ w[f"{at}.key.weight"].T).relu() ** 2 @ w[f"{at}.value.weight"].T
    k = (mixed("key.mu") @ w[f"{at}.key.linear.weight"].T).relu() ** 2
    r = torch.sigmoid(mixed("receptance.mu") @ w[f"{at}.receptance.linear.weight"].T)
    return r * (k @ w[f"{at}.value.weight"].T)


@over_types
def test_greedy_and_beams_with_a_cache_are_those_without(models, name):
    model, ids = models(name), prompt()
    want = ids
    for _ in range(NEW):
        with torch.no_grad():
            last = model(want, use_cache=False).logits[:, -1]
        want = torch.cat((want, last.argmax(-1, keepdim=True)), 1)
    assert generate(model, ids).equal(want)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    want = generate(model, ids, use_cache=False, **beams)
    assert generate(model, ids, **beams).equal(want)
    assert generate(model, ids, cache_implementation="static", **beams).equal(want)


@over_types
def test_padded_batch_is_each_prompt_alone(models, name):
    model, ids, pads = models(name), prompt(3), (0, 4, 7)
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
    got = generate(model, ids.where(mask.bool(), 0), attention_mask=mask)
    for row, pad in enumerate(pads):
        assert got[row : row + 1, pad:].equal(generate(model, ids[row : row + 1, pad:])), row


@over_types
def test_text_in_pieces_and_packed_is_the_whole(models, name):
    model, ids, cache, pieces = models(name), prompt(1, 17), None, []
    with torch.no_grad():
        whole = model(ids).logits
        for piece in ids.split((6, 1, 9, 1), 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        packed = model(torch.cat((ids[:, :7], ids), 1), cu_seqlens=torch.tensor([0, 7, 24])).logits
    assert close(torch.cat(pieces, 1), whole) and cache.get_seq_length() == 17
    assert close(packed[:, 7:], whole) and close(packed[:, :7], whole[:, :7])


@over_types
def test_states_do_not_grow(models, name):
    sizes = {}
    for count in (3, 12):
        out = generate(models(name), prompt(), count, return_dict_in_generate=True)
        for i, layer in enumerate(out.past_key_values.layers):
            leaves = torch.utils._pytree.tree_leaves(layer.state)
            sizes.setdefault(i, []).append(sum(leaf.numel() for leaf in leaves))
    names = KINDS[name].names
    for i, (short, long) in sizes.items():
        mixer = models(name).base_model.layers[i].get_submodule(names.mixer)
        windowed = getattr(mixer, "window_size", None) is not None
        assert (short == long) == (isinstance(mixer, RecurrentMixer) or windowed), i


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@over_types
def test_training(models, name):
    """The loss is that of the next token; checkpointing changes no gradient, and each has one."""
    model, ids, gradients = copy.deepcopy(models(name)).train(), prompt(), []
    labels = ids.masked_fill(torch.arange(11) < 3, -100)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(ids, labels=labels)
        want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert close(out.loss, want) and out.past_key_values is None
        model.zero_grad()
        out.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    assert close(*gradients)


@pytest.mark.parametrize("name", ["gla", "hgrn", "rwkv7"])
def test_one_graph_for_any_length(models, name):
    model, counter = models(name), torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for time in (5, 9, 14):
            ids, mask = prompt(2, time), (torch.arange(time) >= torch.tensor([[0], [3]])).long()
            options = {"attention_mask": mask, "use_cache": False}
            assert close(compiled(ids, **options).logits, model(ids, **options).logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["gla", "rwkv6", "hgrn2", "mla", "mamba2"])
def test_saved_is_loaded(models, name, tmp_path):
    model, ids = models(name), prompt()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model(ids).logits
        assert lm.from_pretrained(tmp_path)(ids).logits.equal(want)
        assert lm.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits.dtype == torch.float32
        if name not in TAKEN:
            backbone = AutoModel.from_pretrained(tmp_path)
            assert backbone(ids).last_hidden_state.equal(model.base_model(ids).last_hidden_state)


def test_half_precision_keeps_tables_exact(tmp_path):
    """Frequencies of a rotary embedding stay fp32 however the model comes to its dtype."""
    write(tmp_path, LAST["transformer"])
    config = AutoConfig.from_pretrained(tmp_path)
    exact = AutoModelForCausalLM.from_config(config).model.layers[0].attn.rotary.inv_freq
    for model in (
        lm.from_pretrained(tmp_path, dtype=torch.bfloat16),
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
    ):
        assert model.dtype == torch.bfloat16
        assert model.model.layers[0].attn.rotary.inv_freq.equal(exact)


def test_sampling_continues_and_hidden_states(models):
    model, ids = models("gla"), prompt()
    torch.manual_seed(1)
    drawn = generate(model, ids, do_sample=True)
    torch.manual_seed(1)
    assert generate(model, ids, do_sample=True).equal(drawn)
    assert not generate(model, ids).equal(drawn)
    first, whole = generate(model, ids, return_dict_in_generate=True), generate(model, ids, 2 * NEW)
    assert generate(model, first.sequences, past_key_values=first.past_key_values).equal(whole)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=2)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert out.hidden_states[0].equal(model.get_input_embeddings()(ids))
    torch.testing.assert_close(embedded.logits, out.logits[:, -2:])  # products of other shapes


READ = """
import sys, flacompile
assert "transformers" not in sys.modules
from transformers import LlamaForCausalLM, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__module__, type(model).__name__)
"""


def test_importing_flacompile_is_enough(tmp_path):
    """Also where transformers reads its Auto classes for one of its own models."""
    write(tmp_path, LAST["gla"])
    run = [sys.executable, "-c", READ, str(tmp_path)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert printed == "flacompile.lm GLAForCausalLM\n"


def test_classes_are_found_by_name(models):
    assert lm.GLAForCausalLM.config_class is lm.GLAConfig
    assert pickle.loads(pickle.dumps(models("gla").config)).attn == models("gla").config.attn
    with pytest.raises(AttributeError, match="has no attribute 'GLB'"):
        _ = lm.GLB


def test_names_that_transformers_has_stay_its_own():
    for name in PUBLISHED:
        ours = AutoConfig.for_model(name).__class__ is lm.MODELS[name][0]
        assert ours == (name not in TAKEN), name


REFUSED = {
    "attnres": ("gla", {"attnres_block_size": 2}, "attnres_block_size: expected None, got 2"),
    "activation": ("gla", {"hidden_act": "powlu"}, "expected.*got 'powlu'|got powlu"),
    "channel mix": ("rwkv6", {"hidden_act": "swish"}, "hidden_act: expected 'sqrelu', got swish"),
    "no such layer": ("gla", {"attn": {"layers": [9], "num_heads": 2}}, "attn: expected layers 0"),
    "twice": ("gla", {"attn": [{"layers": [1], "num_heads": 2}] * 2}, "attn: expected layers 0"),
    "no heads": ("gla", {"attn": {"layers": [1]}}, "attn: expected layers and num_heads"),
    "first values": ("rwkv7", {"attn": {"layers": [0], "num_heads": 2}}, "attn: expected layers"),
    "q/k norm": ("delta_net", {"qk_norm": "sum"}, "qk_norm: expected 'l2', got sum"),
    "type": ("gla", {"model_type": "retnet"}, "model_type: expected one of .*got retnet"),
}


@pytest.mark.parametrize(("name", "changed", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_configs(name, changed, message, tmp_path):
    write(tmp_path, LAST[name], **changed)
    with pytest.raises(ValueError, match=message):
        lm.from_pretrained(tmp_path)


def test_refused_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a config.json"):
        lm.from_pretrained(tmp_path)
    write(tmp_path, LAST["gla"])
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    damages = {
        "missing": {k: v for k, v in whole.items() if "mlp.up_proj" not in k},
        "unexpected": {**whole, "model.layers.0.attn.colour": torch.ones(3)},
        "mlp.up_proj": {k: v[:3] if "mlp.up_proj" in k else v for k, v in whole.items()},
        "RMSNorm": {k: v for k, v in whole.items() if k != "model.norm.weight"},
    }
    for message, damaged in damages.items():
        save_file(damaged, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            lm.from_pretrained(tmp_path)


def test_refused_calls(models):
    model, ids = models("gla"), prompt()
    with pytest.raises(ValueError, match="input_ids: expected this or inputs_embeds, got None"):
        model()
    with pytest.raises(ValueError, match="input_ids: expected this or inputs_embeds, got both"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        generate(model, ids[:1], assistant_model=model)


def test_needs_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flacompile.lm")
    with pytest.raises(ImportError, match=r"pip install 'flacompile\[hf\]'"):
        importlib.import_module("flacompile.lm")
