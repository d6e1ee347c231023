"""Every Python block of the README and the documentation runs, page by page, in order."""

from __future__ import annotations

import html
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import mixer_table
import pytest

from flacompile.layers import MIXERS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEAVY = ("torch.compile(", "flacompile.export(")  # a minute rather than seconds
CONTINUES = {"docs/run.md": "docs/export.md", "docs/export.md": "README.md"}  # for its package


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


def script(name: str) -> ModuleType:
    """A file of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_works_is_tested():
    assert mixer_table.TABLE.search(mixer_table.README.read_text())[0] == mixer_table.table()


def test_the_plot_is_of_these_figures():
    context = script("context")
    sizes = context.kept()
    assert context.caption(sizes) in " ".join((ROOT / "README.md").read_text().split())
    assert context.description(sizes) in html.unescape(context.PLOT.read_text())
    assert len(context.speeds()) == 3


def test_the_graphs_are_drawn_as_they_are():
    drawn = script("drawn")
    assert drawn.PLOT.read_text() == drawn.draw(*drawn.graphs())


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What makes the table of mixers when the documentation is built."""
    return script("hooks")


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_state_equation_and_paper(name, hooks):
    doc = sys.modules[MIXERS[name].__module__].__doc__
    assert " = " in hooks.equation(doc) and "arxiv.org" in hooks.paper(doc)


def test_states_of_the_table(hooks):
    """An fp32 matrix a head and a counter; keys and values of every token in bf16."""
    assert hooks.costs(MIXERS["gla"])[0] == 4 * 4 * 256 * 512 + 8
    tokens, width = hooks.LENGTH, hooks.WIDTH
    assert hooks.costs(MIXERS["attn"])[0] == tokens * (2 * 2 * width + 1) + 8


def test_every_mixer_has_its_use():
    page = (ROOT / "docs" / "mixers.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(MIXERS)


LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#([^)]*))?\)")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links(page):
    """mkdocs checks those of its own pages, anchors too."""
    for path, anchor in LINK.findall((ROOT / page).read_text()):
        assert (ROOT / path).exists(), path
        titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [t.lower().replace(" ", "-") for t in titles], anchor


def messages() -> list[str]:
    """The errors that docs/faq.md explains."""
    return re.findall(r"^### `(.*)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def source() -> str:
    """All code as one text, the strings that a line break cuts put together."""
    folders = (ROOT / name for name in ("flacompile", "ops", "passes"))
    text = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    return re.sub(r'"\s+f?"', "", text)


@pytest.mark.parametrize("message", messages())
def test_explained_errors_exist(message, source):
    """The message stands in the code: an argument's name and what is expected may be apart."""
    name, _, expected = message.partition(": expected ")
    found = message in source or (f'"{name}"' in source and f'"{expected}' in source)
    assert found, message
