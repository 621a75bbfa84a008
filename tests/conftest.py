"""Fixtures that several test files share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import save_checkpoint, save_picture


@pytest.fixture(scope="session", autouse=True)
def cache_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` keeps goes with the session; commands that tests start inherit it."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        if "datasets" in sys.modules:
            patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA on disk: 8 layers, 16 visual tokens a picture."""
    return save_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def next_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA-NeXT on disk: 8 layers, tiles of 28 pixels and 16 tokens."""
    return save_checkpoint(tmp_path_factory.mktemp("next"), "next")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 90 x 60 pixels on disk."""
    return save_picture(tmp_path_factory.mktemp("pictures") / "picture.png")
