"""The tables of docs/training.md are those of the committed record."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text("utf-8")


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    return importlib.import_module("training_study")


@pytest.fixture(scope="module")
def record(study: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(study.RESULTS.read_text("utf-8"))
    return found


def test_the_tables_are_the_record(study: Any, record: dict[str, Any]) -> None:
    benchmark = study.DigitsBenchmark("test", record["setting"]["scenes"])
    scenes = np.array([sample.scene for sample in benchmark])
    lines = study.time_lines(record["runs"]) + study.kind_lines(record)
    lines += study.accuracy_lines(record["start"], record["runs"], scenes)
    assert [line for line in lines if line not in PAGE] == []


def test_every_way_ran_with_every_seed(study: Any, record: dict[str, Any]) -> None:
    assert set(record["runs"]) == {f"{way}/{seed}" for way in study.ways() for seed in study.SEEDS}


def test_errors_count_scenes_and_seeds(study: Any) -> None:
    """Equal answers of all seeds leave the error of the scenes; different ones add theirs."""
    rng = np.random.default_rng(0)
    scenes = np.repeat(np.arange(30), 8)
    one = (rng.random(240) < 0.8).astype(float)
    same = study.with_seeds(np.stack([one] * 3), scenes)
    assert same.error == pytest.approx(study.score(one, scenes).error)
    worse = study.with_seeds(np.stack([one, one, one * (rng.random(240) < 0.5)]), scenes)
    by_seed = np.std([one.mean(), one.mean(), worse.mean * 3 - 2 * one.mean()], ddof=1) / 3**0.5
    assert worse.error > by_seed > 0.1
