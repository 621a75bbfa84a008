"""The verb `plan`: the schedule, its cost and the Python line; refusals on one line; the page's examples."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3_5Config
from typer.testing import CliRunner, Result

from pyramiddrop import PyramidDrop, VisionDrop
from pyramiddrop.cli.main import app
from pyramiddrop.cost import PRESETS, Prompt
from pyramiddrop.planning import Profile, published_plans
from pyramiddrop.report.tables.cost import published_markdown

DOCS = (Path(__file__).parents[1] / "docs" / "cost.md").read_text("utf-8")
EXAMPLES = re.findall(r"^pyramiddrop plan (.*?) +# ((?:PyramidDrop|VisionDrop).+)$", DOCS, flags=re.MULTILINE)
CELLS = [
    {"layer": layer, "keep": keep, "accuracy": 0.8 - (1 - keep) / layer} for layer in (4, 8, 16) for keep in (0.5, 0.1)
]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "120"})


def found(*words: str) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_printed_lines_make_the_method() -> None:
    printed = run("--average-tokens", "270").stdout
    lines = [line for line in printed.splitlines() if line.startswith(("from ", "method "))]
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    assert names["method"] == PyramidDrop(lam=0.5, stages=4)


def test_the_table_has_stages_and_every_measure() -> None:
    printed = run("--average-tokens", "192").stdout
    for row in (r"0 +1 +576", r"6 +0\.4357 +250", r"12 +0\.1898 +109", r"25 +0\.03604 +20"):
        assert re.search(f"^{row} *$", printed, flags=re.MULTILINE)
    for word in (
        "576 → 250 → 109 → 47 → 20",
        "191.91",
        "3.82 TFLOPs",
        "128 MiB  (40 %)",
        "FLOPs, fastv",
        "decode step",
    ):
        assert word in printed
    assert "The budget is an average of 192 visual tokens. This spends an average of 191.906" in printed


@pytest.mark.parametrize(
    ("words", "measure"),
    [
        (["--average-tokens", "200"], lambda answer: answer["cost"]["average_visual_tokens"]),
        (["--tflops", "4"], lambda answer: answer["cost"]["flops"]["full"] / 1e12),
        (["--tflops", "1.5", "--convention", "paper"], lambda answer: answer["cost"]["flops"]["paper"] / 1e12),
        (["--percent", "60"], lambda answer: 100 * answer["flops_ratio"]["full"]),
        (["--percent", "60", "--convention", "fastv"], lambda answer: 100 * answer["flops_ratio"]["fastv"]),
        (["--kv-bytes", "150e6"], lambda answer: answer["cost"]["kv_bytes"]),
    ],
)
def test_each_budget_is_spent_and_not_exceeded(words: list[str], measure: Any) -> None:
    answer, limit = found(*words), float(words[1])
    assert 0.98 * limit <= measure(answer) <= limit
    assert measure(answer) == pytest.approx(answer["spent"])
    assert answer["budget"]["limit"] == limit


def test_the_json_makes_the_method() -> None:
    answer = found("--percent", "50", "--shape", "llava-next-7b", "--visual-tokens", "2000", "--text-tokens", "10")
    assert answer["name"] == "llava-next-7b"
    assert (answer["visual_tokens"], answer["text_tokens"]) == (2000, 10)
    schedule = PyramidDrop(**answer["arguments"]).schedule(32)
    assert [(one["layer"], one["keep"], one["tokens"]) for one in answer["stages"]] == [
        (stage.layer, stage.keep, stage.count(2000)) for stage in schedule.stages
    ]
    assert eval(answer["python"], {"PyramidDrop": PyramidDrop}) == PyramidDrop(**answer["arguments"])


def test_a_plan_behind_a_drop_before_the_decoder() -> None:
    result = run("--average-tokens", "64", "--before", "vision:keep=0.4")
    assert result.stdout.startswith(
        "from pyramiddrop import PyramidDrop, VisionDrop\n\nmethod = VisionDrop(keep=0.4) | "
    )
    told = json.loads(run("--average-tokens", "64", "--before", "vision:keep=0.4", "--json").stdout)
    assert told["stages"][0] == {"layer": 0, "keep": 0.4, "tokens": 230}
    method = eval(told["python"], {"PyramidDrop": PyramidDrop, "VisionDrop": VisionDrop})
    assert method.schedule(32).layers == (0, *(stage["layer"] for stage in told["stages"][1:]))


def test_lambda_or_stages_may_be_fixed() -> None:
    assert found("--average-tokens", "300", "--stages", "8")["arguments"]["stages"] == 8
    assert found("--average-tokens", "300", "--lam", "0.7")["arguments"]["lam"] == 0.7


def test_a_profile_chooses_layers(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"num_layers": 32, "vanilla": 0.8, "cells": CELLS}))
    answer = found("--average-tokens", "300", "--profile", str(path))
    assert set(answer["arguments"]) == {"layers", "keep"}
    assert set(answer["arguments"]["layers"]) <= {4, 8, 16}
    assert answer["cost"]["average_visual_tokens"] <= 300
    printed = run("--average-tokens", "300", "--profile", str(path)).stdout
    assert f"The profile predicts a loss of {answer['predicted_loss']:.4g}." in printed


def test_milliseconds_are_measured_here() -> None:
    shape = ["--num-layers", "4", "--hidden", "128", "--intermediate", "352", "--visual-tokens", "200", "--stages", "2"]
    answer = found("--measure", "10000", *shape)
    assert answer["arguments"] == {"lam": 1.0, "stages": 2}  # all the time in the world
    assert 0 < answer["spent"] == answer["vanilla_spent"] < 10000
    refused = run("--measure", "0.00001", *shape)
    assert refused.exit_code == 2
    assert re.search(
        r"1e-05 ms is out of reach of 2 equal stages; the nearest within reach is [\d.]+ ms", refused.stderr
    )


def test_a_checkpoint_needs_no_weights(llava_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llava_folder / "config.json").read_bytes())
    answer = found("--model", str(tmp_path), "--average-tokens", "7.5")
    assert [stage["tokens"] for stage in answer["stages"]] == [8, 4, 2]
    assert answer["spent"] == 7.5


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a budget: one of --average-tokens, --tflops, --percent, --kv-bytes, --measure"),
        (["--average-tokens", "64", "--percent", "5"], "give one budget; got --average-tokens, --percent"),
        (["--percent", "0"], "percent must be positive"),
        (["--percent", "5", "--convention", "mac"], "convention must be one of full, paper, fastv"),
        (["--percent", "50", "--lam", "0.5", "--stages", "4"], "at most one of lam, stages, pyramid, profile"),
        (["--percent", "50", "--lam", "1.5"], "lam must be a number in (0, 1]"),
        (["--percent", "50", "--stages", "1"], "stages must be between 2 and the model's 32 layers"),
        (["--percent", "50", "--profile", "/no/such/file"], "cannot read /no/such/file"),
        (["--percent", "50", "--shape", "mine"], "shape 'mine' is not one of"),
        (["--average-tokens", "64", "--stages", "4"], "the nearest within reach is an average of 144.75 visual tokens"),
        (["--average-tokens", "10"], "the nearest within reach is an average of 18.9688 visual tokens"),
        (["--percent", "50", "--pyramid", "flat"], "pyramid='flat' is not one of equal, concave, single, hidrop"),
        (["--published", "--percent", "50"], "--published has budgets of its own"),
        (["--published", "--visual-tokens", "100"], "budgets of 576 and 2880 visual tokens, and this prompt has 100"),
        (["--percent", "50", "--before", "fastv"], "--before takes a method that drops before the decoder, vision or"),
        (["--published", "--before", "vision"], "--published has budgets of its own"),
        (["--percent", "4"], "% of vanilla's FLOPs (full), by PyramidDrop(lam="),
        (["--kv-bytes", "1e6", "--lam", "0.5"], "bytes of KV cache is out of reach of equal stages with lam=0.5"),
    ],
)
def test_bad_input_and_budgets_out_of_reach_are_one_line(words: list[str], message: str) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_file_that_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{")
    result = run("--percent", "50", "--profile", str(path))
    assert result.exit_code == 2
    assert f"{path} is no redundancy profile" in result.stderr


@pytest.mark.parametrize(("words", "line"), EXAMPLES)
def test_the_examples_of_the_page(words: str, line: str) -> None:
    assert found(*shlex.split(words))["python"] == line


@pytest.mark.parametrize("shape", ["llava-1.5-7b", "llava-next-7b"])
def test_the_budgets_of_papers(shape: str) -> None:
    plans = found("--published", "--shape", shape)["plans"]
    for one in plans:
        assert (one["spent"] <= one["tokens"]) == one["within_reach"]
        if one["within_reach"]:
            schedule = eval(one["python"], {"PyramidDrop": PyramidDrop}).schedule(32)
            counts = [one["visual_tokens"], *schedule.counts(one["visual_tokens"])]
            average = sum(counts[schedule.stage_of(layer)] for layer in range(32)) / 32
            assert average == one["spent"] > 0.98 * one["tokens"]
    table = DOCS.split("<!-- published -->\n")[1].split("<!-- /published -->")[0].splitlines()
    preset = PRESETS[shape]
    lines = published_markdown(published_plans(preset.shape, Prompt(preset.visual_tokens, 64)))
    assert [line for line in lines if line not in table] == []
    printed = run("--published", "--shape", shape).stdout
    assert printed.count("out of reach: at least") == sum(not one["within_reach"] for one in plans)


def test_drops_that_begin_earlier_than_asked_are_remarked_on() -> None:
    remark = "So the drops begin earlier"
    assert remark in run("--average-tokens", "64").stdout
    for words in (["--average-tokens", "192"], ["--average-tokens", "64", "--pyramid", "concave"]):
        assert remark not in run(*words).stdout


def test_the_page_has_examples_and_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) == 11
    (profile,) = re.findall(r"```json\n(.*?)```", DOCS, flags=re.DOTALL)
    assert Profile.from_dict(json.loads(profile)).layers == (8, 16)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.startswith("PyramidDrop(lam=0.42, stages=4) ")


def test_a_long_name_does_not_make_a_column_wide(tmp_path: Path) -> None:
    folder = tmp_path / "a-rather-long-name-of-a-folder"
    Qwen3_5Config(text_config={"num_hidden_layers": 16}).save_pretrained(folder)
    printed = run("--model", str(folder), "--visual-tokens", "100", "--percent", "90").stdout
    assert f"{folder}: 100 visual and 64 text tokens\n" in printed
    assert re.search(r"^ +vanilla +PyramidDrop *$", printed, flags=re.MULTILINE)
    assert "No vision tower and no projector are counted" in printed
    assert "No vision tower" not in run("--percent", "90").stdout
