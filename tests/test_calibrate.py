"""Calibration: never worse than neutral, one batch at a time, from sums that are what they say."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
from models import MODELS, VOCAB, llama
from torch.utils._python_dispatch import TorchDispatchMode

import flacompile
from flacompile.calibrate import HeadFit, calibrate, candidates, look_back
from flacompile.convert import build, report
from flacompile.distill.objectives import attention_io
from flacompile.layers import MIXERS
from flacompile.layers.base import RecurrentMixer
from flacompile.passes.find_attention import find_attention
from flacompile.passes.swap_attention import swapped

LINEAR = sorted(name for name, cls in MIXERS.items() if issubclass(cls, RecurrentMixer))
LENGTH = 389  # no other size in these tests is as large


def ids_of(seed: int, batch: int = 2, time: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, time), generator=generator)


def one_layer(mixer: str, name: str = "llama"):
    """A model, the first attention found in it, and a mixer that holds its weights."""
    case = MODELS[name]()
    site = find_attention(case.model, case.inputs, case.kwargs).sites[0]
    torch.manual_seed(0)  # what an attention does not have starts at random
    cls = MIXERS[mixer]
    return case.model, site, build(cls, cls.config_for(site), case.model, site)


@pytest.mark.parametrize("mixer", LINEAR)
@pytest.mark.parametrize("name", ["llama", "gpt2", "handwritten_even_odd"])
def test_calibrated_is_never_worse_than_neutral(name, mixer):
    """On the calibration data itself, two batches of different lengths that come only once."""
    case, errors = MODELS[name](), {}
    for init in ("neutral", "calibrated"):
        model = copy.deepcopy(case.model)
        calibration = [ids_of(1, 2), ids_of(2, 3, 17)]
        torch.manual_seed(0)
        flacompile.convert(
            model, mixer, init=init, example_inputs=case.inputs, calibration=iter(calibration)
        )
        errors[init] = [(layer.before, layer.after) for layer in report(model).layers]
        seen = [attention_io(model, ids) for ids in calibration]
        for (path, layer), (_, after) in zip(swapped(model).items(), errors[init], strict=True):
            with torch.no_grad():
                pairs = [io[path] for io in seen]
                wrong = sum((layer.mixer(x)[0] - y).square().sum() for x, y in pairs)
            power = sum(y.square().sum() for _, y in pairs)
            assert (wrong / power).item() == pytest.approx(after, rel=1e-4)
    for (before, neutral), (fresh, after) in zip(
        errors["neutral"], errors["calibrated"], strict=True
    ):
        assert before == neutral == pytest.approx(fresh, rel=1e-5)
        assert after <= fresh
    assert any(after < before for before, after in errors["calibrated"])


@pytest.mark.parametrize("mixer", LINEAR)
def test_neutral_gates_are_those_of_a_conversion(mixer):
    """So that the first candidate is the neutral mixer, and every head has a place in a group."""
    _, _, new = one_layer(mixer)
    state = {k: v.clone() for k, v in new.state_dict().items()}
    for setter, values in candidates(new, torch.ones(new.output_heads)).items():
        getattr(new, setter)(values[0])
    assert all(v.equal(state[k]) for k, v in new.state_dict().items())
    heads = [head for group in new.decay_groups for head in group]
    assert heads == list(range(new.output_heads))


@pytest.mark.parametrize("mixer", LINEAR)
def test_no_scale_near_the_solved_ones_is_better(mixer):
    model, site, new = one_layer(mixer)
    x = torch.randn(2, 30, site.hidden_size, generator=torch.Generator().manual_seed(3))
    fit = HeadFit(new, torch.tensor([2.0, 4.0, 8.0, 16.0]), adjust=True)
    fit.add(x, model.get_submodule(site.path).o_proj(x), None)
    for c in range(fit.candidates):
        choice = [c] * len(new.decay_groups)
        scales = fit._solve(choice)
        least = fit._error(choice, scales)
        for nudge in torch.cat((torch.eye(len(scales)), -torch.eye(len(scales)))):
            assert fit._error(choice, scales + 0.05 * nudge) >= least


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 5])
def test_look_back_is_the_mean_of_the_attention_map(kv_heads, window):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 300, 8, generator=generator)
    k = torch.randn(2, kv_heads, 300, 8, generator=generator)
    real = torch.arange(300) >= torch.tensor([[0], [40]])
    age = torch.arange(300)[:, None] - torch.arange(300)
    seen = (age >= 0) & (age < (window or 300)) & real[:, None, None]
    scores = 0.7 * q @ k.repeat_interleave(4 // kv_heads, 1).mT
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    want = torch.stack([(weights * age).sum(-1)[:, h][real].mean() for h in range(4)])
    assert torch.allclose(look_back(q, k, 0.7, window, real), want)


def padded(ids: torch.Tensor, left: bool) -> dict[str, torch.Tensor]:
    """Two rows, the second four tokens shorter."""
    place = torch.arange(ids.shape[1])
    short = place >= 4 if left else place < ids.shape[1] - 4
    return {"input_ids": ids, "attention_mask": torch.stack((place >= 0, short)).long()}


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("mixer", ["gla", "rwkv7", "lightnet"])
def test_padding_is_not_seen(mixer, left):
    """A padded batch of keywords counts as its rows without the padding do."""
    model, site, new = one_layer(mixer)
    found = []
    batch = padded(ids_of(6), left)
    mask = batch["attention_mask"].bool()
    other = batch | {"input_ids": torch.where(mask, batch["input_ids"], 1)}
    alone = [(ids[real][None],) for ids, real in zip(batch["input_ids"], mask, strict=True)]
    for calls in ([((), batch)], [((), other)], [(args, {}) for args in alone]):
        convention = flacompile.hf.convention_of(model, site)
        parts = {site.path: (site, copy.deepcopy(new), convention)}
        found.append(calibrate(model, parts, calls, adjust=len(calls) == 1)[site.path])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0].before == pytest.approx(found[2].before, rel=1e-4)
    assert found[0].after < found[0].before


def test_batches_are_let_go():
    """Of what was handed over and of what the attention saw, only the last batch is held."""
    model, held, count = llama()().model, [], []

    def remember(module, args, kwargs, result):
        held.extend(map(weakref.ref, (kwargs["hidden_states"], result[0])))

    handle = model.model.layers[0].self_attn.register_forward_hook(remember, with_kwargs=True)

    def batches() -> Iterator[torch.Tensor]:
        for seed in range(6):
            ids = ids_of(seed, time=20 + seed)
            held.append(weakref.ref(ids))
            yield ids
            del ids
            count.append(sum(ref() is not None for ref in held))

    flacompile.convert(model, "gla", example_inputs=ids_of(9), calibration=batches())
    handle.remove()
    assert len(held) >= 18
    assert max(count) <= 3 and count[-1] == count[0]


class NoSquareMap(TorchDispatchMode):
    """Fails on any tensor that has two dimensions of LENGTH or more."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                sizes = sorted(tensor.shape)[-2:]
                self.largest = max([self.largest, *sizes])
                assert len(sizes) < 2 or sizes[0] < LENGTH, (str(function), tuple(tensor.shape))
        return result


@pytest.mark.parametrize("mixer", LINEAR)
def test_no_quadratic_map(mixer):
    model, site, new = one_layer(mixer)
    parts = {site.path: (site, new, flacompile.hf.convention_of(model, site))}
    with NoSquareMap() as mode:
        errors = calibrate(model, parts, [((ids_of(2, 1, LENGTH),), {})])
    assert mode.largest >= LENGTH
    assert errors[site.path].after <= errors[site.path].before


BAD = {
    "none": ([], "calibration: expected at least one batch, got none"),
    "one tensor": (ids_of(1), "calibration: expected batches, .* got one tensor"),
    "a number": ([3], "calibration: expected a tensor, a tuple or a dict of a call, got int"),
}


@pytest.mark.parametrize(("calibration", "message"), BAD.values(), ids=BAD)
def test_bad_calibration(calibration, message):
    model = llama()().model
    with pytest.raises(ValueError, match=message):
        flacompile.convert(model, calibration=calibration)
    assert not swapped(model)
