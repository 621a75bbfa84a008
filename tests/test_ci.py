"""The scripts in .ci: an environment that cannot be made is never a silent success."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", ["vllm", "lmms", "swift", "deepspeed"])
@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_an_environment_that_cannot_be_made_is_skipped_and_in_ci_fails(
    script: str, ci: str, code: int, tmp_path: Path
) -> None:
    nowhere = dict.fromkeys(("VLLM_ENV", "LMMS_ENV", "SWIFT_ENV", "DEEPSPEED_ENV"), str(tmp_path / "none"))
    unmade = {"PYTHON": "false", "CI": ci} | nowhere
    done = subprocess.run([ROOT / ".ci" / script], env=os.environ | unmade, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith("SKIPPED: ")
    assert "cannot be installed on this machine" in done.stderr


def test_the_newest_transformers_is_the_newest_within_our_bounds(tmp_path: Path) -> None:
    for version in ("5.15.0", "5.17.0", "6.0.0"):
        empty_wheel(tmp_path, "transformers", version)
    only_these = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    script = [sys.executable, ROOT / ".ci" / "newest-transformers"]
    done = subprocess.run(script, env=os.environ | only_these, capture_output=True, text=True, check=True)
    assert done.stdout == "5.17.0\n"


def empty_wheel(folder: Path, name: str, version: str) -> None:
    about = f"{name}-{version}.dist-info"
    with ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


# --- Environments of their own --------------------------------------------------------------------------------------


def test_what_is_imported_is_there() -> None:
    """Also in files that only another environment runs (tests/serving, tests/lmms, benchmarks)."""
    files = [path for part in ("tests", "benchmarks", "examples") for path in ROOT.glob(f"{part}/**/*.py")]
    lost = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in files
        for module, names in imports(path)
        for name in names
        if not defines(module, name)
    ]
    assert len(files) > 100
    assert lost == []


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Modules of this project and of its tests, with the names that are taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and source(node.module.partition(".")[0]):
            yield node.module, [alias.name for alias in node.names]


@cache
def source(module: str) -> Path | None:
    """The file of a module of this project or of its tests."""
    parts = module.split(".")
    places = [ROOT / part / Path(*parts) for part in ("src", "tests")]
    found = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
    return next((file for file in found if file.exists()), None)


def defines(module: str, name: str) -> bool:
    """Whether a module has a name: a submodule, or one that it defines or imports itself."""
    file = source(module)
    if file is None or source(f"{module}.{name}"):
        return file is not None
    return name in names_of(file)


@cache
def names_of(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # names that `__getattr__` gives
            names.add(node.value)
    return names
