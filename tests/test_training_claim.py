"""The arithmetic of the study of the paper's claim: what is compared at equal steps and at equal time."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    return importlib.import_module("training_claim")


SECONDS = {"vanilla": 1.0, "λ = 0.4": 0.5, "random": 0.75}
COUNT = 480


def bits(share: float) -> str:
    """480 answers, of which the first `share` are right."""
    return np.packbits(np.arange(COUNT) < round(share * COUNT)).tobytes().hex()


def made_up(study: Any) -> dict[str, Any]:
    """Accuracies that grow with the steps, by 1/400 a step; without dropping they are a tenth more."""
    runs = {}
    for seed in study.SEEDS:
        for name in study.ARMS:
            steps = list(range(40, study.ARMS[name].steps + 1, 40))
            steps += [study.ARMS[name].steps] if steps[-1] < study.ARMS[name].steps else []
            right = [
                {one: bits(step / 400 + 0.1 * (one == "vanilla")) for one in study.inferences(name, step)}
                for step in steps
            ]
            runs[f"{name}/{seed}"] = {"steps": steps, "right": right, "step_seconds": SECONDS.get(name, 0.6)}
    return {"setting": {"scenes": 30}, "start": {"vanilla": bits(0.1)}, "runs": runs}


def test_what_equal_time_is(study: Any) -> None:
    """Half the seconds a step, twice the steps, though no more than were made; without dropping a step costs more."""
    record = made_up(study)
    assert study.ends(record, "vanilla") == (120, 120)
    assert study.ends(record, "random") == (120, 160)
    assert study.ends(record, "λ = 0.4") == (120, 200)
    assert study.steps_in(record, "λ = 0.4", 120.0) == 240
    mixture = "λ = 0.5, then none"
    assert study.steps_in(record, mixture, 60.0) == 100
    assert study.steps_in(record, mixture, 120.0) == pytest.approx(140 + (120 - 140 * 0.6) / 1.0)


def test_points_between_two_of_a_curve(study: Any) -> None:
    right = study.right_at(made_up(study), "random", "random", 100)
    assert right.shape == (3, COUNT)
    assert right.mean() == pytest.approx(0.25, abs=2 / COUNT)
    assert study.right_at(made_up(study), "vanilla", "random", 100) is None


def test_the_tables(study: Any) -> None:
    record, scenes = made_up(study), np.repeat(np.arange(30), 16)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in study.claim_lines(record, scenes)]
    assert len({len(row) for row in rows}) == 1
    own = next(row for row in rows if row[0] == row[3] == "λ = 0.4")
    assert own[1:3] == ["0.500", "0.50"]
    assert [cell.split(" ±")[0] for cell in own[4:]] == ["30.0", "+0.0", "200", "50.0", "+20.0"]
    random = next(row for row in rows if row[0] == row[3] == "random")
    assert random[5] == random[8] == ""  # vanilla was not asked so
    curves = study.curve_lines(record)
    assert any(line.startswith("| vanilla | vanilla | 20.0 | 30.0 | 40.0 |  |") for line in curves)
    kinds = np.array(["read_row", "digit_at"] * 240)
    assert len(study.claim_kind_lines(record, kinds)) == 2 + sum(
        len(study.inferences(name, arm.steps)) for name, arm in study.ARMS.items()
    )


@pytest.mark.slow
def test_the_study_runs_and_goes_on(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of two arms from the bundled weights; a run that is done is not done again."""
    from dataclasses import replace

    from pyramiddrop.assets import digits_checkpoint

    monkeypatch.setattr(study, "RESULTS", tmp_path / "record.json")
    for name, value in (("EVERY", 1), ("EQUAL_STEPS", 1), ("MORE_STEPS", 2), ("BATCH", 4), ("SCENES", 1)):
        monkeypatch.setattr(study, name, value)
    arms = study.ARMS | {
        "vanilla": replace(study.ARMS["vanilla"], steps=1),
        "λ = 0.5, then none": replace(study.ARMS["λ = 0.5, then none"], steps=2, drop_until=1),
    }
    monkeypatch.setattr(study, "ARMS", arms)
    study.measure(digits_checkpoint(), ["vanilla"], 1)
    first = study.RESULTS.read_text()
    study.measure(digits_checkpoint(), ["vanilla", "λ = 0.5, then none"], 1)
    record = study.json.loads(study.RESULTS.read_text())
    assert record["runs"]["vanilla/0"] == study.json.loads(first)["runs"]["vanilla/0"]
    run = record["runs"]["λ = 0.5, then none/0"]
    assert run["steps"] == [1, 2]
    assert [set(right) for right in run["right"]] == [{"vanilla", "λ = 0.5", "FastV"}] * 2
    assert study.unpacked(run["right"][0]["vanilla"]).shape == (16,)
    assert 0 < run["seconds"][0] < run["seconds"][1]
