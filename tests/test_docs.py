"""Every Python block of the README and the documentation runs, page by page, in order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEAVY = ("torch.compile(", "flacompile.export(")  # a minute rather than seconds
CONTINUES = {"docs/export.md": "README.md"}  # reads the package that the other page wrote


def blocks(page: str) -> list[str]:
    """Each block behind as many newlines as stand before it, so that errors name its lines."""
    text = (ROOT / page).read_text()
    return ["\n" * (text.count("\n", 0, m.start()) + 1) + m[1] for m in BLOCK.finditer(text)]


def chain(page: str) -> list[str]:
    """The page, after those it continues."""
    return [*(chain(CONTINUES[page]) if page in CONTINUES else []), page]


def is_heavy(page: str) -> bool:
    return any(call in block for p in chain(page) for block in blocks(p) for call in HEAVY)


def pages() -> list[object]:
    """All pages with code; one that another continues runs as part of that."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [str(path.relative_to(ROOT)) for path in paths]
    return [
        pytest.param(name, marks=pytest.mark.slow if is_heavy(name) else ())
        for name in names
        if blocks(name) and name not in CONTINUES.values()
    ]


@pytest.mark.parametrize("page", pages())
def test_blocks_run(page, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look up annotations
    for name in chain(page):
        for block in blocks(name):
            exec(compile(block, str(ROOT / name), "exec"), module.__dict__)
