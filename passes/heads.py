"""Heads of one attention: rows of the weights, groups, norms, rotary embedding, scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from .capture import Values
from .norms import norm_site
from .probe import Probe, key_heads, runs
from .rotary import rotary_from_maps
from .sites import NormSite, Projection, RotarySite
from .structure import Draft
from .verify import tolerance_of
from .walk import Branch, NotProvable, ProjectionNode, op_name


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What the branches tell. The model's queries are `q_gain` times the site's, keys likewise."""

    q: Projection
    k: Projection
    v: Projection
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary: RotarySite | None
    q_norm: NormSite | None
    k_norm: NormSite | None
    q_gain: float
    k_gain: float


def read_heads(draft: Draft, model: nn.Module, values: Values) -> Heads:
    """Probes the three branches of a draft."""
    probes = {b.name: Probe(b, draft.norms[b.name], values) for b in (draft.q, draft.k, draft.v)}
    columns, gains = {}, {}
    for name, probe in probes.items():
        columns[name], gains[name] = probe.sources()
    num_heads, head_dim = columns["queries"].shape
    for name in ("keys", "values"):
        if columns[name].shape[1] != head_dim:
            raise NotProvable(f"{name} have {columns[name].shape[1]} dims a head, not {head_dim}")
        columns[name] = key_heads(name, columns[name], num_heads)
    if len(columns["keys"]) != len(columns["values"]):
        raise NotProvable("keys and values differ in their number of heads")

    def projection(branch: Branch) -> Projection:
        """The rows of the branch's matrix that are those of the heads, in their order."""
        rows = runs(columns[branch.name], probes[branch.name].width)
        return projection_of(branch.projection, rows)

    rotary = _rotary(draft, probes["keys"], columns["keys"], values)
    factor, q_gain, k_gain = _gains(rotary, gains["queries"], gains["keys"])
    scale = draft.args.scale
    if isinstance(scale, Node):
        raise NotProvable("the scale of the scores is computed from the inputs")
    return Heads(
        q=projection(draft.q),
        k=projection(draft.k),
        v=projection(draft.v),
        num_heads=num_heads,
        num_kv_heads=len(columns["keys"]),
        head_dim=head_dim,
        scale=(head_dim**-0.5 if scale is None else float(scale)) * q_gain * k_gain,
        rotary=replace(rotary, factor=factor) if rotary else None,
        q_norm=norm_site(draft.norms["queries"], head_dim, model),
        k_norm=norm_site(draft.norms["keys"], head_dim, model),
        q_gain=q_gain,
        k_gain=k_gain,
    )


def projection_of(node: ProjectionNode, rows: tuple[tuple[int, int], ...] | None) -> Projection:
    """The projection as data."""
    return Projection(node.weight, rows, node.transposed, node.bias)


def _rotary(draft: Draft, probe: Probe, columns: Tensor, values: Values) -> RotarySite | None:
    """The keys' rotation; the queries' is compared with it by the proof."""
    constants = [values[n] for n in draft.k.constants if n in values]
    tensors = [c for c in constants if isinstance(c, Tensor) and c.is_floating_point()]
    factors = [
        float(a)
        for n in draft.k.constants
        if op_name(n) == "mul"
        for a in n.args
        if isinstance(a, int | float)
    ]
    tolerance = tolerance_of(probe.zero.dtype)
    return rotary_from_maps(probe.maps(columns), tensors, factors, tolerance)


def _gains(rotary: RotarySite | None, q: Tensor, k: Tensor) -> tuple[float, float, float]:
    """(rotary factor, query gain, key gain) out of the gains [H, K] of single dims.

    Queries and keys share the factor, so a gain of the queries alone belongs to the scale.
    """
    if rotary is None:
        return 1.0, _uniform(q), _uniform(k)
    turned = 2 * len(rotary.inv_freq)
    if turned < k.shape[1]:
        k_gain = _uniform(k[:, turned:])
        factor = rotary.factor / k_gain
    else:
        k_gain, factor = 1.0, rotary.factor
    return factor, _clean(_uniform(q[:, :turned]) / factor), k_gain


def _uniform(gains: Tensor) -> float:
    if not torch.allclose(gains, gains.flatten()[0].expand_as(gains), rtol=1e-4):
        raise NotProvable("dims of the queries or keys are scaled differently")
    return _clean(float(gains.flatten()[0]))


def _clean(gain: float) -> float:
    return 1.0 if abs(gain - 1) < 1e-6 else gain
