"""The tables of docs/convert.md: what is found in every model of tests/models.py, what is left.

``python tests/model_table.py`` converts all of them (some minutes) and writes both tables; the
tests compare the rows of every model they look at.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from models import MIXED, MODELS, REJECTED, Case
from torch import Tensor, nn

import flacompile
from flacompile.passes.find_attention import AttentionSite, Findings, find_attention
from flacompile.passes.sites import Rejected

PAGE = Path(__file__).parents[1] / "docs" / "convert.md"
LINEAR = ("gla", "gated_deltanet", "mamba2")
CONVERTED = ["model", "attention", "what is peculiar", "`attn`", *(f"`{name}`" for name in LINEAR)]


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


def _logits(case: Case) -> Tensor:
    with torch.no_grad():
        out = case.model(*case.inputs, **case.kwargs)
    return out if isinstance(out, Tensor) else out.logits


def _converted(case: Case, mixer: str) -> Case:
    model: nn.Module = copy.deepcopy(case.model)
    torch.manual_seed(0)
    flacompile.convert(model, mixer, init="neutral", example_inputs=case.inputs or case.kwargs)
    return case._replace(model=model)


def _results(case: Case) -> list[str]:
    """The rest of a row: relative error with `attn`, and whether linear mixers run and train."""
    want = _logits(case)
    error = ((_logits(_converted(case, "attn")) - want).norm() / want.norm()).item()
    cells = [f"{error:.0e}" if error else "0"]
    for mixer in LINEAR:
        student = _converted(case, mixer)
        out = student.model(*student.inputs, **student.kwargs)
        out = out if isinstance(out, Tensor) else out.logits
        out.square().mean().backward()
        grads = [p.grad for p in student.model.parameters() if p.grad is not None]
        good = out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
        cells.append("runs, trains" if good else "not finite")
    return cells


def tables() -> dict[str, str]:
    """Marker -> table."""
    converted = [_row(CONVERTED), _row("---" for _ in CONVERTED)]
    left = [_row(["model", "attention", "reason"]), _row(["---"] * 3)]
    builds = MODELS | {name: build for name, (build, *_) in (REJECTED | MIXED).items()}
    for name, build in builds.items():
        case = build()
        findings = find(case)
        if findings.sites:
            cells = _row(_results(case)).removeprefix("|")
            converted.append(converted_row(name, findings.sites) + cells)
        left += [left_row(name, item) for item in first_of_each_reason(findings.rejected)]
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
