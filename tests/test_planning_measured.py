"""Milliseconds of plans from bench's record: measured methods have their own, others lie between two, and refusals."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pyramiddrop import FastV, PyramidDrop
from pyramiddrop.cli.main import app
from pyramiddrop.cost import DecoderShape, ModelShape, Prompt, estimate_cost
from pyramiddrop.planning import Budget, MeasuredTimes, plan
from test_cli_generate import assert_one_line

FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "llava-1.5-7b-cpu.json"
RECORD = json.loads(FILE.read_text())
MODEL, PROMPT = ModelShape(DecoderShape(16, 4096, 11008, 32, 32, 128)), Prompt(576, 64)
SIZES = ["--num-layers", "16", "--hidden", "4096", "--intermediate", "11008", "--heads", "32", "--visual-tokens", "576"]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "160"})


def measured(variant: str) -> float:
    """Milliseconds in the record."""
    (found,) = [one["decoder"]["median"] for one in RECORD["results"] if one["variant"] == variant]
    return 1000 * float(found)


def test_a_method_that_was_measured_has_its_own_time() -> None:
    times = MeasuredTimes.read(FILE)
    times.check(MODEL, PROMPT)
    assert times.milliseconds(estimate_cost(MODEL, PROMPT)) == pytest.approx(measured("vanilla"))
    drop = FastV()
    fastv = estimate_cost(MODEL, PROMPT, drop.schedule(16), drop.ranking_flops)
    assert times.milliseconds(fastv) == pytest.approx(measured("FastV"), rel=1e-4)
    # The record counts the ranking a little higher than this version: it is still the same method.
    pyramid = estimate_cost(MODEL, PROMPT, PyramidDrop().schedule(16))
    assert times.milliseconds(pyramid) == pytest.approx(measured("PyramidDrop"))


@pytest.mark.parametrize("tokens", [290, 320, 400, 560])
def test_a_plan_lies_on_the_line_between_its_neighbours(tokens: float) -> None:
    found = plan(MODEL, PROMPT, Budget(tokens=tokens))
    points = sorted((one["predicted"]["flops"], 1000 * one["decoder"]["median"]) for one in RECORD["results"])
    flops, times = map(list, zip(*points, strict=True))
    at = found.cost.full.decoder + found.cost.full.ranking
    assert flops[0] < at < flops[-1]
    told = MeasuredTimes.read(FILE).milliseconds(found.cost)
    assert told == pytest.approx(np.interp(at, flops, times))
    assert measured("PyramidDrop") < told < measured("vanilla")


def test_the_error_is_that_of_each_measurement_told_by_the_others() -> None:
    (low, first), (middle, second), (high, third) = sorted(
        (one["predicted"]["flops"], one["decoder"]["median"]) for one in RECORD["results"]
    )
    told = first + (third - first) * (middle - low) / (high - low)
    assert MeasuredTimes.read(FILE).error == pytest.approx(abs(told - second) / second)
    short = deepcopy(RECORD)
    del short["results"][1]
    assert MeasuredTimes.from_dict(short).error is None


def test_the_verb_shows_milliseconds_beside_the_cost() -> None:
    words = ["--average-tokens", "300", "--bench", str(FILE), *SIZES]
    record = json.loads(run(*words, "--json").stdout)
    assert record["vanilla_milliseconds"] == pytest.approx(measured("vanilla"))
    assert record["milliseconds"] < record["vanilla_milliseconds"]
    printed = run(*words).stdout
    share = record["milliseconds"] / record["vanilla_milliseconds"]
    row = next(line for line in printed.splitlines() if "decoder's prefill" in line)
    assert f"({share:.0%})".replace("%", " %") in row
    assert "llava-1.5-7b, bfloat16" in printed
    assert "decoder's prefill" not in run(*words[:2], *SIZES).stdout
    published = json.loads(run("--published", "--bench", str(FILE), *SIZES, "--json").stdout)["plans"]
    assert {one["vanilla_milliseconds"] for one in published} == {record["vanilla_milliseconds"]}
    assert "decoder's prefill" in run("--published", "--bench", str(FILE), *SIZES).stdout


def test_below_what_was_measured_nothing_is_said_but_how_to_measure_it() -> None:
    words = ["--average-tokens", "64", "--bench", str(FILE), *SIZES]
    assert json.loads(run(*words, "--json").stdout)["milliseconds"] is None
    printed = run(*words).stdout
    assert "not known" in printed
    method = json.loads(run(*words, "--json").stdout)["arguments"]
    spec = f"pyramiddrop:lam={method['lam']},layers={'/'.join(map(str, method['layers']))}"
    assert f"measure it with bench --method '{spec}'" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SIZES[:-1], "575"], "the record's visual_tokens is 576, and the plan's is 575: give --visual-tokens 576"),
        ([*SIZES, "--text-tokens", "9"], "the record's text_tokens is 64"),
        ([], "the record's layers is 16, and the plan's is 32: run bench for the model and prompt of the plan"),
        (["--shape", "qwen2.5-vl-7b"], "the record's layers is 16"),
    ],
)
def test_a_record_of_something_else_is_refused(words: list[str], message: str) -> None:
    result = run("--average-tokens", "300", "--bench", str(FILE), *words)
    assert_one_line(result, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "overhead"}, "it measures overhead; run bench without --train and --overhead"),
        ({"results": []}, "it has no batch of 1"),
        ({"results": RECORD["results"][:1]}, "a line needs two measurements that differ in FLOPs"),
        ({"results": RECORD["results"][1:]}, "it has no vanilla"),
        ({"subject": {}}, "'name' is missing"),
    ],
)
def test_a_file_that_is_no_record_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(RECORD | change))
    result = run("--average-tokens", "300", "--bench", str(path), *SIZES)
    assert_one_line(result, message)
    assert "is no record of `pyramiddrop bench --json`" in result.stderr
    assert_one_line(run("--average-tokens", "300", "--bench", str(tmp_path / "none.json"), *SIZES), "cannot read")


def test_layers_that_cost_otherwise_are_refused() -> None:
    other = deepcopy(RECORD)
    other["results"][0]["predicted"]["flops"] *= 1.01
    with pytest.raises(ValueError, match=r"the record's untouched prefill has 4.295e\+12 FLOPs"):
        MeasuredTimes.from_dict(other).check(MODEL, PROMPT)
