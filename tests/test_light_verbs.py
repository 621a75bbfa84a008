"""Verbs that compute with plain numbers do not wait for PyTorch or Transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = """
import sys
from typer.testing import CliRunner
from pyramiddrop.cli.main import app
result = CliRunner().invoke(app, sys.argv[1:])
assert result.exit_code == 0, result.output
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers"})
assert not heavy, f"{heavy} imported"
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["methods"],
        ["methods", "--json"],
        ["cost", "--shape", "llava-1.5-7b"],
        ["cost", "--shape", "llava-1.5-7b", "--method", "pyramiddrop:lam=0.4", "--method", "fastv", "--json"],
        ["plan", "--shape", "llava-1.5-7b", "--percent", "60"],
    ],
    ids=" ".join,
)
def test_a_verb_imports_no_framework(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
