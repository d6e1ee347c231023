"""What can be read: text, JSON lines, parquet, ``datasets``, token files and tensors."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flacompile.data.corpus import Corpus
from flacompile.files import write_atomically
from flacompile.ops.validate import expect

Source = Corpus | Tensor | str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]] | None
"""Tokens, files (a pattern such as "shards/*.jsonl" too), or rows such as ``datasets`` has."""

Dtype = Literal["uint16", "uint32", "int32", "int64"]
TOGETHER = 1000  # documents that a tokenizer gets at once


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How data is read.

    Attributes:
        field: what holds the text, or the tokens, in JSON lines, parquet and ``datasets``.
        dtype: of the tokens in a .bin file.
        documents: rows are packed documents that do not see each other: positions start anew at
            each, mixers get ``cu_seqlens``. Else a row is a piece of one stream of tokens.
        separator: the token that begins each document, where the data is tokens alone.
        limit: tokens to read at most; None: all of them, and 1,000,000 samples of the teacher.
        temperature: of the teacher's own samples.
    """

    field: str = "text"
    dtype: Dtype = "uint16"
    documents: bool = False
    separator: int | None = None
    limit: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        known = Dtype.__args__  # type: ignore[attr-defined]
        expect(self.dtype in known, "dtype", f"one of {', '.join(known)}", repr(self.dtype))
        expect(self.temperature > 0, "temperature", "more than 0", self.temperature)
        expect(self.limit is None or self.limit >= 1, "limit", "at least 1", self.limit)


def read(
    data: Source,
    tokenizer: Any = None,
    options: DataOptions | None = None,
    *,
    record: Path | None = None,
) -> Corpus:
    """Tokens of files, rows or a tensor, in their order.

    Files: UTF-8 text, whose documents are paragraphs apart by blank lines; .jsonl; .parquet; and
    tokens in .npy or .bin, which stay on the disk. Rows: mappings with a text or token ids under
    ``options.field``, as a ``datasets`` object yields them. Every document starts with the
    tokenizer's bos token; with one that has none, it ends with the eos token.

    Args:
        data: see ``Source``.
        tokenizer: a transformers tokenizer, where there is text.
        options: default ``DataOptions()``.
        record: a file that rows of unknown number (streams) are written to and, once it is there,
            read from instead, so that a run resumes on the same tokens.

    Raises:
        ValueError: a file that is not there, empty, or not what its name says; text without a
            tokenizer; rows without the field; tokens that are no vector of integers.
    """
    options = options or DataOptions()
    if isinstance(data, Corpus):
        return data
    if isinstance(data, Tensor):
        return Corpus(_vector(data)[: options.limit])
    paths = _paths(data)
    if paths is None:
        rows = _rows(data, options.field)  # type: ignore[arg-type]
        if record is not None and not hasattr(data, "__len__"):
            return _recorded(rows, tokenizer, options, record)
        return _encode(rows, tokenizer, options.limit, "the rows")
    if all(path.suffix in (".npy", ".bin") for path in paths):
        parts = [_token_file(path, options.dtype) for path in paths]
        tokens = parts[0] if len(parts) == 1 else torch.cat([part.long() for part in parts])
        return Corpus(tokens[: options.limit])
    documents = itertools.chain.from_iterable(_documents(p, options.field) for p in paths)
    return _encode(documents, tokenizer, options.limit, ", ".join(map(str, paths)))


def _vector(tokens: Tensor) -> Tensor:
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        shape = tuple(tokens.shape)
        raise ValueError(f"data: expected a vector of token ids, got {tokens.dtype} {shape}")
    return tokens.cpu()


def _paths(data: Source) -> list[Path] | None:
    """Files that are there, or None where the data is no name of one."""
    names = [data] if isinstance(data, str | Path) else data
    if not isinstance(names, list | tuple) or not all(isinstance(n, str | Path) for n in names):
        return None
    paths: list[Path] = []
    for name in map(str, names):
        matches = [Path(name)] if Path(name).exists() else map(Path, sorted(glob.glob(name)))
        paths += (found := list(matches)) or [Path(name)]
        for path in found or [Path(name)]:
            if not path.is_file():
                raise ValueError(f"data: expected a text file, got {path}, which is not a file")
    expect(bool(paths), "data", "at least one file", "an empty list")
    return paths


def _token_file(path: Path, dtype: str) -> Tensor:
    """Tokens as they lie in a file, of which nothing is read yet."""
    import numpy as np

    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        else:
            array = np.memmap(path, dtype=dtype, mode="c")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"data: expected tokens in {path}, got {error}") from error
    return _vector(torch.from_numpy(array))


def _documents(path: Path, field: str) -> Iterator[str | list[int]]:
    """Documents of one file."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, field)
        elif path.suffix == ".jsonl":
            yield from _json_lines(path, field)
        else:
            yield from _paragraphs(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: expected UTF-8 text in {path}, got {error}") from error


def _paragraphs(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for blank, paragraph in itertools.groupby(lines, lambda line: not line.strip()):
            if not blank:
                yield "".join(paragraph).strip()


def _json_lines(path: Path, field: str) -> Iterator[str | list[int]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {field: ""}
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"data: expected JSON in line {number} of {path}, got {error}"
                ) from error
            yield _value(row, field, f"line {number} of {path}")


def _parquet(path: Path, field: str) -> Iterator[str | list[int]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"data: expected the package pyarrow to read {path}, got an environment without it; "
            "install flacompile[data]"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            expect(field in names, "field", f"a column of {path} ({', '.join(names)})", field)
            for batch in file.iter_batches(columns=[field]):
                for row in batch.to_pylist():
                    yield _value(row, field, str(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: expected a parquet file, got {path}: {error}") from error


def _rows(data: Iterable[Mapping[str, Any]], field: str) -> Iterator[str | list[int]]:
    expect(isinstance(data, Iterable), "data", "files, rows or tokens", type(data).__name__)
    for number, row in enumerate(data):
        yield _value(row, field, f"row {number}")


def _value(row: Any, field: str, where: str) -> str | list[int]:
    """The text or the tokens in one row."""
    if not isinstance(row, Mapping) or field not in row:
        got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"field: expected {field!r} in {where} of the data, got {got}")
    value = row[field]
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) or (
        isinstance(value, list) and all(type(token) is int for token in value)
    ):
        return value
    kind = type(value).__name__
    raise ValueError(f"field: expected a text or token ids in {field!r} of {where}, got {kind}")


def _encode(
    documents: Iterable[str | list[int]], tokenizer: Any, limit: int | None, where: str
) -> Corpus:
    """Documents end to end, empty ones left out, until there are ``limit`` tokens."""
    tokens, lengths, count = [], [], 0
    full = (d for d in documents if len(d if isinstance(d, list) else d.strip()))
    while limit is None or count < limit:
        some = list(itertools.islice(full, TOGETHER))
        if not some:
            break
        ids = _tokenize(some, tokenizer, where)
        lengths += [len(x) for x in ids]
        tokens.append(torch.tensor([t for x in ids for t in x], dtype=torch.int32))
        count += len(tokens[-1])
    if not count:
        raise ValueError(f"data: expected text in {where}, got an empty file")
    starts = torch.tensor([0, *itertools.accumulate(lengths[:-1])])
    return Corpus(torch.cat(tokens), starts)[: limit or count]


def _tokenize(documents: list[Any], tokenizer: Any, where: str) -> list[list[int]]:
    """Token ids of each document; those that are tokens already stay as they are."""
    texts = [d for d in documents if isinstance(d, str)]
    if not texts:
        return documents
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected one to read the text in {where}, got None")
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = getattr(tokenizer, "eos_token_id", None)
    last = [] if first or eos is None else [eos]
    return [first + list(next(encoded)) + last if isinstance(d, str) else d for d in documents]


def _recorded(
    documents: Iterator[str | list[int]], tokenizer: Any, options: DataOptions, record: Path
) -> Corpus:
    """A stream's tokens: written down the first time, later read from there."""
    first = next(documents, None)
    name = [first, options.field, options.limit]
    if not record.exists():
        stream = itertools.chain([] if first is None else [first], documents)
        corpus = _encode(stream, tokenizer, options.limit, "the stream")
        state = {"name": name, "tokens": corpus.tokens, "starts": corpus.starts}
        write_atomically(record, lambda temporary: torch.save(state, temporary))
    state = torch.load(record, mmap=True, weights_only=True)
    if state["name"] != name:
        raise ValueError(
            f"data: expected the stream and options that {record} was written from, got others; "
            "move it away to read anew"
        )
    return Corpus(state["tokens"], state["starts"])
