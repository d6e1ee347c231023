"""Tokens that documents were laid end to end into, and the part of them held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 18  # tokens hashed at a time
BLOCKS = 1 << 11  # blocks hashed of a longer stream, evenly apart


@dataclass(frozen=True)
class Corpus:
    """Documents end to end.

    Attributes:
        tokens: [n], of any integer dtype; may be mapped from a file.
        starts: [d] int64, ascending: where each document begins; None: nobody knows.
    """

    tokens: Tensor
    starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Corpus:
        """Tokens begin to end; the document cut at the beginning counts from there."""
        begin, end, _ = part.indices(len(self))
        if self.starts is None:
            return Corpus(self.tokens[begin:end])
        first, last = torch.searchsorted(self.starts, torch.tensor([begin, end])).tolist()
        starts = self.starts[first:last] - begin
        if not len(starts) or starts[0]:
            starts = torch.cat([starts.new_zeros(1), starts])
        return Corpus(self.tokens[begin:end], starts)

    def rows(self, count: int, sequence_length: int) -> Tensor:
        """The first ``count`` tokens as whole rows [n, T] int64, at least one."""
        n = max(1, min(count, len(self)) // sequence_length)
        return self.tokens[: n * sequence_length].long().reshape(n, sequence_length)

    def split(self, heldout: float, longest: int, heldout_row: int) -> tuple[Corpus, Corpus]:
        """The training part and, at the end, the share that is held out.

        Args:
            heldout: that share.
            longest: tokens of the longest row to train on.
            heldout_row: tokens of a held-out row.

        Raises:
            ValueError: a part that cannot fill one row.
        """
        last = round(len(self) * (1 - heldout))
        parts = self[:last], self[last:]
        for name, part, need in zip(
            ("train", "heldout"), parts, (longest, heldout_row), strict=True
        ):
            if len(part) < need:
                raise ValueError(
                    f"data: expected at least {need} {name} tokens (one row), got {len(part)}; "
                    "give more text, shorter rows or another share to hold out"
                )
        return parts

    def fingerprint(self) -> str:
        """A name for the tokens: the same for the same ones alone, whatever their dtype.

        Of more than half a billion tokens, one in so many blocks is read.
        """
        total = hashlib.sha256(str(len(self)).encode())
        blocks = max(1, -(-len(self) // BLOCK))
        for block in range(0, blocks, -(-blocks // BLOCKS)):
            part = self.tokens[block * BLOCK : (block + 1) * BLOCK]
            total.update(part.long().cpu().numpy().tobytes())
        return total.hexdigest()
