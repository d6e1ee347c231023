"""Every mixer of the registry, in every variant of its config, against the same demands."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from mixer_cases import PUBLISHED, SIZES, variants
from mixer_inputs import HALVES, WIDTH, close, draw
from textbook import TEXTBOOK
from torch.utils._pytree import tree_map

from flacompile.blocks import Rotary
from flacompile.layers import MIXERS, AttentionState, cu_seqlens_from_mask, pad, unpad
from flacompile.layers.base import RecurrentMixer
from flacompile.layers.entries import from_entry, to_entry
from flacompile.layers.qkv import QKVMixer
from flacompile.passes.decompose import decompose
from flacompile.yarn import RopeScaling

CASES = [
    pytest.param(name, fields, id=f"{name}-{case}")
    for name in MIXERS
    for case, fields in variants(name).items()
]
EXTREMES = [(torch.float32, 0.0), (torch.float32, 1e3), (torch.float16, 0.0), (torch.float16, 1.0)]
over_cases = pytest.mark.parametrize(("name", "fields"), CASES)
over_mixers = pytest.mark.parametrize("name", MIXERS)
ONE_OF_EACH_OP = ("attn", "gated_deltanet", "gla", "hgrn", "mamba", "rwkv7")  # slow
ONE_OF_EACH_PLACE = ("attn", "hybrid", "lightnet", "rwkv6")  # where masks and packs are read
ROUNDED = ("bitattn",)  # where an ulp may be a step of 1/127


def build(name: str, fields: dict | None = None, dtype=torch.float64):
    torch.manual_seed(0)
    cls = MIXERS[name]
    sizes = SIZES.get(name, {"num_heads": 4} if issubclass(cls, QKVMixer) else {})
    mixer = cls(cls.Config(**({"hidden_size": WIDTH} | sizes | (fields or {}))))
    for parameter in mixer.parameters():  # so that no weight is one and no bias zero
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    return mixer.to(dtype)


def compiled_dtype(name: str) -> torch.dtype:
    """float64 where two orders of the same sums in fp32 would not agree to 1e-5.

    A product of reflections (beta up to two) forgets nothing, neither does it forget rounding.
    """
    return torch.float64 if name in (*ROUNDED, "gated_deltaproduct") else torch.float32


def first(name: str) -> dict:
    """The config of a mixer that is compiled: grouped heads and rotary where it has them."""
    if issubclass(MIXERS[name], QKVMixer):
        return {"num_kv_heads": 2, "rotary": HALVES}
    return next(iter(variants(name).values()))


def row(state, i: int):
    """The state of sequence i alone."""
    return torch.utils._pytree.tree_map(lambda t: t[i : i + 1], state)


def continues_alike(mixer, a, b) -> bool:
    """Whether two states give the same outputs from here on."""
    x = draw(a.position.shape[0], 4, next(mixer.parameters()).dtype)
    return bool((a.position == b.position).all()) and close(mixer(x, a)[0], mixer(x, b)[0])


def test_every_mixer_has_its_loop():
    assert set(TEXTBOOK) == set(MIXERS)


def values_and_gradients(function, mixer, x):
    """y, and the gradients of a weighted sum of it for x and every parameter, in float64."""
    x = x.detach().requires_grad_()
    y = function(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    inputs = (x, *mixer.parameters())
    return [g.double() for g in (y, *torch.autograd.grad(loss, inputs, materialize_grads=True))]


@over_cases
def test_textbook(name, fields):
    mixer, x, loop = build(name, fields), draw(2, 21), TEXTBOOK[name]
    got = values_and_gradients(lambda x: mixer(x)[0], mixer, x)
    assert close(got, values_and_gradients(lambda x: loop(mixer, x), mixer, x))


@over_cases
def test_textbook_fp32(name, fields):
    """As near to the loop in float64 as the loop in fp32 is, within a factor of two.

    A closed form's gradient of a decay is a sum whose terms cancel, hence the last term; how much
    is lost depends on the processor. Of what is rounded to steps so few numbers are taken that none
    lies within ulps of the edge of one.
    """
    exact, mixer = build(name, fields), build(name, fields, torch.float32)
    rows, time = (1, 3) if name in ROUNDED else (2, 21)
    x, loop = draw(rows, time, torch.float32), TEXTBOOK[name]
    exact.load_state_dict(mixer.state_dict())
    got = values_and_gradients(lambda x: mixer(x)[0], mixer, x)
    same = values_and_gradients(lambda x: loop(mixer, x), mixer, x)
    want = values_and_gradients(lambda x: loop(exact, x), exact, x.double())
    for a, b, c in zip(got, same, want, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-4 * (1 + c.norm())


@over_cases
def test_step_is_sequence(name, fields):
    mixer, x = build(name, fields), draw(2, 13)
    want, want_state = mixer(x)
    state, outputs = mixer.init_state(2), []
    for token in x.unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y)
    assert close(torch.stack(outputs, 1), want)
    assert continues_alike(mixer, state, want_state)


@over_cases
@pytest.mark.parametrize("cut", [1, 2, 9])
def test_split_is_whole(name, fields, cut):
    mixer, x = build(name, fields), draw(2, 13)
    want, want_state = mixer(x)
    first, state = mixer(x[:, :cut])
    second, state = mixer(x[:, cut:], state)
    assert close(torch.cat((first, second), 1), want)
    assert continues_alike(mixer, state, want_state)


@over_cases
def test_packed_is_separate(name, fields):
    """Sequences of 2, 7, 0 and 4 tokens, then as many again on the states of the first."""
    mixer, x = build(name, fields), draw(1, 13)
    bounds = [0, 2, 9, 9, 13]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    state, alone = None, [None] * 4
    for _ in range(2):
        y, state = mixer(x, state, cu_seqlens=cu_seqlens)
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            if start < end:
                want, alone[i] = mixer(x[:, start:end], alone[i])
                assert close(y[:, start:end], want)
                assert continues_alike(mixer, row(state, i), alone[i])
    assert continues_alike(mixer, row(state, 2), mixer.init_state(1))


@over_cases
def test_no_tokens_change_nothing(name, fields):
    """A call of none, alone and as a pack, before the first token and after some."""
    mixer, past = build(name, fields), draw(2, 9)
    after = mixer(past)[1]
    for state in (None, after):
        for rows, bounds in ((2, None), (1, torch.tensor([0, 0, 0]))):
            y, got = mixer(past[:rows, :0], state, cu_seqlens=bounds)
            assert y.shape == (rows, 0, WIDTH)
            assert continues_alike(mixer, got, mixer.init_state(2) if state is None else state)


@over_cases
def test_padding_is_inert(name, fields):
    """Left, right and scattered padding, before and after a carried state."""
    mixer, x = build(name, fields), draw(3, 11)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, :6], mask[1, 3:], mask[2, [0, 4, 5, 10]] = False, False, False
    x = torch.where(mask[..., None], x, 1e3)
    state, alone = None, [None] * 3
    for _ in range(2):
        y, state = mixer(x, state, mask=mask)
        for i in range(3):
            want, alone[i] = mixer(x[i : i + 1, mask[i]], alone[i])
            assert close(y[i : i + 1, mask[i]], want)
            assert continues_alike(mixer, row(state, i), alone[i])
        assert not y[~mask].any()


@over_mixers
def test_padding_takes_no_gradient(name):
    mixer, x = build(name), draw(2, 9).requires_grad_()
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 6 + [0] * 3])
    mixer(x, mask=mask)[0].square().sum().backward()
    assert not x.grad[mask == 0].any() and x.grad[mask == 1].any(-1).all()


@pytest.mark.slow
@over_mixers
def test_compiled_is_eager(name):
    """One graph for any T, forward and backward; by Inductor for a mixer of each op."""
    torch._dynamo.reset()
    mixer = build(name, first(name), compiled_dtype(name))
    backend = "inductor" if name in ONE_OF_EACH_OP else "aot_eager"
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=backend)
    for time in (50, 77):
        x = draw(2, time, compiled_dtype(name)).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=time > 50):
            got, want = compiled(x), mixer(x)
            assert close(got, want)
            inputs = (x, *mixer.parameters())
            a, b = (torch.autograd.grad(y[0].square().sum(), inputs) for y in (got, want))
        assert close(a, b)


CALLS = {  # x, mask and bounds of T tokens
    "mask": lambda x: (x, {"mask": torch.arange(x.shape[1]) >= torch.tensor([[0], [3]])}),
    "pack": lambda x: (x[:1], {"cu_seqlens": torch.arange(0, x.shape[1] + 1, 9)}),
}


@pytest.mark.parametrize("name", ONE_OF_EACH_PLACE)
@pytest.mark.parametrize("call", CALLS)
def test_masks_and_packs_compile(name, call):
    """One graph for any T, and for any number of sequences."""
    torch._dynamo.reset()
    mixer = build(name, first(name))
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="eager")
    for time in (45, 72):
        x, options = CALLS[call](draw(2, time))
        with torch._dynamo.config.patch(error_on_recompile=time > 45):
            assert close(compiled(x, **options), mixer(x, **options))


@over_mixers
def test_step_compiles(name):
    """In one graph; a step is PyTorch's own operations, which Inductor need not be tried on."""
    torch._dynamo.reset()
    mixer = build(name, first(name), compiled_dtype(name))
    x, past = (draw(2, time, compiled_dtype(name)) for time in (9, 8))
    state = mixer(past)[1]
    step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    assert close(step(x[:, 0], state), mixer.step(x[:, 0], state))


@over_mixers
def test_export_is_eager(name):
    """One graph of aten operations, right at any B and T, after tokens that the state holds."""
    mixer = build(name, first(name), compiled_dtype(name))
    batch, time = torch.export.Dim("B", min=1), torch.export.Dim("T", min=1)
    pasts = {rows: mixer(draw(rows, 9, compiled_dtype(name)))[1] for rows in (1, 2, 3)}
    shapes = ({0: batch, 1: time}, tree_map(lambda _: {0: batch}, pasts[2]))
    inputs = (draw(2, 200, compiled_dtype(name)), pasts[2])
    program = torch.export.export(mixer, inputs, dynamic_shapes=shapes, strict=False)
    opened = decompose(program).module(check_guards=False)  # the values are checked
    for rows, length in ((2, 200), (1, 1), (3, 50), (1, 65), (2, 300)):
        x = draw(rows, length, compiled_dtype(name))
        assert close(opened(x, pasts[rows]), mixer(x, pasts[rows])), (rows, length)


@over_mixers
@pytest.mark.parametrize(("dtype", "size"), EXTREMES)
def test_extreme_inputs_stay_finite(name, dtype, size):
    """Zero, as large as squares of them fit the dtype, and infinitely forgetful gates."""
    mixer = build(name, first(name), dtype)
    x = (draw(2, 300, dtype) * size).requires_grad_()
    y, state = mixer(x)
    loss = 1e-3 * y.float().mean()  # scaled, as one trains in fp16
    found = torch.autograd.grad(loss, (x, *mixer.parameters()), materialize_grads=True)
    assert y.isfinite().all() and all(g.isfinite().all() for g in found)
    assert all(s.isfinite().all() for s in torch.utils._pytree.tree_leaves(state))


@over_mixers
def test_long_sequences(name):
    """32 thousand tokens in one call are those in two; softmax is asked for fewer."""
    mixer, time = build(name, first(name), compiled_dtype(name)), 2**15
    time = time if issubclass(MIXERS[name], RecurrentMixer) else 2**11
    x = draw(1, time, compiled_dtype(name))
    with torch.no_grad():
        whole, _ = mixer(x)
        start, state = mixer(x[:, : time - 700])
        end, _ = mixer(x[:, time - 700 :], state)
    assert close(torch.cat((start, end), 1), whole)


@over_mixers
def test_half_precision(name):
    """bf16 parameters: outputs bf16, recurrent states fp32, rotary frequencies fp32."""
    exact, mixer = build(name, first(name)), build(name, first(name), torch.bfloat16)
    exact.load_state_dict(mixer.state_dict())
    y, state = mixer(draw(2, 30).bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - exact(draw(2, 30))[0]).norm() < 0.05 * y.norm()
    assert all(x.dtype == torch.float32 for x in getattr(state, "recurrent", ()))
    assert all(m.inv_freq.dtype == torch.float32 for m in mixer.modules() if isinstance(m, Rotary))
    assert mixer.step(draw(2, 1)[:, 0].bfloat16(), state)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        pytest.param(name, layer, id=f"{name}-{i}")
        for name in MIXERS
        for i, layer in enumerate(PUBLISHED.get(name, ()))
    ],
)
def test_published_checkpoints_fit(name, layer):
    with torch.device("meta"):
        fields = dict(layer["config"])
        if "rope_scaling" in fields:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        mixer = MIXERS[name](MIXERS[name].Config(**fields))
        published = {key: torch.empty(shape) for key, shape in layer["state_dict"].items()}
    mixer.load_state_dict(published, strict=True, assign=True)


@over_mixers
def test_bad_input(name):
    mixer, x = build(name), draw(2, 5)
    state = mixer(x)[1]
    other = build("gla" if MIXERS[name].State is AttentionState else "attn")(x)[1]
    mask, cu_seqlens = torch.ones(2, 5).bool(), torch.tensor([0, 2, 5])
    for argument, call in {
        "x: expected a last dimension of 48, got (2, 5, 47)": lambda: mixer(x[..., 1:]),
        "x: expected shape [B, T, D], got (5, 48)": lambda: mixer(x[0]),
        "x: expected shape [B, D], got (2, 5, 48)": lambda: mixer.step(x, state),
        "x: expected a batch of 1 with cu_seqlens, got 2": lambda: mixer(x, cu_seqlens=cu_seqlens),
        "cu_seqlens: expected int32 or int64": lambda: mixer(x[:1], cu_seqlens=cu_seqlens.float()),
        "cu_seqlens: expected shape [N + 1]": lambda: mixer(x[:1], cu_seqlens=cu_seqlens[None]),
        "cu_seqlens: expected at least one": lambda: mixer(x[:1], cu_seqlens=cu_seqlens[:1]),
        "mask: expected None with": lambda: mixer(x, mask=mask, cu_seqlens=cu_seqlens),
        "mask: expected shape (2, 5), got (2, 4)": lambda: mixer(x, mask=mask[:, 1:]),
        "state: expected": lambda: mixer(x, other),
        "state: expected ": lambda: mixer.step(x[:, 0], None),
        "state.": lambda: mixer(x[:1], state),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(argument)


def test_bad_recurrent_dtype():
    mixer = build("gla", dtype=torch.float32)
    state = mixer.init_state(2)
    state = state._replace(recurrent=(state.recurrent[0].bfloat16(),))
    with pytest.raises(ValueError, match=r"state\.recurrent\[0\]: expected torch\.float32"):
        mixer(draw(2, 3, torch.float32), state)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gla", {"num_kv_heads": 3}, "num_kv_heads: expected a divisor of 4, got 3"),
        ("gla", {"rotary": HALVES, "head_dim": 4}, "rotary: expected at most 4 channels"),
        ("gla", {"gate_fn": "sin"}, "activation: expected one of"),
        ("linear_attn", {"feature_map": "sin"}, "feature_map: expected one of"),
        ("linear_attn", {"output_norm": "sin"}, "output_norm: expected one of"),
    ],
)
def test_bad_config(name, fields, message):
    with pytest.raises(ValueError, match=message):
        build(name, fields)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MIXERS["gla"].Config().num_heads = 2


@pytest.mark.parametrize("left", [False, True])
def test_pad_unpad(left):
    x, lengths = draw(3, 6).requires_grad_(), torch.tensor([4, 6, 1])
    mask = torch.arange(6) < lengths[:, None]
    mask = mask.flip(1) if left else mask
    packed, cu_seqlens, indices = unpad(x, mask)
    assert cu_seqlens.tolist() == cu_seqlens_from_mask(mask).tolist() == [0, 4, 10, 11]
    assert close(packed[0], x[mask])
    back = torch.zeros(18, WIDTH).double().index_copy(0, indices, packed[0]).view(3, 6, WIDTH)
    assert close(back, torch.where(mask[..., None], x, 0.0))
    padded = pad(packed, cu_seqlens, 6)
    assert close(padded[torch.arange(6) < lengths[:, None]], x[mask])
    assert math.isclose(padded.square().sum().item(), x[mask].square().sum().item())
    padded.sum().backward()
    assert close(x.grad, mask[..., None].expand(3, 6, WIDTH).double())


@over_mixers
def test_autocast(name):
    """Products in bf16, states and gradients in fp32, near what fp32 gives."""
    mixer = build(name, first(name), torch.float32)
    x = draw(2, 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        (token, _) = mixer.step(x[:, 0], state)
    found = torch.autograd.grad(
        y.float().square().mean(), tuple(mixer.parameters()), materialize_grads=True
    )
    want, _ = mixer(x)
    assert (y.float() - want).norm() < 0.1 * want.norm() and token.isfinite().all()
    assert all(s.dtype == torch.float32 for s in getattr(state, "recurrent", ()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)


@over_cases
def test_entries(name, fields):
    """A Config comes back from the JSON of a recipe as it was."""
    config = build(name, fields).config
    assert from_entry(json.loads(json.dumps(to_entry(config)))) == config
