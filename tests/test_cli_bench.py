"""The verb `bench`: its tables, its JSON, its plot, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyramiddrop.cli.main import app

TINY = ["--shape", "tiny", "--num-layers", "4", "--visual-tokens", "24", "--text-tokens", "8", "--repeats", "1"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "160"})


def record_of(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_the_bundled_model_is_measured_without_any_option() -> None:
    result = run("--repeats", "1", "--new-tokens", "2")
    assert result.exit_code == 0, result.stderr
    for word in ("bundled", "vision tower included", "576 visual", "vanilla", "PyramidDrop", "FastV", "CPU seconds"):
        assert word in result.stdout
    for row in ("first token", "decoder, ratio", "predicted: FLOPs", "dropping", "a step", "tokens/s", "peak", "KV"):
        assert row in result.stdout


def test_overhead_counts_operations() -> None:
    record = record_of(*TINY, "--overhead", "--method", "fastv")
    assert record["kind"] == "overhead"
    vanilla, fastv = record["results"]
    assert vanilla["added"] == {"prefill_ops": 0, "step_ops": 0}
    assert 0 < fastv["added"]["prefill_ops"] == fastv["prefill_ops"] - vanilla["prefill_ops"]
    assert fastv["ratios"]["step"] == pytest.approx(fastv["step"]["median"] / vanilla["step"]["median"], rel=1e-3)
    result = run(*TINY, "--overhead")
    for row in ("operations of a prefill", "added", "a prefill, ratio", "a step, ratio"):
        assert row in result.stdout


COMPOSED = "vision:score=uniform,keep=0.5 | pyramiddrop:layers=1/3,keep=0.5/0"


def test_a_composition_is_measured_as_one_method() -> None:
    """What its cache holds is what the cost model says of both drops together."""
    record = record_of(*TINY, "--method", COMPOSED, "pyramiddrop:layers=1/3,keep=0.25/0")
    vanilla, both, inside = record["results"]
    assert both["variant"].startswith("VisionDrop(score='uniform') | PyramidDrop(")
    for one in (vanilla, both, inside):
        assert one["kv_bytes"] == one["predicted"]["kv_bytes"]
    rows = [8 + tokens for tokens in (12, 6, 6, 0)]  # 24 visual tokens and 8 of text, in 4 layers
    assert both["ratios"]["kv_bytes"] == pytest.approx(sum(rows) / (4 * 32))
    assert both["predicted"]["flops"] < inside["predicted"]["flops"] < vanilla["predicted"]["flops"]


@pytest.mark.slow
def test_a_composition_in_every_mode(tmp_path: Path, picture: Path, llava_folder: Path) -> None:
    added = record_of(*TINY, "--overhead", "--method", COMPOSED)["results"][1]["added"]
    assert added["prefill_ops"] > 0 == added["step_ops"]
    _, *steps = record_of(*TINY, "--train", "--method", COMPOSED)["results"]
    assert min(one["ratios"]["flops"] for one in steps) < 0.5
    shared = COMPOSED.replace("0.5 |", "0.5,per_image=true |") + ",per_image=true"
    padded = record_of(*TINY, "--pictures", "2", "--batch", "2", "--padded", "--method", shared)["results"]
    assert padded[1]["kv_bytes"] == padded[1]["predicted"]["kv_bytes"]
    words = ["--model", str(llava_folder), "--image", str(picture), "--prompt", "w7 w8", "--repeats", "1"]
    for before in ("vision:keep=0.5", "downsample:keep=0.25"):
        path = tmp_path / "plot.png"
        found = record_of(*words, "--method", f"{before} | pyramiddrop:lam=0.5", "--plot", str(path))["results"]
        assert found[1]["kv_bytes"] == found[1]["predicted"]["kv_bytes"] < found[0]["kv_bytes"]
        assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overhead", "--train"], "--train and --overhead measure different things"),
        (["--overhead", "--new-tokens", "3"], "--new-tokens means nothing with --overhead"),
        (["--overhead", "--plot", "x.png"], "--plot draws seconds and memory"),
    ],
)
def test_what_overhead_does_not_go_with(arguments: list[str], message: str) -> None:
    result = run(*TINY, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_json_of_random_weights() -> None:
    record = record_of(*TINY, "--batch", "1,3", "--new-tokens", "3", "--method", "fastv:keep=0.25")
    assert record["kind"] == "generation"
    assert record["setting"] == {"new_tokens": 3, "repeats": 1, "clock": "CPU seconds"}
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == 1
    assert (record["subject"]["layers"], record["subject"]["visual_tokens"], record["subject"]["text_tokens"]) == (
        4,
        24,
        8,
    )
    assert "the decoder alone" in record["subject"]["about"]
    assert [(row["variant"], row["batch"]) for row in record["results"]] == [
        (variant, batch) for batch in (1, 3) for variant in ("vanilla", "FastV(keep=0.25)")
    ]
    for row in record["results"]:
        assert row["kv_bytes"] == row["predicted"]["kv_bytes"]
        assert min(row[name]["median"] for name in ("first_token", "decoder", "dropping", "step", "whole")) > 0
        assert row["whole"]["median"] >= row["first_token"]["median"] >= row["decoder"]["median"]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["step"]["median"], rel=1e-3)
    vanilla, pruned = record["results"][:2]
    assert pruned["ratios"]["kv_bytes"] == (2 * 32 + 2 * 14) / (4 * 32)  # 6 of 24 stay after 2 of 4 layers
    assert pruned["ratios"]["flops"] < 1 == vanilla["ratios"]["flops"]


def test_a_checkpoint_with_a_picture_of_ones_own(next_folder: Path, picture: Path) -> None:
    options = ["--model", str(next_folder), "--image", str(picture), str(picture), "--prompt", "w5 w6", "--batch", "2"]
    record = record_of(*options, "--repeats", "1", "--new-tokens", "2", "--method", "pyramiddrop", "--dtype", "auto")
    assert "vision tower included" in record["subject"]["about"]
    assert all(row["kv_bytes"] == row["predicted"]["kv_bytes"] for row in record["results"])


def test_training() -> None:
    record = record_of(*TINY, "--train", "--no-optimizer", "--method", "pyramiddrop:stages=2")
    assert (record["kind"], record["setting"]["optimizer"]) == ("training", None)
    assert len(record["results"]) == 6
    assert all(row["optimizer"] is None and row["gradients"]["median"] > 0 for row in record["results"])
    shown = run(*TINY, "--train", "--method", "fastv").stdout
    for words in ("batch 1, no checkpointing", "batch 1, checkpointing", "FastV, kept logits", "optimizer", "backward"):
        assert words in shown


@pytest.mark.parametrize("more", [[], ["--train"]])
def test_plot(tmp_path: Path, more: list[str]) -> None:
    path = tmp_path / "speed.png"
    result = run(*TINY, "--plot", str(path), *more)
    assert result.exit_code == 0, result.stderr
    assert f"plot: {path}" in result.stderr
    assert Image.open(path).width > 600


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    assert record_of(*TINY, "--new-tokens", "1", "--threads", "2")["setting"]["clock"] == "wall seconds"
    assert torch.get_num_threads() == before


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "shape 'huge' is not one of tiny, small, small-16k, mid"),
        (["--shape", "tiny", "--num-layers", "9"], "--num-layers must be in 1..8 for the shape tiny; got 9"),
        (["--shape", "tiny", "--num-layers", "2"], "stages"),
        (["--shape", "tiny", "--model", "x"], "--model belongs to a checkpoint"),
        (["--shape", "tiny", "--prompt", "x"], "--prompt belongs to a checkpoint"),
        (["--shape", "tiny", "--dtype", "int8"], "dtype 'int8'"),
        (["--visual-tokens", "5"], "--visual-tokens belongs to random weights"),
        (["--pictures", "2"], "--pictures belongs to random weights"),
        (["--padded"], "--padded belongs to random weights"),
        ([*TINY, "--pictures", "5"], "--pictures must be at most 4 with 24 visual and 8 text tokens"),
        (["--num-layers", "5"], "--num-layers belongs to random weights"),
        (["--batch", "1,x"], "--batch must be different whole numbers"),
        (["--batch", "2,2"], "--batch must be different whole numbers"),
        (["--batch", "0"], "--batch must be different whole numbers"),
        (["--method", "nothing"], "method 'nothing' is not one of"),
        (["--method", "fastv:speed=3"], "speed does not belong to the method 'fastv', which takes keep, layer,"),
        (["--method", "fastv", "--method", "fastv"], "FastV would be measured twice"),
        (["--method", "vanilla"], "vanilla is always measured"),
        (["--train", "--new-tokens", "3"], "--new-tokens means nothing with --train"),
        (["--no-optimizer"], "--no-optimizer belongs to --train"),
        (["--lora-rank", "4"], "--lora-rank belongs to --train"),
        (["--plot", "speed.xyz"], "a plot must be one of"),
        (["--plot", "nowhere/speed.png"], "no folder nowhere"),
        (["--device", "mps"], "mps"),
        (["--model", "./nowhere"], "no such folder"),
        (["--image", "nothing.png"], "no such picture: nothing.png"),
        (["--repeats", "0"], "--repeats"),
        (["--text-tokens", "3"], "--text-tokens"),
        (["--shape", "tiny", "--method", "vision | pyramiddrop"], "what the vision tower sees, and --shape runs the"),
        (["--shape", "tiny", "--method", "downsample"], "take vision:score=diversity, random or uniform, or a"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert message in result.stderr
