"""The teacher's corpus: `pydoc_data.topics` and the docstrings of the public standard library.

Every Python carries these texts, so that nothing is downloaded. The order is fixed and a docstring
that occurs twice counts once.
"""

from __future__ import annotations

import ast
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

HELDOUT_SHARE, LONGEST_HELDOUT = 0.05, 20_000  # of the corpus; characters
PRIVATE_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages"}


def sources() -> Iterator[tuple[str, Path]]:
    """Name and file of every public module of the standard library, sorted by name."""
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        public = not any(p in PRIVATE_FOLDERS or p.startswith("_") for p in parts[:-1])
        named = parts[-1] == "__init__" or not parts[-1].startswith("_")
        if parts[0] in sys.stdlib_module_names and public and named:
            yield ".".join(parts), path


def entries(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Heading, as pydoc prints it, and docstring of every definition below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}({ast.unparse(child.args)})", ast.get_docstring(child) or ""
        elif isinstance(child, ast.ClassDef):
            yield f"class {prefix}{child.name}", ast.get_docstring(child) or ""
            yield from entries(child, f"{prefix}{child.name}.")


def module_text(path: Path, seen: set[str]) -> str:
    """The docstrings of one source file, each under its heading, without those already `seen`."""
    tree = ast.parse(path.read_bytes())
    parts = []
    for heading, text in [("", ast.get_docstring(tree) or ""), *entries(tree)]:
        if text and text not in seen:
            seen.add(text)
            parts.append(f"{heading}\n\n{text}".strip())
    return "\n\n\n".join(parts)


def documents() -> dict[str, str]:
    """The corpus in a fixed order: one document for a topic, one for a source file."""
    found = {f"topic {name}": text.strip() for name, text in sorted(topics.items())}
    seen = set(found.values())
    found |= {f"module {name}": module_text(path, seen) for name, path in sources()}
    return {name: text for name, text in found.items() if text}


def split(corpus: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents, both shuffled by a hash of the document's name.

    A document is wholly on one side. Very long ones stay in training: one alone would be the
    whole held-out text.
    """
    shuffled = sorted(corpus, key=lambda name: zlib.crc32(name.encode()))
    budget = HELDOUT_SHARE * sum(map(len, corpus.values()))
    train, heldout = [], []
    for text in map(corpus.__getitem__, shuffled):
        if len(text) > LONGEST_HELDOUT or budget <= 0:
            train.append(text)
        else:
            heldout.append(text)
            budget -= len(text)
    return train, heldout


def excerpt(texts: list[str], num_bytes: int) -> str:
    """The first documents as one text of about `num_bytes`, cut at the end of a paragraph."""
    whole = "\n\n\n".join(texts).encode()[:num_bytes].decode(errors="ignore")
    return whole.rsplit("\n\n", 1)[0] + "\n"
