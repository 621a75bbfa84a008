"""The notebooks run offline with the bundled model; what is committed has run, and is small."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: What must stand in the output of one that ran.
SAYS = {
    "first-steps": ["with PyramidDrop: room 356", "72 of 576 visual tokens are kept"],
    "redundancy": ["is predicted to lose", "PyramidDrop(lam="],
    "compare-methods": ["minus vanilla", "RandomDrop", "UniformDrop"],
}

nbformat = pytest.importorskip("nbformat", reason="pip install '.[test]' brings nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install '.[test]' brings nbformat, nbclient and ipykernel")


def output_of(notebook: object) -> str:
    """Everything that its cells print and show as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]  # type: ignore[attr-defined]
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SAYS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_has_run_and_is_small(path: Path) -> None:
    assert path.stat().st_size < 400_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(text in output_of(notebook) for text in SAYS[path.stem])
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    settings = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=settings).execute()
    assert all(text in output_of(notebook) for text in SAYS[path.stem])
