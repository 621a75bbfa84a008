"""Fixtures that several test files share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints import save_checkpoint, save_picture


def pytest_configure() -> None:
    """What is equal to the bit on one thread need not be on several."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `fast_cases(count)` leaves out as slow. One case is taken of each of `count` equal parts of a test's
    cases, and each time from another place in the part, so that no value of a parameter is passed over by a rhythm."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("fast_cases") and not item.get_closest_marker("slow"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        count = min(cases[0].get_closest_marker("fast_cases").args[0], len(cases))
        fast = {int((part + part * 0.618 % 1) * len(cases) / count) for part in range(count)}
        for number, case in enumerate(cases):
            if number not in fast:
                case.add_marker(pytest.mark.slow)


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
