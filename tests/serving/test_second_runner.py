"""vLLM's second model runner, which is what a GPU runs; here on the CPU, its kernels interpreted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")
pytest.importorskip("triton", reason="Triton is not installed: it interprets the second runner's kernels")

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "family", ["llava", pytest.param("internvl", marks=pytest.mark.slow), pytest.param("qwen", marks=pytest.mark.slow)]
)
def test_the_second_model_runner(llava: Path, tmp_path: Path, family: str) -> None:
    shutil.copytree(HERE / "triton_stub", tmp_path / "triton_stub")
    about = tmp_path / "triton_stub-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-stub\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[triton.backends]\ncpu = triton_stub\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, HERE, HERE.parent, os.environ.get("PYTHONPATH", "")))),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    scratch = tmp_path / "checkpoints"
    scratch.mkdir()
    command = [sys.executable, HERE / "second_runner.py", family, llava, scratch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
