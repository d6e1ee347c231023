"""What the finder says about an attention: plain data, names instead of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule


@dataclass(frozen=True)
class Projection:
    """Where one projection's weight lives.

    Args:
        fqn: parameter name of the weight.
        rows: runs [start, stop) of output rows, in head order, after un-transposing;
            None for the whole weight. A packed qkv has one run a projection, or one a head.
        transposed: the weight is stored as [in, out] (GPT-2's Conv1D).
        bias_fqn: parameter name of the bias, sliced by the same rows.
    """

    fqn: str
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
    bias_fqn: str | None = None

    def tensors(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] or None, detached; views wherever one slice is enough."""
        weight = model.get_parameter(self.fqn).detach()
        weight = weight.T if self.transposed else weight
        bias = model.get_parameter(self.bias_fqn).detach() if self.bias_fqn else None
        return self._take(weight), None if bias is None else self._take(bias)

    def _take(self, tensor: Tensor) -> Tensor:
        if self.rows is None:
            return tensor
        runs = [tensor[start:stop] for start, stop in self.rows]
        return runs[0] if len(runs) == 1 else torch.cat(runs)


@dataclass(frozen=True)
class NormSite:
    """RMSNorm of queries or keys: (offset + w) * x / sqrt(mean(x²) + eps).

    `per_head` norms the last dim K with w [K]; otherwise all heads together with w [H*K].
    `fqn` is None for a norm without weight.
    """

    fqn: str | None
    eps: float
    per_head: bool
    offset: float = 0.0


@dataclass(frozen=True)
class RotarySite:
    """Rotation of the first 2*len(inv_freq) dims by position * inv_freq, times `factor`.

    Pairs are (i, i + len(inv_freq)), or (2i, 2i + 1) when interleaved.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool = False
    factor: float = 1.0


class AttentionWeights(NamedTuple):
    """Detached tensors of one site: weights [out, in] un-packed and un-transposed, or None."""

    q_weight: Tensor  # [H*K, D]
    k_weight: Tensor  # [H_kv*K, D]
    v_weight: Tensor  # [H_kv*K, D]
    o_weight: Tensor  # [D, H*K]
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One causal self-attention, proved: y = o(softmax(scale * q kᵀ) v).

    With a softcap c the softmax is over c tanh(scale * q kᵀ / c).

    Args:
        path: module to swap. owner: its class name.
        window: a token sees itself and the window - 1 before it; None for all before it.
        x_arg: how the hidden states [B, T, D] reach the owner: position or keyword.
        num_results: None when the owner returns y itself, else the length of its tuple.
        result_index: where y stands in that tuple.
        inline: None where the module at `path` is the attention. Else that module does other
            things too, and this is which of the attentions inside it; ``outline`` makes a module.
        time_first: hidden states and y are [T, B, D].
    """

    path: str
    owner: str
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    scale: float
    rotary: RotarySite | None = None
    q_norm: NormSite | None = None
    k_norm: NormSite | None = None
    window: int | None = None
    softcap: float | None = None
    x_arg: int | str = 0
    num_results: int | None = None
    result_index: int = 0
    inline: int | None = None
    time_first: bool = False

    def weights(self, model: nn.Module) -> AttentionWeights:
        """The site's tensors out of `model`, which must still hold the attention at `path`."""
        (q, q_bias), (k, k_bias), (v, v_bias), (o, o_bias) = (
            projection.tensors(model) for projection in (self.q, self.k, self.v, self.o)
        )
        norms = (
            model.get_parameter(norm.fqn).detach() if norm and norm.fqn else None
            for norm in (self.q_norm, self.k_norm)
        )
        return AttentionWeights(q, k, v, o, q_bias, k_bias, v_bias, o_bias, *norms)


@dataclass(frozen=True)
class Rejected:
    """An attention that is left alone, and the sentence that says why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """All attentions of a model, each in `sites` or in `rejected`; `notes` for the report."""

    sites: tuple[AttentionSite, ...]
    rejected: tuple[Rejected, ...]
    graph_module: GraphModule = field(repr=False)
    notes: tuple[str, ...] = ()


def _projection_line(name: str, projection: Projection, path: str) -> str:
    rows = "" if projection.rows is None else str([f"{a}:{b}" for a, b in projection.rows])
    marks = (" transposed" if projection.transposed else "") + (
        " + bias" if projection.bias_fqn else ""
    )
    return f"  {name}: {projection.fqn.removeprefix(path + '.')}{rows}{marks}".replace("'", "")


def _norm_text(norm: NormSite | None) -> str:
    if norm is None:
        return "none"
    kind = "per head" if norm.per_head else "full width"
    return f"rms {kind}, eps {norm.eps:g}" + (f", offset {norm.offset:g}" if norm.offset else "")


def _rotary_text(rotary: RotarySite | None) -> str:
    if rotary is None:
        return "none"
    kind = "interleaved" if rotary.interleaved else "half-split"
    factor = f", factor {rotary.factor:.4g}" if rotary.factor != 1 else ""
    return f"{kind}, {2 * len(rotary.inv_freq)} dims, last {rotary.inv_freq[-1]:.4g}{factor}"


def describe_site(site: AttentionSite) -> str:
    """One site as a few lines of text."""
    returns = "y" if site.num_results is None else f"{site.result_index} of {site.num_results}"
    returns += ", time first" if site.time_first else ""
    window = f", window {site.window}" if site.window else ""
    window += f", soft-capped at {site.softcap:g}" if site.softcap else ""
    lines = [
        f"{site.path} ({site.owner}): hidden {site.hidden_size}, heads {site.num_heads}/"
        f"{site.num_kv_heads} x {site.head_dim}, scale {site.scale:.4g}, causal{window}",
        *(_projection_line(name, getattr(site, name), site.path) for name in "qkvo"),
        f"  rotary: {_rotary_text(site.rotary)}",
        f"  norms: q {_norm_text(site.q_norm)}; k {_norm_text(site.k_norm)}",
        f"  call: x = {site.x_arg!r}, returns {returns}"
        if site.inline is None
        else f"  inline: attention {site.inline} of the module",
    ]
    return "\n".join(lines)


def describe(findings: Findings) -> str:
    """Findings as text: every site, every rejection with its reason, the notes."""
    lines = [describe_site(site) for site in findings.sites]
    lines += [f"left alone {item.path}: {item.reason}" for item in findings.rejected]
    lines += [f"note: {note}" for note in findings.notes]
    return "\n".join(lines)
