"""Token streams: a text file or a tensor, split once, read in an order that a step number fixes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Training tokens [n] and held-out tokens [m], int64."""

    train: Tensor
    heldout: Tensor


def read_tokens(data: str | Path | Tensor, tokenizer: Any = None) -> Tensor:
    """A tensor of token ids, or a UTF-8 text file through a tokenizer, as int64 [n].

    Text is cut at blank lines; every paragraph starts with the tokenizer's bos token, if it has
    one, so that rows cut from the stream look like what the teacher was trained on.

    Raises:
        ValueError: no such file, an empty one, not UTF-8, no tokenizer, or no vector of integers.
    """
    if isinstance(data, Tensor):
        if data.ndim != 1 or data.is_floating_point():
            raise ValueError(
                f"data: expected a vector of token ids, got {data.dtype} {tuple(data.shape)}"
            )
        return data.long()
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"data: expected a text file, got {path}, which is not a file")
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected one to read the text file {path}, got None")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: expected UTF-8 text in {path}, got {error}") from error
    paragraphs = [p.strip() for p in text.split("\n\n") if p.strip()]
    if not paragraphs:
        raise ValueError(f"data: expected text in {path}, got an empty file")
    encoded = tokenizer(paragraphs, add_special_tokens=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return torch.tensor([t for ids in encoded for t in first + ids], dtype=torch.long)


def fingerprint(tokens: Tensor) -> str:
    """A name for a stream: the same for the same tokens [n] alone."""
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()


def split(tokens: Tensor, heldout: float, sequence_length: int) -> Split:
    """The last share of the tokens is held out; both parts must fill one row."""
    last = round(len(tokens) * (1 - heldout))
    parts = Split(tokens[:last], tokens[last:])
    for name, part in parts._asdict().items():
        if len(part) < sequence_length:
            raise ValueError(
                f"data: expected at least {sequence_length} {name} tokens (one row), "
                f"got {len(part)}"
            )
    return parts


def batch(tokens: Tensor, step: int, batch_size: int, sequence_length: int, seed: int) -> Tensor:
    """Rows [B, T] of one step: a function of its arguments alone, so a resumed run reads on.

    Rows start at random places, so the stream has no epochs to remember.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, len(tokens) - sequence_length + 1, (batch_size,), generator=generator)
    return tokens[starts[:, None] + torch.arange(sequence_length)]


def rows(tokens: Tensor, count: int, sequence_length: int) -> Tensor:
    """The first ``count`` tokens as whole rows [n, T], at least one."""
    n = max(1, min(count, len(tokens)) // sequence_length)
    return tokens[: n * sequence_length].reshape(n, sequence_length)
