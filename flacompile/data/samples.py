"""Text that a model writes itself, where there is no other: sampled, kept in files, taken up again.

As in LLM-QAT (Liu et al. 2023, arXiv 2305.17888): a language model's own samples are data enough
to teach another model its distribution.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flacompile.data.corpus import Corpus
from flacompile.files import write_atomically
from flacompile.ops.validate import expect

TOGETHER = 64  # documents sampled at once and kept in one file


def own_samples(
    model: nn.Module,
    tokens: int,
    sequence_length: int,
    folder: Path,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Corpus:
    """At least so many tokens of documents that a transformers language model writes.

    Each begins with the model's bos token, or where it has none with one drawn from the whole
    vocabulary, and ends with eos or at ``sequence_length`` tokens. Documents are a function of the
    model and these arguments, on one kind of device.

    Args:
        model: has ``generate``.
        tokens: to stop after.
        sequence_length: most tokens of one document.
        folder: keeps what was sampled; a call that was stopped goes on from there.
        temperature: the logits are divided by it.
        seed: of the samples.

    Raises:
        ValueError: the model cannot generate, or the folder holds other samples.
    """
    expect(hasattr(model, "generate"), "model", "one that generates", type(model).__name__)
    name = {
        "model": _name(model),
        "temperature": temperature,
        "seed": seed,
        "sequence_length": sequence_length,
    }
    label = folder / "samples.json"
    if not label.exists():
        write_atomically(label, lambda path: path.write_text(json.dumps(name)))
    elif json.loads(label.read_text()) != name:
        raise ValueError(
            f"data: expected {folder} to hold samples of this model, length, temperature and seed, "
            "got others; move it away to sample anew"
        )
    documents: list[Tensor] = []
    count, chunk = 0, 0
    while count < tokens:
        file = folder / f"{chunk:06}.pt"
        if not file.exists():
            drawn = _draw(model, sequence_length, temperature, seed * 1_000_003 + chunk)
            write_atomically(file, lambda path, drawn=drawn: torch.save(drawn, path))
        some = torch.load(file, weights_only=True)
        documents += some
        count += sum(map(len, some))
        chunk += 1
    lengths = torch.tensor([0, *map(len, documents)])
    return Corpus(torch.cat(documents), lengths.cumsum(0)[:-1])


@torch.no_grad()
def _draw(model: Any, length: int, temperature: float, seed: int) -> list[Tensor]:
    """Documents [n] int32 of one file."""
    device = next(model.parameters()).device
    bos, eos = model.generation_config.bos_token_id, model.generation_config.eos_token_id
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = torch.randint(model.config.vocab_size, (TOGETHER, 1))
        if bos is not None:
            first = torch.full_like(first, bos)
        rows = model.generate(
            first.to(device),
            attention_mask=torch.ones_like(first, device=device),
            max_new_tokens=length - 1,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        ).cpu()
    ends = torch.tensor([] if eos is None else eos).flatten()
    ended = torch.isin(rows[:, 1:], ends).int().cumsum(1)
    lengths = 1 + (ended - torch.isin(rows[:, 1:], ends).int() == 0).sum(1)
    return [row[:n].int() for row, n in zip(rows, lengths.tolist(), strict=True)]


def _name(model: nn.Module) -> str:
    """Of the model: a hash of the beginnings of its weights."""
    total = hashlib.sha256()
    for key, parameter in model.named_parameters():
        total.update(f"{key} {parameter.flatten()[:64].tolist()}".encode())
    return total.hexdigest()
