"""Texts of Project Gutenberg as documents to train on: JSON lines, without the licence's frame.

    python tests/bench/novels.py OUT.jsonl FILE.txt ...

A document is as many whole paragraphs as pass 20,000 characters; lines are joined inside one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

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


def main() -> None:
    out, *files = map(Path, sys.argv[1:])
    lines = [json.dumps({"text": d}) + "\n" for file in files for d in documents(text_of(file))]
    write_atomically(out, lambda temporary: temporary.write_text("".join(lines)))
    print(f"{out}: {len(lines)} documents, {sum(map(len, lines)):,} characters")


if __name__ == "__main__":
    main()
