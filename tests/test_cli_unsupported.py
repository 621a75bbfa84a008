"""Every verb that runs a model: one line for a method that does not fit it, at once or at the first prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from checkpoints import save_picture, save_processor
from pyramiddrop.cli.main import app
from tiny import tiny_model

SLIDING, FULL = "sliding_attention", "full_attention"
VERBS = {
    "generate": "generate --prompt w7 --image {picture} --max-new-tokens 2 --device cpu",
    "compare": "generate --prompt w7 --image {picture} --max-new-tokens 2 --device cpu --compare",
    "visualize": "visualize --prompt w7 --image {picture} --max-new-tokens 2 --device cpu --output {folder}/kept.png",
    "bench": "bench --prompt w7 --image {picture} --device cpu --new-tokens 1",
    "eval": "eval --data {data} --max-new-tokens 2 --limit 1 --device cpu",
    "train": "train --data {data} --output {folder}/trained --steps 1",
    "tradeoff": "study tradeoff --data {data} --limit 1 --percent 60 --device cpu --output {folder}/study",
    "redundancy": "study redundancy --data {data} --limit 1 --keep 0.5 --device cpu --output {folder}/study",
    "ablation": "study ablation --data {data} --limit 1 --device cpu --output {folder}/study",
}
#: The verbs that choose the methods themselves.
OWN_METHODS = ("redundancy", "ablation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with windows, a picture, and a question about it."""
    folder = tmp_path_factory.mktemp("misfits")
    _save(folder / "two-full", sliding_window=64, layer_types=[SLIDING] * 6 + [FULL] * 2)
    _save(folder / "shallow", num_hidden_layers=3, layer_types=[FULL] * 3)
    _save(folder / "no-full", sliding_window=8, layer_types=[SLIDING] * 8)
    save_picture(folder / "picture.png")
    conversation = [{"from": "human", "value": "<image>\nw7"}, {"from": "gpt", "value": "w8"}]
    record = {"image": "picture.png", "question": "w7", "answers": ["w8"], "conversations": conversation}
    (folder / "data.json").write_text(json.dumps([record] * 2))
    return folder


def _save(folder: Path, **windows: Any) -> None:
    model = tiny_model("llava-qwen2", use_sliding_window=True, **windows)
    model.save_pretrained(folder)
    save_processor(folder, model, "llava")


def error_of(folder: Path, verb: str, model: str, method: str = "pyramiddrop") -> str:
    """The one line that the verb ends with."""
    paths = {"picture": folder / "picture.png", "data": folder / "data.json", "folder": folder}
    words = [*VERBS[verb].format(**paths).split(), "--model", str(folder / model)]
    if verb not in OWN_METHODS:
        words += ["--method", method]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, (result.output, result.exception)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "redundancy"])  # it takes the layers that there are
def test_too_few_layers_to_drop_before(folder: Path, verb: str) -> None:
    line = error_of(folder, verb, "two-full")
    assert "4 stages need 3 layers to drop before; this model allows [6, 7]: give at most 3 stages" in line


@pytest.mark.parametrize("verb", ["generate", "visualize"])
def test_fewer_layers_than_stages(folder: Path, verb: str) -> None:
    line = error_of(folder, verb, "shallow")
    assert line == "error: 4 stages need a model of 4 layers, and this one has 3: give at most 3 stages"


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("verb", VERBS)
def test_a_window_that_does_not_reach_the_picture(folder: Path, verb: str) -> None:
    line = error_of(folder, verb, "no-full")
    assert "sees 8 tokens" in line


@pytest.mark.parametrize("verb", ["bench", "eval", "generate", "train"])
def test_a_drop_before_a_decoder_with_windows(folder: Path, verb: str) -> None:
    assert "cannot drop before its first layer" in error_of(folder, verb, "two-full", "vision")


@pytest.mark.parametrize("method", ["pyramiddrop", "vision", "vision | pyramiddrop"])
def test_a_checkpoint_that_generates_as_no_method_can(folder: Path, llava_folder: Path, method: str) -> None:
    checkpoint = shutil.copytree(llava_folder, folder / "chunked", dirs_exist_ok=True)
    generation = checkpoint / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "prefill_chunk_size": 8}))
    assert "prefill_chunk_size is not supported" in error_of(folder, "generate", "chunked", method)
