"""Slots under load: every sequence gets what it gets alone, and the batch compiles once a size."""

import random
from itertools import islice

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree as pytree

from flacompile.layers import MIXERS
from flacompile.runner import Sampling, generate
from flacompile.slots import Slots

PROMPTS, LONGEST, VOCAB, WIDTH = 32, 8, 64, 16
SEQUENCES, SIZE = 10_000, 16
STOP = 7


class Model(nn.Module):
    """One layer over tied embeddings. A state of its own says which prompt a row came from."""

    device = torch.device("cpu")

    def __init__(self, compiled=None, mixer="simple_gla"):
        super().__init__()
        torch.manual_seed(0)
        kind = MIXERS[mixer]
        self.mixer = kind(kind.Config(hidden_size=WIDTH, num_heads=2))
        self.layout = pytree.tree_structure(self.mixer.init_state(1))
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.requires_grad_(False)
        options = {"fullgraph": True, "dynamic": False}
        self._step = (
            torch.compile(self.step, backend=compiled, **options) if compiled else self.step
        )
        self._prefilled = {}

    def prefill(self, ids):
        """The same for the same prompt, so each is run once."""
        key = tuple(ids[0].tolist())
        if key not in self._prefilled:
            x = self.embedding(ids)
            y, state = self.mixer(x)
            leaves = pytree.tree_leaves(state)  # the last is the position
            self._prefilled[key] = self.logits(x + 2 * y)[:, -1], ids[:, 0].clone(), *leaves
        return self._prefilled[key]

    def logits(self, x):
        return x @ self.embedding.weight.t()

    def step(self, token, prompt, *leaves):
        x = self.embedding(token[:, 0])
        y, state = self.mixer.step(x, pytree.tree_unflatten(leaves, self.layout))
        return self.logits(x + 2 * y), prompt, *pytree.tree_leaves(state)

    def decode(self, token, states):
        return self._step(token, *states)


class Watched(Model):
    """Holds every row of logits against those of the sequence alone."""

    def __init__(self, alone, lengths, compiled):
        super().__init__(compiled)
        self.alone, self.lengths, self.rows = alone, lengths, 0

    def decode(self, token, states):
        logits, *after = super().decode(token, states)
        prompt, position = after[0], after[-1]
        want = self.alone[prompt, position - self.lengths[prompt]]
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
        self.rows += len(logits)
        return logits, *after


def prompt_of(i):
    """Its first token says which it is; its length too is its own."""
    draw = random.Random(i)
    return [i, *(draw.randrange(VOCAB) for _ in range(draw.randrange(12)))]


def sampling_of(i):
    """Every second one is greedy."""
    return Sampling() if i % 2 else Sampling(temperature=1.0, top_p=0.9, seed=i)


@torch.no_grad()
def alone(model):
    """Tokens of each prompt alone, and its logits [PROMPTS, LONGEST, VOCAB] after each."""
    logits = torch.full((PROMPTS, LONGEST, VOCAB), float("nan"))
    tokens = []
    for i in range(PROMPTS):
        new = list(generate(model, prompt_of(i), tokens=LONGEST, sampling=sampling_of(i)))
        out, *states = model.prefill(torch.tensor([prompt_of(i)]))
        for t, token in enumerate(new):
            logits[i, t] = out[0]
            out, *states = model.decode(torch.tensor([[token]]), states)
        tokens.append(new)
    return tokens, logits


def test_ten_thousand_sequences_as_each_alone():
    tokens, logits = alone(Model())
    lengths = torch.tensor([len(prompt_of(i)) for i in range(PROMPTS)])
    model = Watched(logits, lengths, compiled := CompileCounter())
    slots, draw = Slots(model, SIZE), random.Random(0)
    admitted, running, cancelled = [], [], 0
    while len(admitted) < SEQUENCES or running:
        for _ in range(min(draw.randrange(6), slots.free, SEQUENCES - len(admitted))):
            i, limit = draw.randrange(PROMPTS), draw.randint(1, LONGEST)
            one = slots.admit(prompt_of(i), tokens=limit, sampling=sampling_of(i), stop=(STOP,))
            admitted.append((one, tokens[i][:limit]))
            running.append(one)
        stepped = slots.step()
        assert set(map(id, stepped)) <= set(map(id, running))
        if running and draw.random() < 0.2:
            one = draw.choice(running)
            cancelled += not one.done
            slots.cancel(one)
        running = [one for one in running if not one.done]
        assert slots.free == SIZE - len(running)

    ended = 0
    for one, want in admitted:
        if STOP in want:
            want = want[: want.index(STOP) + 1]
        assert one.done and one.tokens == want[: len(one.tokens)]
        ended += one.tokens == want
    assert len(admitted) == SEQUENCES and ended >= SEQUENCES - cancelled and cancelled > 500
    assert model.rows > SEQUENCES
    assert compiled.frame_count == 5  # batches of 1, 2, 4, 8 and 16
    assert all(x.isnan().all() for x in slots._states if x.is_floating_point())


def test_one_fixed_size():
    """Also a size that is no power of two, and one that is full."""
    tokens, _ = alone(Model())
    slots = Slots(Model(compiled := CompileCounter()), 3, batch_sizes=[3])
    running = [slots.admit(prompt_of(i), tokens=6, sampling=sampling_of(i)) for i in range(3)]
    with pytest.raises(ValueError, match="admit: expected a free slot, got 3 of as many taken"):
        slots.admit([1], tokens=1)
    while any(not one.done for one in running):
        slots.step()
    assert [one.tokens for one in running] == [x[:6] for x in islice(tokens, 3)]
    assert slots.step() == [] and slots.free == 3
    assert compiled.frame_count == 1


class Broken(Model):
    """Gives NaN after the prompt that begins with 1."""

    def decode(self, token, states):
        logits, prompt, *leaves = super().decode(token, states)
        return torch.where((prompt == 1)[:, None], float("nan"), logits), prompt, *leaves


def test_one_that_breaks_leaves_alone():
    tokens, _ = alone(Model())
    slots = Slots(Broken(), 3)
    running = [slots.admit(prompt_of(i), tokens=5, sampling=sampling_of(i)) for i in range(3)]
    while slots.free < 3:
        slots.step()
    assert [one.failed for one in running] == [False, True, False]
    assert [one.tokens for one in running] == [tokens[0][:5], tokens[1][:1], tokens[2][:5]]


def test_refusals():
    slots, other = Slots(Model(), 2), Slots(Model(), 2)
    calls = [
        (lambda: Slots(Model(), 0), "size: expected at least 1, got 0"),
        (lambda: Slots(Model(), 4, batch_sizes=[1, 8]), "batch_sizes: expected rising numbers"),
        (lambda: slots.admit([1], tokens=0), "tokens: expected at least 1, got 0"),
        (lambda: slots.cancel(other.admit([1], tokens=9)), "sequence: expected one of this batch"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert slots.free == 2
