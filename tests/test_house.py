"""The rules that keep the house in order: one way of imports, light ones, short files."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("ops", "passes", "flacompile")  # each may import itself and those before it
FILES = sorted(
    path
    for folder in (*LAYERS, "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "flacompile" / "ops")  # links to the folders themselves
    and not path.is_relative_to(ROOT / "flacompile" / "passes")
)
LONGEST = 400


def layer_of(module: str) -> str | None:
    """Which of LAYERS a full module name belongs to; None for somebody else's."""
    parts = module.split(".")
    if parts[0] != "flacompile":
        return None
    return parts[1] if parts[1:] and parts[1] in LAYERS[:2] else "flacompile"


def package_of(path: Path) -> list[str]:
    """["flacompile", "ops", "kernels"] for ops/kernels/launch.py."""
    folders = list(path.relative_to(ROOT).parent.parts)
    return folders if folders[0] == "flacompile" else ["flacompile", *folders]


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Full names of the modules that a file imports, and where; not those for type checkers."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            found += [(f"{module}.{alias.name}", node) for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    allowed = LAYERS[: LAYERS.index(folder) + 1] if folder in LAYERS else LAYERS
    for module, node in imports(path):
        where = f"{name_of(path)}:{node.lineno} imports {module}"
        assert layer_of(module) in (None, *allowed), where
        assert module.split(".")[0] not in ("ops", "passes"), f"{where}; write flacompile.ops"


@pytest.mark.parametrize("folder", ["ops", "passes"])
def test_links_lead_to_the_folders(folder):
    assert (ROOT / "flacompile" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_textbook_loops_fit_a_page():
    """A mixer's loop is read against its paper: at most twelve lines after its signature."""
    functions = ast.parse((ROOT / "tests" / "textbook.py").read_text()).body
    for function in functions:
        if isinstance(function, ast.FunctionDef):
            lines = function.end_lineno - function.body[0].lineno + 1
            assert lines <= 12, function.name


def test_only_kernels_import_triton():
    """Elsewhere it is torch that does, in its counter of operations and in triton_op."""
    found = [
        name_of(path)
        for path in FILES
        if path.relative_to(ROOT).parts[0] in LAYERS
        for module, _ in imports(path)
        if module.split(".")[0] == "triton" and "kernels" not in path.parts
    ]
    assert not found


HEAVY = {"transformers", "torchao", "matplotlib", "sympy", "flacompile.ops.kernels"}
HEAVY |= {"torch._dynamo", "torch._inductor", "torch.distributed.tensor"}


def test_import_is_light():
    """Half a second after torch's own; each of the heavy ones would take as long again."""
    code = "import flacompile, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & HEAVY


CODE = [path for path in FILES if path.relative_to(ROOT).parts[0] in LAYERS]
THEIRS = {  # methods that torch and transformers have named and described
    *("forward", "setup_context", "backward", "extra_repr", "run_node"),
    *("get_seq_length", "get_mask_sizes", "get_max_length", "lazy_initialization", "crop"),
    *("update", "reset", "reorder_cache", "batch_repeat_interleave"),
}


def public(path: Path) -> list[ast.FunctionDef]:
    """Functions and methods of a file, but not those inside a function."""
    module = ast.parse(path.read_text()).body
    classes = [node for node in module if isinstance(node, ast.ClassDef)]
    nodes = itertools.chain(module, *(node.body for node in classes))
    return [n for n in nodes if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def test_public_functions_say_what_they_do():
    """Each has a docstring, or a method of its name has where the contract stands."""
    functions = [(path, f) for path in CODE if "kernels" not in path.parts for f in public(path)]
    said = {f.name for _, f in functions if ast.get_docstring(f)} | THEIRS
    assert not [
        f"{name_of(path)}:{f.lineno} {f.name}" for path, f in functions if f.name not in said
    ]


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_public_functions_are_typed(path):
    """But for kernels, whose arguments are pointers and numbers of Triton."""
    for f in () if "kernels" in path.parts else public(path):
        arguments = (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)
        untyped = [
            a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
        ]
        assert not untyped and f.returns is not None, (
            f"{name_of(path)}:{f.lineno} {f.name} {untyped}"
        )


CPP = """
alignas alignof asm auto bool case catch char class const constexpr decltype default delete do
double dynamic_cast enum explicit export extern float friend goto inline int long mutable namespace
new noexcept nullptr operator private protected public register requires short signed sizeof static
struct switch template this throw typedef typeid typename union unsigned using virtual void volatile
"""  # without Python's own, which no parameter can have


@pytest.mark.parametrize("path", sorted((ROOT / "ops" / "kernels").glob("*.py")), ids=name_of)
def test_parameters_of_kernels_are_no_words_of_cpp(path):
    """Inductor's C++ wrapper names variables after them."""
    kernels = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if "triton.jit" in map(ast.unparse, node.decorator_list)
    ]
    for kernel in kernels:
        words = {a.arg for a in kernel.args.args} & {*CPP.split()}
        assert not words, f"{name_of(path)}:{kernel.lineno} {kernel.name} {words}"
