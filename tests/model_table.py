"""The tables of docs/convert.md: what every model of tests/models.py becomes, and what is left.

The tests make every row again and compare; ``python tests/model_table.py`` writes what they want.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from models import MIXED, MODELS, REJECTED, Case
from torch import Tensor

import flacompile
from flacompile.layers import MIXERS
from flacompile.passes.find_attention import AttentionSite, Findings, find_attention
from flacompile.passes.outline import outline_sites
from flacompile.passes.sites import Rejected
from flacompile.passes.swap_attention import swapped

PAGE = Path(__file__).parents[1] / "docs" / "convert.md"
BUILDS = MODELS | {name: build for name, (build, *_) in (REJECTED | MIXED).items()}
CONVERTED = ["model", "attention", "what is peculiar", *(f"`{name}`" for name in sorted(MIXERS))]
SAME, WORKS, REFUSED, BROKEN = "=", "✓", "—", "✗"


def peculiarities(site: AttentionSite) -> set[str]:
    """What sets an attention apart from four separate weights, a rotary and a causal mask."""
    rotary, norm, projections = site.rotary, site.q_norm, (site.q, site.k, site.v)
    turned = 2 * len(rotary.inv_freq) if rotary else 0
    marks = {
        "packed weights": site.q.rows is not None,
        "transposed weights": site.q.transposed,
        "biases": any(p.bias_fqn for p in projections),
        f"{site.num_kv_heads} of {site.num_heads} heads for keys": site.num_kv_heads
        != site.num_heads,
        "no rotary": rotary is None,
        f"rotary of {turned} of {site.head_dim} dims": 0 < turned < site.head_dim,
        "interleaved rotary": rotary is not None and rotary.interleaved,
        "scaled rotary": rotary is not None and rotary.factor != 1,
        f"q/k norm {'a head' if norm and norm.per_head else 'of all heads'}": norm is not None,
        f"window {site.window}": site.window is not None,
        f"scores capped at {site.softcap or 0:g}": site.softcap is not None,
        "time first": site.time_first,
        "inline": site.inline is not None,
    }
    return {text for text, there in marks.items() if there}


def peculiar(sites: Sequence[AttentionSite]) -> str:
    """The same of a model; in brackets what only some of its layers have."""
    every = [peculiarities(site) for site in sites]
    shared = set.intersection(*every)
    some = sorted(f"({text})" for text in set.union(*every) - shared)
    return ", ".join([*sorted(shared), *some])


def converted_row(name: str, sites: Sequence[AttentionSite]) -> str:
    """The start of a model's row: what the finder alone tells."""
    return _row([f"`{name}`", str(len(sites)), peculiar(sites)])


def left_row(name: str, rejected: Rejected) -> str:
    """An attention that stays as it is."""
    return _row([f"`{name}`", f"`{rejected.path or 'the model itself'}`", rejected.reason])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def find(case: Case) -> Findings:
    """What there is in a model."""
    return find_attention(case.model, case.inputs, case.kwargs)


def first_of_each_reason(rejected: Sequence[Rejected]) -> list[Rejected]:
    """One attention for every reason."""
    return list({item.reason: item for item in reversed(rejected)}.values())[::-1]


@contextmanager
def found_once(case: Case) -> Iterator[Findings]:
    """What there is in a model, which ``convert`` meanwhile takes instead of looking again."""
    findings, module = find(case), importlib.import_module("flacompile.convert")
    sites = outline_sites(case.model, findings.sites, case.inputs, case.kwargs)
    known = dataclasses.replace(findings, sites=tuple(sites))
    with (
        patch.object(module, "find_attention", lambda *_: known),
        patch.object(module, "restore_blocks", lambda *_: None),  # outlined for good
    ):
        yield findings


def results_row(name: str) -> str:
    """A model's row: what was found in it, and what came of it with every mixer."""
    case = BUILDS[name]()
    with found_once(case) as findings:
        cells = [result(case, mixer) for mixer in sorted(MIXERS)]
    return converted_row(name, findings.sites) + _row(cells).removeprefix("|")


def result(case: Case, mixer: str) -> str:
    """What came of a conversion, which is taken back.

    SAME, the logits of the original within 1e-5; WORKS, finite logits that see no later token, and
    a finite gradient for every parameter of every mixer; REFUSED, by ``convert``; else BROKEN.
    """
    want = _logits(case).detach()
    torch.manual_seed(0)
    try:
        example = case.inputs or case.kwargs
        flacompile.convert(case.model, mixer, init="neutral", example_inputs=example)
    except ValueError:
        return REFUSED
    got, cut = _logits(case), _logits(_shorter(case))
    got.square().mean().backward()
    layers = swapped(case.model).values()
    grads = [p.grad for layer in layers for p in layer.mixer.parameters()]
    flacompile.unconvert(case.model)
    if _distance(got, want) < 1e-5:
        return SAME
    finite = all(x is not None and x.isfinite().all() for x in (got, *grads))
    return WORKS if finite and _distance(got[:, : cut.shape[1]], cut) < 1e-5 else BROKEN


def _logits(case: Case) -> Tensor:
    out = case.model(*case.inputs, **case.kwargs)
    return out if isinstance(out, Tensor) else out.logits


def _shorter(case: Case) -> Case:
    """The call without its last tokens, those of the decoder where there is one."""
    *args, last = (*case.inputs, *case.kwargs.values())
    cut, n = (*args, last[:, :-4]), len(case.inputs)
    return case._replace(inputs=cut[:n], kwargs=dict(zip(case.kwargs, cut[n:], strict=True)))


def _distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def tables() -> dict[str, str]:
    """Marker -> table."""
    converted = [_row(CONVERTED), _row("---" for _ in CONVERTED)]
    converted += [results_row(name) for name in (*MODELS, *MIXED)]
    left = [_row(["model", "attention", "reason"]), _row(["---"] * 3)]
    for name in (*REJECTED, *MIXED):
        rejected = find(BUILDS[name]()).rejected
        left += [left_row(name, item) for item in first_of_each_reason(rejected)]
    return {"converted": "\n".join(converted), "left": "\n".join(left)}


def write() -> None:
    """Puts the tables between their markers."""
    text = PAGE.read_text()
    for name, table in tables().items():
        marker = f"<!-- models {name} -->"
        pattern = re.compile(rf"({marker}).*?({marker})", re.DOTALL)
        text = pattern.sub(lambda m, table=table: f"{m[1]}\n{table}\n{m[2]}", text)
    PAGE.write_text(text)


if __name__ == "__main__":
    write()
