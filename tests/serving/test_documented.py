"""docs/serving.md as it is written: a small checkpoint is trained, served, and asked by the openai client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")
pytest.importorskip("trl", reason="training needs pyramiddrop[train]")
pytest.importorskip("openai", reason="the client is not installed")

from clients import wait_until_healthy

from documents import Block, blocks

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
PORT = 8000


def example() -> list[Block]:
    """The blocks of the section: data, commands, client."""
    found = blocks(PAGE)
    first = next(number for number, block in enumerate(found) if "digits_questions()" in block.text)
    return found[first : first + 3]


@contextmanager
def shell(commands: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """The commands in a shell of its own, until their server answers."""
    log = folder / "shell.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            ["bash", "-ec", commands], cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            wait_until_healthy(process, f"http://localhost:{PORT}", log)
            yield
        finally:
            os.killpg(process.pid, 15)
            process.wait(60)


@pytest.mark.slow
def test_train_then_serve_then_ask(tmp_path: Path) -> None:
    data, commands, client = example()
    assert [block.language for block in (data, commands, client)] == ["python", "bash", "python"]
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }

    def python(text: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    python(data.text)
    with shell(commands.text, tmp_path, environment):
        assert python(client.text).strip() == "7 0"
    assert (tmp_path / "my-digits" / "pyramiddrop.json").is_file()
