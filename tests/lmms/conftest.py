"""lmms-eval, in an environment of its own (`.ci/lmms`). Where it is not installed, what needs it is skipped."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("lmms_eval") else ["test_*.py"]
if find_spec("lmms_eval") is not None:  # read when Hugging Face's hub is imported
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task `digits` and its pictures."""
    from digits_task import write_task

    return write_task(tmp_path_factory.mktemp("tasks"))
