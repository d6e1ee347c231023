"""Converted transformers models generate and are cached as any other."""

from __future__ import annotations

import pytest
import torch
from models import MODELS, VOCAB
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

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
    """And gives the text that the whole, run again for every token, gives."""
    model = converted("llama", mixer)
    options = {"return_dict_in_generate": True}
    outs = [generate(model, prompt(), count, **options) for count in (10, 50)]
    if mixer != "bitattn":  # where an ulp may be a step of 1/127
        assert outs[0].sequences.equal(argmax_loop(model, prompt(), 10))
    sizes = [state_size(out.past_key_values) for out in outs]
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
        with pytest.raises(ValueError, match="expected a cache that takes keys, got one of a"):
            MODELS["llama"]().model(ids, past_key_values=cache)


def test_empty_caches_are_taken_over_and_reset(converted):
    model, cache = converted("llama", "gla"), DynamicCache()
    with torch.no_grad():
        want = model(prompt(), past_key_values=cache).logits
        assert all(isinstance(layer, StateLayer) for layer in cache.layers)
        cache.reset()
        assert model(prompt(), past_key_values=cache).logits.equal(want)


def sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@pytest.mark.parametrize(("name", "mixer"), PAIRS)
def test_sampled_text_is_that_of_a_loop(converted, name, mixer):
    model, ids, generator = converted(name, mixer), prompt(), torch.default_generator
    torch.manual_seed(3)
    got = model.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=0)
    torch.manual_seed(3)
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat((ids, sample(model(ids, use_cache=False).logits[:, -1], generator)), 1)
    assert got.equal(ids)


STATIC = [
    *(("llama", "gla", keep, pad) for keep in ((), (0,), (1,)) for pad in (0, 3)),
    *(("mistral", "gla", keep, 3) for keep in ((), (0,), (1,))),
    ("gpt2", "linear_attn", (0,), 3),
    ("llama", "attn", (), 3),
]


@pytest.mark.parametrize(("name", "mixer", "keep", "pad"), STATIC)
def test_static_cache(converted, name, mixer, keep, pad):
    """Also with softmax layers kept, on either side, and past the sliding window of 8."""
    model, mask = converted(name, mixer, keep), torch.ones(2, 11, dtype=torch.long)
    mask[0, :pad] = 0
    ids = prompt().where(mask.bool(), 0)
    want = generate(model, ids, attention_mask=mask, use_cache=False)
    for implementation in ("static", "dynamic"):
        options = {"cache_implementation": implementation, "attention_mask": mask}
        assert generate(model, ids, **options).equal(want), implementation


REFUSED = {
    "assistant": lambda: {"assistant_model": MODELS["llama"]().model},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_assisted_decoding_is_refused(converted, options):
    with pytest.raises(ValueError, match=r"a state cannot step back .* generate without them"):
        generate(converted("llama", "gla"), prompt(1), **options())


def test_converted_assistant_is_refused(converted):
    with pytest.raises(ValueError, match=r"a state cannot forget.* generate without"):
        generate(MODELS["llama"]().model, prompt(1), assistant_model=converted("llama", "gla"))


COMPILED = [
    ("llama", "gla", (), False, False),
    ("llama", "gla", (0,), True, False),
    ("llama", "mamba2", (1,), True, True),
    ("gpt2", "linear_attn", (), False, True),
]


@pytest.mark.parametrize(("name", "mixer", "keep", "static", "padded"), COMPILED)
def test_decoding_compiles_once(converted, name, mixer, keep, static, padded):
    """One graph, and one more where a length turns out to change; none for a later token."""
    model, ids, counts = converted(name, mixer, keep), prompt(), []
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    mask = torch.ones(2, 11 + NEW, dtype=torch.long)
    mask[0, : 3 * padded] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache = StaticCache(model.config, max_cache_len=32) if static else DynamicCache()
    want = generate(model, ids, NEW + 1, attention_mask=mask[:, :11])
    with torch.no_grad():
        for end in range(11, 12 + NEW):
            call, begin = (step, end - 1) if end > 11 else (model, 0)
            logits = call(
                ids[:, begin:].contiguous(),
                attention_mask=mask[:, :end].contiguous(),
                position_ids=position[:, begin:end].contiguous(),
                past_key_values=cache,
            ).logits
            ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), 1)
            counts.append(counter.frame_count)
    assert ids.equal(want)
    assert counts[1] == 1
    assert counts[-1] == counts[2] <= 2


def test_padded_rows_of_any_length_compile_once(converted):
    """A forward with a loss, softmax kept in one layer."""
    model, counter = converted("llama", "gla", (0,)), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for time in (12, 19, 33):
        mask = (torch.arange(time) >= torch.tensor([[0], [5]])).long()
        ids = prompt(2, time)
        options = {"attention_mask": mask, "use_cache": False, "labels": ids}
        torch.testing.assert_close(compiled(ids, **options).loss, model(ids, **options).loss)
    assert counter.frame_count == 1


@pytest.mark.parametrize("static", [False, True])
def test_cache_of_a_hybrid_grows_by_its_softmax_layers(converted, static):
    model, sizes = converted("llama", "gla", (0,)), []
    for count in (10, 30):
        options = {"return_dict_in_generate": True}
        options |= {"cache_implementation": "static"} if static else {}
        cache = generate(model, prompt(), count, **options).past_key_values
        kept, state = cache.layers
        leaves = torch.utils._pytree.tree_leaves(state.state)
        sizes.append((kept.keys.numel(), sum(leaf.numel() for leaf in leaves)))
    heads, head_dim = 2, 8
    assert sizes[1][0] - sizes[0][0] == 20 * 2 * heads * head_dim
    assert sizes[1][1] == sizes[0][1]
