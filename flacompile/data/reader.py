"""Rows of a corpus in an order that the number of a step fixes, whole or shared by processes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.data.corpus import Corpus
from flacompile.ops.validate import expect


class Batch(NamedTuple):
    """Rows of tokens, and where their documents begin.

    ids [B, T] int64. For packed documents: position_ids [B, T], from 0 in each document and each
    row, which tells a transformers model what must not attend to what; cu_seqlens [N + 1], the
    bounds of the documents in the rows laid end to end, which tells the mixers.
    """

    ids: Tensor
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        moved = (x if x is None else x.to(device, non_blocking=True) for x in self)
        return Batch._make(moved)


@dataclass(frozen=True)
class Reader:
    """Cuts a corpus into rows and deals them out: ``reader.batches(step)``.

    An epoch is every row once, in a random order; the next one cuts at other places. What a step
    reads is a function of these attributes and its number, so a resumed run reads on, and any
    number of processes reads the same rows together.

    Attributes:
        corpus: at least one row.
        sequence_length: tokens of a row, T.
        batch_size: rows of a step, B, of all processes and parts together.
        accumulate: parts of a step, run one after the other.
        seed: of the order.
        documents: whether rows are packed documents, with ``position_ids`` and ``cu_seqlens``.
        separator: the token that begins a document, where the corpus does not know.
        vocabulary: token ids are below it; None: not checked.
        rank: which of the processes this is.
        world_size: how many processes there are.
    """

    corpus: Corpus
    sequence_length: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    documents: bool = False
    separator: int | None = None
    vocabulary: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        parts = self.accumulate * self.world_size
        expect(
            self.batch_size % parts == 0,
            "batch_size",
            f"a multiple of accumulate {self.accumulate} times processes {self.world_size}",
            self.batch_size,
        )
        if self.documents and self.corpus.starts is None and self.separator is None:
            raise ValueError(
                "data: expected documents whose bounds are known, got tokens alone; name the token "
                "that begins a document (separator), or set documents to False"
            )

    @property
    def rows(self) -> int:
        """Rows of an epoch; a row's worth of tokens is left for cutting elsewhere in the next."""
        return max(1, len(self.corpus) // self.sequence_length - 1)

    def batches(self, step: int) -> list[Batch]:
        """This process's rows of a step: ``accumulate`` batches of equal size."""
        size = self.batch_size // (self.accumulate * self.world_size)
        first = step * self.batch_size
        return [
            self._batch(first + (part * self.world_size + self.rank) * size, size)
            for part in range(self.accumulate)
        ]

    def _batch(self, first: int, size: int) -> Batch:
        begins = [self._begin(row) for row in range(first, first + size)]
        ids = torch.stack([self.corpus.tokens[b : b + self.sequence_length].long() for b in begins])
        check_ids(ids, self.vocabulary)
        if not self.documents:
            return Batch(ids)
        is_first = torch.stack([self._starts(b, row) for b, row in zip(begins, ids, strict=True)])
        is_first[:, 0] = True
        place = torch.arange(self.sequence_length).expand_as(ids)
        position = place - torch.where(is_first, place, 0).cummax(1).values
        return Batch(
            ids, position, F.pad(is_first.flatten().nonzero()[:, 0], (0, 1), value=ids.numel())
        )

    def _begin(self, row: int) -> int:
        """Where a row of all that are ever read begins."""
        epoch, index = divmod(row, self.rows)
        order, shift = _order(self.rows, self._spare, self.seed, epoch)
        return shift + int(order[index]) * self.sequence_length

    @property
    def _spare(self) -> int:
        return len(self.corpus) - self.rows * self.sequence_length

    def _starts(self, begin: int, ids: Tensor) -> Tensor:
        """Which tokens of a row begin a document, [T] bool."""
        if self.corpus.starts is None:
            return ids == self.separator
        end = begin + self.sequence_length
        first, last = torch.searchsorted(self.corpus.starts, torch.tensor([begin, end])).tolist()
        is_first = torch.zeros_like(ids, dtype=torch.bool)
        is_first[self.corpus.starts[first:last] - begin] = True
        return is_first


def check_ids(ids: Tensor, vocabulary: int | None) -> None:
    """Raises ValueError unless all token ids are in the vocabulary."""
    if vocabulary is not None:
        low, high = (int(x) for x in ids.aminmax())
        inside = low >= 0 and high < vocabulary
        expect(inside, "data", f"token ids from 0 to {vocabulary - 1}", f"{low} to {high}")


@functools.lru_cache(maxsize=2)
def _order(rows: int, spare: int, seed: int, epoch: int) -> tuple[Tensor, int]:
    """The order of an epoch's rows [rows], and the token that the first of them begins at."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator)
    return order, int(torch.randint(spare + 1, (), generator=generator))
