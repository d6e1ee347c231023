"""Texts of Project Gutenberg as documents to train on, without the licence's frame.

    python tests/bench/novels.py OUT.jsonl FILE.txt ...
    python tests/bench/novels.py OUT.npy --tokenizer TEACHER FILE.txt ...

A document is as many whole paragraphs as pass 20,000 characters; lines are joined inside one. OUT
is JSON lines, or the tokens of them all.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from flacompile.cli import read_model
from flacompile.data import read
from flacompile.files import write_atomically

LEAST = 20_000  # characters of a document
BEGIN, END = re.compile(r"\*\*\* ?START[^\n]*\n"), re.compile(r"\*\*\* ?END")


def text_of(file: Path) -> str:
    """What stands between the marks of the licence; older files are in Latin-1."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    begin, end = BEGIN.search(text), END.search(text)
    return text[begin.end() if begin else 0 : end.start() if end else None].replace("\r", "")


def documents(text: str) -> Iterator[str]:
    """Paragraphs in their order; a last document that is too short is left out."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        held += filter(None, [" ".join(paragraph.split())])
        if sum(map(len, held)) > LEAST:
            yield "\n\n".join(held)
            held = []


def save(tokens: np.ndarray, file: Path) -> None:
    with file.open("wb") as stream:
        np.save(stream, tokens)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path)
    options.add_argument("files", type=Path, nargs="+")
    options.add_argument("--tokenizer", help="a model's folder or .gguf file, to write .npy")
    options = options.parse_args()
    texts = [{"text": d} for file in options.files for d in documents(text_of(file))]
    if options.out.suffix == ".npy":
        tokens = read(texts, read_model(options.tokenizer)[1]).tokens.numpy().astype(np.uint16)
        write_atomically(options.out, partial(save, tokens))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in texts)
        write_atomically(options.out, lambda file: file.write_text(lines))
    characters = sum(len(row["text"]) for row in texts)
    print(f"{options.out}: {len(texts)} documents, {characters:,} characters")


if __name__ == "__main__":
    main()
