"""What is exported, before it is compiled: every mixer in one traced program, at any B and T."""

import torch
from models import llama

import flacompile
from flacompile import hf
from flacompile.convert import build
from flacompile.export.gate import compare, references
from flacompile.export.programs import SPAN, Step, all_mixers, trace
from flacompile.layers import MIXERS
from flacompile.passes.find_attention import find_attention
from flacompile.passes.swap_attention import swap_attention

LENGTHS = (1, 2, 63, 64, 65, SPAN - 1, SPAN + 1, 2 * SPAN + 70)
ROOM = 2 * SPAN + 110


def of_all_mixers():
    """A Llama with another mixer in every layer."""
    model = llama(num_hidden_layers=len(MIXERS), num_key_value_heads=4)().model
    for site, cls in zip(find_attention(model).sites, MIXERS.values(), strict=True):
        mixer = build(cls, cls.config_for(site), model, site)
        swap_attention(model, site, mixer, hf.convention_of(model, site))
    return flacompile.finalize(model).eval()


def run(program):
    """A traced program without the guards that hold for the example alone."""
    return program.module(check_guards=False)


@torch.no_grad()
def test_every_mixer_at_any_shape():
    model = of_all_mixers().double()
    cases = references(model, LENGTHS, ROOM)
    assert {len(case.ids) for case in cases} == {1, 2, 3} and len(cases) == len(LENGTHS)
    with all_mixers(model):
        programs, step = trace(model, ROOM), Step(model, ROOM)
    for program in programs.values():
        targets = {str(node.target) for node in program.graph.nodes}
        assert not [target for target in targets if target.startswith("flacompile")]
        shapes = [
            node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"
        ]
        assert isinstance(shapes[-1][0], torch.SymInt)
    errors = compare({name: run(x) for name, x in programs.items()}, step.begin, cases)
    assert max(errors.values()) < 1e-6
