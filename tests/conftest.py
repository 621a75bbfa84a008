"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import save_checkpoint, save_picture


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
