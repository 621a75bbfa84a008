"""The verb `methods`, and the pages about methods: they know what there is, and their examples run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pyramiddrop.cli.main import app
from pyramiddrop.method_spec import NAMES
from pyramiddrop.scoring import SCORERS
from tiny import make_batch, tiny_model

DOCS = Path(__file__).parent.parent / "docs"


def test_every_method_scorer_and_option_is_listed() -> None:
    table, listed = (CliRunner().invoke(app, ["methods", *words], env={"COLUMNS": "80"}) for words in ([], ["--json"]))
    entries = json.loads(listed.stdout)["methods"]
    by_kind = {kind: [one["name"] for one in entries if one["kind"] == kind] for kind in ("method", "scorer", "option")}
    assert by_kind["method"] == list(NAMES)
    assert by_kind["scorer"] == [f"score={name}" for name in SCORERS]
    assert by_kind["option"] == ["reserve=SHARE", "random_from=LAYER", "merge=true"]
    assert all(one["rule"].endswith(".") for one in entries)
    assert [one["arguments"] for one in entries if one["name"] == "fastv"] == [
        ["score", "reserve", "random_from", "layer", "keep"]
    ]
    lines = table.stdout.splitlines()
    assert all(any(line.startswith(name) for line in lines) for names in by_kind.values() for name in names)
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("name", [*NAMES, *SCORERS, "reserve", "random_from", "merge"])
def test_the_page_knows_it(name: str) -> None:
    assert re.search(rf"`{name}[`=]", (DOCS / "methods.md").read_text())


def test_the_example_of_a_new_scorer_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "new-method.md").read_text(), re.S)
    model = tiny_model()
    names: dict[str, object] = {"model": model, "inputs": make_batch(model, [[5, "image", 7]]), "__name__": "example"}
    try:
        for block in code:
            exec(block, names)
        trace, hidden = names["trace"], _hidden(model, names["inputs"])
        torch.testing.assert_close(trace.stages[0].scores[0], hidden[5:21].norm(dim=-1))
        assert names["method"].settings()["score"] == "bright"
    finally:
        SCORERS.pop("bright", None)
    assert len([line for line in code[0].splitlines() if line.strip()]) <= 15


@pytest.mark.slow
def test_the_example_of_a_new_scorer_is_typed(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "new-method.md").read_text(), re.S)[0]
    (tmp_path / "bright.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(DOCS.parent / "pyproject.toml")]
    checked = subprocess.run([*command, str(tmp_path / "bright.py")], capture_output=True, text=True, cwd=DOCS.parent)
    assert checked.returncode == 0, checked.stdout


@torch.no_grad()
def _hidden(model, inputs):  # type: ignore[no-untyped-def]
    return model(**inputs, output_hidden_states=True).hidden_states[2][0]
