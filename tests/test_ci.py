"""The scripts in .ci: an environment that cannot be made is never a silent success."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", ["vllm", "lmms"])
@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_an_environment_that_cannot_be_made_is_skipped_and_in_ci_fails(
    script: str, ci: str, code: int, tmp_path: Path
) -> None:
    unmade = {"PYTHON": "false", "VLLM_ENV": str(tmp_path / "none"), "LMMS_ENV": str(tmp_path / "none"), "CI": ci}
    done = subprocess.run([ROOT / ".ci" / script], env=os.environ | unmade, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith("SKIPPED: ")
    assert "cannot be installed on this machine" in done.stderr
