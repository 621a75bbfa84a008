"""The house: imports point one way, the core knows tensors and not models, and nothing grows without being seen."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import pyramiddrop
from pyramiddrop import METHODS

PACKAGE = Path(pyramiddrop.__file__).parent
# From the bottom up; a module may import from its own floor and from those below.
FLOORS = (
    ("naive", "families", "schedule", "scoring", "selection", "trace", "cost", "planning"),
    ("hf",),
    ("methods", "method_spec", "saving"),
    ("vllm",),
    ("assets", "inference"),
    ("training", "evaluation", "report", "speed"),
    ("cli",),
)
CORE = FLOORS[0]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


# What there is, and a little room: these may only become less.
MODULE_LINES, METHODS_LINES = 480, 680
BODY_LINES = 45  # of a function, without its signature and docstring
SMALL = 40  # a module of fewer lines that serves one other belongs into it
# It imports what only some versions of vLLM have.
APART = {"vllm/architectures.py"}


def modules() -> list[Path]:
    return [
        path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
    ]


def home(path: Path) -> str:
    """The part of the house that a module belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of the modules that `path` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def parts_used(path: Path) -> set[str]:
    inner = [name.split(".") for name in imported(path) if name.startswith("pyramiddrop.")]
    return {name[1] for name in inner if name[1] in FLOOR_OF}


def test_every_module_has_a_floor() -> None:
    assert {home(path) for path in modules()} <= set(FLOOR_OF)


def test_imports_point_down() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {part}"
        for path in modules()
        for part in parts_used(path)
        if FLOOR_OF[part] > FLOOR_OF[home(path)]
    ]
    assert upward == []


def test_the_core_knows_no_models() -> None:
    outside = ("transformers", "vllm", "peft", "accelerate")
    guilty = [
        path for path in modules() if home(path) in CORE and any(n.split(".")[0] in outside for n in imported(path))
    ]
    assert guilty == []


def test_the_vllm_plugin_and_the_transformers_adapter_do_not_meet() -> None:
    floor_of_vllm = {*CORE, "methods", "vllm"}
    assert all(parts_used(path) <= floor_of_vllm for path in modules() if home(path) == "vllm")
    assert not any("vllm" in parts_used(path) for path in modules() if home(path) == "hf")


def test_modules_and_functions_stay_small() -> None:
    long = []
    for path in modules():
        text = path.read_text()
        limit = METHODS_LINES if path.name == "methods.py" else MODULE_LINES
        if len(text.splitlines()) > limit:
            long.append(str(path.relative_to(PACKAGE)))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and int(body[-1].end_lineno or 0) - body[0].lineno >= BODY_LINES:
                    long.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert long == []


def test_a_small_module_serves_more_than_one_other() -> None:
    """A verb of the command line has a file of its own, and what a package shows to its users may be small."""
    users = {path: imported(path) for path in PACKAGE.rglob("*.py")}
    lonely = []
    for path in modules():
        name = str(path.relative_to(PACKAGE))
        if path.stem == "__init__" or home(path) == "cli" or name in APART:
            continue
        dotted = f"pyramiddrop.{name.removesuffix('.py').replace('/', '.')}"
        serves = [user for user, names in users.items() if dotted in names and user != path]
        if len(path.read_text().splitlines()) < SMALL and len(serves) == 1 and serves[0].stem != "__init__":
            lonely.append(name)
    assert lonely == []


def test_every_module_and_public_name_has_a_docstring() -> None:
    """What overrides a method of a base class may leave its docstring to the base."""
    silent = [path.name for path in PACKAGE.rglob("*.py") if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent + [name for path in modules() for name in undocumented(ast.parse(path.read_text()))] == []


def undocumented(node: ast.Module | ast.ClassDef, inherits: bool = False) -> Iterator[str]:
    """Public classes, functions and methods in `node` that have no docstring."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            if not ast.get_docstring(child) and (isinstance(child, ast.ClassDef) or not inherits):
                yield child.name
            if isinstance(child, ast.ClassDef):
                yield from (f"{child.name}.{name}" for name in undocumented(child, bool(child.bases)))


@pytest.mark.parametrize("name", ["Method", *METHODS])
def test_help_explains_each_argument_and_each_name_of_a_method(name: str) -> None:
    kind = getattr(pyramiddrop, name)
    for entry in fields(kind):
        if entry.init:
            assert re.search(rf"^ +{entry.name}: .", str(kind.__doc__), re.M), entry.name
    public = [one for one in dir(kind) if not one.startswith("_") and callable(getattr(kind, one))]
    assert [one for one in public if not inspect.getdoc(getattr(kind, one))] == []


def test_no_merge_was_left_undone() -> None:
    root = Path(__file__).parents[1]
    pages = [
        *root.glob("*.md"),
        *(path for part in ("docs", "examples", "tests") for path in root.glob(f"{part}/**/*.md")),
    ]
    assert pages
    assert [str(path) for path in pages if re.search(r"^(<{7}|>{7}) ", path.read_text(), re.MULTILINE)] == []
