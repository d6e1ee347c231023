"""The linear map between a projection and an attention, read off by feeding it chosen inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .capture import Values, evaluate
from .norms import NormMatch
from .walk import Branch, NotProvable


class Probe:
    """A branch as a function of its projection's output, its norm left out.

    Args:
        branch: from the projection to the queries, keys or values.
        norm: its norm, whose input is passed on as its output.
        values: recorded values of the branch's constants.
    """

    def __init__(self, branch: Branch, norm: NormMatch | None, values: Values):
        self.branch, self.norm = branch, norm
        self.constants = {n: values[n] for n in branch.constants if n in values}
        example = branch.projection.node.meta["val"]
        self.width = example.shape[-1]
        self.zero = torch.zeros(example.shape, dtype=example.dtype, device=example.device)

    def respond(self, columns: Tensor) -> Tensor:
        """columns [n, width], the same for every token -> [n, H, T, K] of the first sequence."""

        def one(column: Tensor) -> Tensor:
            """column [width] -> what the branch ends in, [B, H, T, K]."""
            known = {self.branch.projection.node: self.zero + column}
            if self.norm is not None:
                start = evaluate(self.norm.start, self.constants, known)
                known[self.norm.end] = start.to(self.norm.end.meta["val"].dtype)
            return evaluate(self.branch.end, self.constants, known)

        out = torch.func.vmap(one)(columns.to(self.zero))
        if out.dim() != 5:
            raise NotProvable(f"{self.branch.name} must be [B, H, T, K], got {out.dim() - 1} dims")
        return out[:, 0]

    def sources(self) -> tuple[Tensor, Tensor]:
        """Which output column of the projection each dim of each head is, and its gain.

        Column numbers go in as signs, a bit each, and come out at position 0, where a rotary
        embedding turns nothing. A column that is zero everywhere must give zero: linear, no bias.

        Returns:
            columns [H, K] (int64), gains [H, K].
        """
        bits = max(1, (self.width - 1).bit_length())
        numbers = torch.arange(self.width)
        signs = torch.stack([1 - 2 * (numbers >> bit & 1) for bit in range(bits)])
        inputs = torch.cat([signs, torch.zeros(1, self.width)])
        at_zero = self.respond(inputs)[:, :, 0].double().cpu()
        seen, rest = at_zero[:-1], at_zero[-1]
        gains = seen[0].abs()
        if bool((rest != 0).any()):
            raise NotProvable(f"a constant is added to the {self.branch.name} after the projection")
        if bool((gains == 0).any()) or not torch.allclose(seen.abs(), gains.expand_as(seen)):
            raise NotProvable(
                f"{self.branch.name} at position 0 are not dims of the projection; "
                "positions may start elsewhere"
            )
        columns = ((seen < 0).long() << torch.arange(bits)[:, None, None]).sum(0)
        return columns, gains

    def maps(self, columns: Tensor) -> Tensor:
        """Response of head 0 to each of its dims: [K_in, T, K_out]."""
        unit = torch.zeros(columns.shape[1], self.width)
        unit[torch.arange(columns.shape[1]), columns[0]] = 1
        return self.respond(unit)[:, 0]


def runs(columns: Tensor, width: int) -> tuple[tuple[int, int], ...] | None:
    """Columns in order as runs [start, stop); None if they are all of [0, width)."""
    found: list[list[int]] = []
    for column in columns.flatten().tolist():
        if found and found[-1][1] == column:
            found[-1][1] += 1
        else:
            found.append([column, column + 1])
    return None if found == [[0, width]] else tuple((a, b) for a, b in found)


def key_heads(name: str, columns: Tensor, num_heads: int) -> Tensor:
    """Columns [H_kv, K] of the distinct heads; query head h must read key head h // group."""
    distinct: list[list[int]] = []
    for head in columns.tolist():
        if head not in distinct:
            distinct.append(head)
    unique = torch.tensor(distinct)
    group = num_heads // len(distinct)
    wanted = unique.repeat_interleave(len(columns) // len(distinct), 0)
    if group * len(distinct) != num_heads or not torch.equal(columns, wanted):
        raise NotProvable(f"query heads do not share the heads of the {name} in order of groups")
    return unique
