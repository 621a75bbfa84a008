"""The example scripts of inference run on the bundled model as they are, and answer rightly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples" / "inference"
STAGES = "576 288 144 72"
SAYS = {
    "plain": ["without dropping: 8", "with PyramidDrop: 8", f"visual tokens in each stage: {STAGES}"],
    "batch": [
        f"{asked} (visual tokens in each stage: {STAGES})"
        for asked in ("Which digit is white? 8", "Read line 4. room 356", "Which bar is the highest? corn")
    ],
    "video": [f"8 (visual tokens in each stage: {STAGES})"] * 4,
}


def test_every_script_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_a_script_answers_on_the_bundled_model(name: str) -> None:
    words = [sys.executable, EXAMPLES / f"{name}.py"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[: len(SAYS[name])] == SAYS[name]
