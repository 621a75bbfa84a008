"""The engine that these tests run: vLLM on a CPU, in an environment of its own (`.ci/vllm`). Where vLLM is not
installed, what needs it is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is not None:  # read when vLLM is imported, and by the processes that it starts
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # tests look into the scheduler; those of processes set it to 1
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture(scope="session", autouse=True)
def models_are_inspected_here() -> Iterator[None]:
    """vLLM looks at a model's class in a process of its own, for each class, lest CUDA is initialised in this one."""
    if find_spec("vllm") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda inspect: inspect())
        yield


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5's build: 8 layers, 16 visual tokens a picture."""
    return _saved(tmp_path_factory, "llava")


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT's build: pictures of different sizes have different numbers of tokens."""
    return _saved(tmp_path_factory, "next")


def _saved(factory: pytest.TempPathFactory, family: str) -> Path:
    from served import save_served

    return save_served(factory.mktemp(family), family)
