"""The verb `generate`, as a user types it: answers, JSON, comparisons, overlays, and one line for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyramiddrop import Downsample, FastV, UniformDrop
from pyramiddrop.cli.main import app
from pyramiddrop.report.token_layout.views import CannotPlaceError

PROMPT = ["--prompt", "w7 w8 w9", "--max-new-tokens", "4"]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def assert_one_line(result: Any, *words: str) -> None:
    """The run ended with exit code 2 and one line on stderr that has these words."""
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_the_answer_alone_is_on_stdout(llava_folder: Path, picture: Path) -> None:
    result = run("--model", llava_folder, "--image", picture, *PROMPT)
    assert result.exit_code == 0
    assert len(result.stdout.split()) == 4
    assert result.stdout.count("\n") == 1
    assert "16 → 8 → 4 → 2" in result.stderr


def test_json_holds_the_answer_and_its_cost(llava_folder: Path, picture: Path) -> None:
    found = run_json("--model", llava_folder, "--image", picture, *PROMPT, "--layers", "3,5", "--keep", "0.5,0.25")
    assert found["method"]["name"] == "PyramidDrop"
    assert (found["device"], found["dtype"]) == ("cuda:0" if torch.cuda.is_available() else "cpu", found["dtype"])
    assert found["images"] == [str(picture)]
    assert found["visual_tokens"] == 16
    assert found["stages"] == [{"layer": 3, "keep": 0.5, "tokens": 8}, {"layer": 5, "keep": 0.25, "tokens": 4}]
    assert 0 < found["flops"] < found["vanilla_flops"]
    assert 0 < found["kv_bytes"] < found["vanilla_kv_bytes"]
    assert found["flops_ratio"] == pytest.approx(found["flops"] / found["vanilla_flops"])
    assert found["kv_ratio"] == pytest.approx(found["kv_bytes"] / found["vanilla_kv_bytes"])
    assert found["comparison"] is None
    assert len(found["answer"].split()) == 4


def test_vanilla_is_the_model_as_it_is(llava_folder: Path, picture: Path) -> None:
    found = run_json("--model", llava_folder, "--image", picture, *PROMPT, "--method", "vanilla")
    kept = run_json("--model", llava_folder, "--image", picture, *PROMPT, "--lam", "1")
    assert found["answer"] == kept["answer"]
    assert (found["method"], found["stages"]) == ({"name": "vanilla"}, [])
    assert found["flops"] == found["vanilla_flops"]
    assert found["kv_bytes"] == found["vanilla_kv_bytes"] == kept["kv_bytes"]


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (["--method", "fastv", "--layer", "3", "--keep", "0.25"], [4]),
        (["--method", "random", "--lam", "0.7"], [11, 7, 5]),
        (["--method", "uniform", "--stages", "3"], [8, 4]),
        (["--method", "pyramiddrop", "--positions", "compact"], [8, 4, 2]),
        (["--keep", "0.75,0.5"], [12, 8]),
        (["--layers", "2,4"], [8, 4]),
        (["--method", "PyramidDrop:lam=0.7,merge=true"], [11, 7, 5]),
        (["--method", "fastv:layer=3", "--keep", "0.25"], [4]),
    ],
)
def test_every_method_and_its_options(llava_folder: Path, picture: Path, options: list[str], tokens: list[int]) -> None:
    found = run_json("--model", llava_folder, "--image", picture, *PROMPT, *options)
    assert [stage["tokens"] for stage in found["stages"]] == tokens


def test_a_saved_method_is_used_where_no_option_says_otherwise(
    tmp_path: Path, llava_folder: Path, picture: Path
) -> None:
    folder = shutil.copytree(llava_folder, tmp_path / "saved")
    FastV(layer=4, keep=0.25).save_pretrained(folder)
    assert run_json("--model", folder, "--image", picture, *PROMPT)["method"]["name"] == "FastV"
    assert run_json("--model", folder, "--image", picture, *PROMPT, "--lam", "0.5")["method"]["name"] == "PyramidDrop"
    UniformDrop().save_pretrained(folder)
    assert run_json("--model", folder, "--image", picture, *PROMPT)["method"]["name"] == "UniformDrop"


def test_comparison_as_a_table_and_as_json(llava_folder: Path, picture: Path) -> None:
    arguments = ["--model", llava_folder, "--image", picture, *PROMPT, "--compare"]
    table = run(*arguments)
    assert table.exit_code == 0
    for word in ("answer", "vanilla", "PyramidDrop", "FLOPs", "KV cache", "prefill", "CPU", "16 → 8 → 4 → 2"):
        assert word in table.stdout
    found = run_json(*arguments)["comparison"]
    assert found["vanilla"]["visual_tokens"] == found["pruned"]["visual_tokens"] == 16
    assert found["vanilla"]["stages"] == []
    assert found["vanilla"]["prefill_seconds"] > 0
    assert found["pruned"]["prefill_cpu_seconds"] > 0
    assert found["prefill_ratio"] > 0
    assert found["prefill_runs"] == 5


def test_several_pictures_after_one_option(llava_folder: Path, picture: Path) -> None:
    spread = run_json("--model", llava_folder, "--image", picture, picture, *PROMPT)
    apart = run_json("--model", llava_folder, "--image", picture, *PROMPT, "--image", picture)
    assert spread["images"] == [str(picture)] * 2
    assert spread["visual_tokens"] == 32
    assert spread["answer"] == apart["answer"]


@pytest.mark.parametrize("family", ["llava_folder", "next_folder"])
def test_overlay(family: str, request: pytest.FixtureRequest, picture: Path, tmp_path: Path) -> None:
    path = tmp_path / "overlay.png"
    found = run_json("--model", request.getfixturevalue(family), "--image", picture, *PROMPT, "--overlay", path)
    assert found["overlay"] == str(path)
    assert Image.open(path).width > 600


def test_an_overlay_says_where_tokens_have_no_known_place(
    llava_folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody_knows(*_: Any) -> None:
        raise CannotPlaceError("cannot place the visual tokens of this model")

    monkeypatch.setattr("pyramiddrop.report.pictures.visual.place_pictures", nobody_knows)
    path = tmp_path / "overlay.png"
    result = run("--model", llava_folder, "--image", picture, *PROMPT, "--overlay", path)
    assert result.exit_code == 0
    assert "cannot place the visual tokens of this model: drawn in the order of the prompt" in result.stderr
    assert Image.open(path).width > 600


def test_a_saved_method_of_which_nothing_can_be_drawn_is_one_line(
    llava_folder: Path, picture: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llava_folder, tmp_path / "smaller")
    Downsample(keep=0.25).save_pretrained(folder)
    result = run("--model", folder, "--image", picture, *PROMPT, "--overlay", tmp_path / "overlay.png")
    assert_one_line(result, "downsample shows the model a smaller picture")


def test_code_that_a_checkpoint_brings_is_neither_run_nor_asked_about(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "configuration.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration.py").write_text("raise SystemExit('its code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    assert_one_line(run("--model", tmp_path, "--image", picture, *PROMPT), "contains custom code")


def test_a_processor_without_a_chat_template(llava_folder: Path, picture: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava_folder, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    assert run_json("--model", folder, "--image", picture, *PROMPT)["visual_tokens"] == 16


def test_dtype_is_taken(llava_folder: Path, picture: Path) -> None:
    arguments = ["--model", llava_folder, "--image", picture, *PROMPT, "--device", "cpu"]
    plain, half = run_json(*arguments), run_json(*arguments, "--dtype", "bfloat16")
    assert (plain["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert half["kv_bytes"] == plain["kv_bytes"] / 2


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--layers 8", "1..7"),
        ("--layers 4,2", "layers must"),
        ("--layers 2,2", "layers must"),
        ("--layers 0,2", "layers must be"),
        ("--layers two", "layers in 'pyramiddrop:layers=two' must be a whole number"),
        ("--keep 0.2,0.5", "keep"),
        ("--keep 0,0.5", "keep"),
        ("--keep 1.5", "keep"),
        ("--keep nan", "keep"),
        ("--keep half", "keep in 'pyramiddrop:keep=half' must be a number"),
        ("--layers 2,4 --keep 0.5", "layers and keep"),
        ("--lam 0", "lam must be"),
        ("--lam 2", "lam must be"),
        ("--lam half", "lam in 'pyramiddrop:lam=half' must be a number"),
        ("--stages 1", "stages"),
        ("--stages 9", "stages"),
        ("--positions odd", "positions"),
        ("--method odd", "method 'odd' is not one of pyramiddrop, fastv, random, uniform, vision, downsample, vanilla"),
        ("--method fastv --lam 0.5", "lam does not belong to the method 'fastv'"),
        ("--method fastv --keep 0.5,0.2", "keep in 'fastv:keep=0.5,0.2' must be a number; got '0.5/0.2'"),
        ("--method fastv --layer 8", "1..7"),
        ("--method fastv --layer 0", "layers must be"),
        ("--method vanilla --keep 0.5", "vanilla drops no tokens and has no options; got 'vanilla:keep=0.5'"),
        ("--method vanilla --compare", "nothing to compare"),
        ("--method vanilla --overlay x.png", "--overlay"),
        ("--layer 2", "layer does not belong to the method 'pyramiddrop', which takes keep, lam, layers"),
        ("--lam 0.5 --keep 0.5", "give lam or keep, not both"),
        ("--stages 3 --layers 2", "give stages or layers, not both"),
        ("--max-new-tokens 0", "--max-new-tokens"),
        ("--device toaster", "device 'toaster'"),
        ("--device cpu:x", "device 'cpu:x'"),
        ("--device cuda:77", "device 'cuda:77'"),
        ("--dtype int3", "dtype 'int3'"),
        ("--overlay kept.odd", "by its suffix"),
        ("--overlay nowhere/kept.png", "no folder"),
        ("--odd", "--odd"),
        ("--image missing.png", "no such picture: missing.png"),
        ("--model ./missing", "no such folder: ./missing"),
        ("--video clip.gif", "model family 'llava'"),
        ("--frames 0", "--frames"),
    ],
)
def test_bad_values_are_one_line(llava_folder: Path, picture: Path, options: str, words: str) -> None:
    result = run("--model", llava_folder, "--image", picture, "--prompt", "w7", *options.split())
    assert_one_line(result, words)


def test_prompts_that_cannot_be_asked(llava_folder: Path, picture: Path) -> None:
    model = ["--model", llava_folder]
    assert_one_line(run(*model, "--prompt", "w7"), "needs an image")
    assert_one_line(run(*model, "--image", picture), "--prompt")
    assert_one_line(run(*model, "--image", picture, "--prompt", "  "), "the prompt is empty")
    assert_one_line(run(*model, "--image", picture, "--prompt", "see <image>"), "must not hold <image>")


def test_pictures_that_cannot_be_read(llava_folder: Path, picture: Path, tmp_path: Path) -> None:
    text, cut, folder = tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "folder"
    text.write_text("no picture")
    cut.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    folder.mkdir()
    for path in (text, cut, folder):
        assert_one_line(run("--model", llava_folder, "--image", path, *PROMPT), "cannot read the picture", path.name)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "mllama"}', "cross-attention"),
        ('{"model_type": "llama"}', "model family 'llama'"),
        ('{"model_type": "nonsense"}', "nonsense"),
        ("{", "config"),
        (None, "it has no config.json"),
    ],
)
def test_checkpoints_that_are_none(tmp_path: Path, picture: Path, config: str | None, words: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert_one_line(run("--model", tmp_path, "--image", picture, *PROMPT), words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", "broken", "cannot load the weights"),
        ("tokenizer.json", None, "cannot load the processor"),
        ("pyramiddrop.json", '{"method": "Odd"}', "cannot use the pyramiddrop.json"),
        ("pyramiddrop.json", "{", "cannot use the pyramiddrop.json"),
    ],
)
def test_checkpoints_that_are_damaged(
    tmp_path: Path, llava_folder: Path, picture: Path, name: str, content: str | None, words: str
) -> None:
    folder = shutil.copytree(llava_folder, tmp_path / "damaged")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    assert_one_line(run("--model", folder, "--image", picture, *PROMPT), words)


@pytest.mark.parametrize("method", ["pyramiddrop", "vanilla"])
def test_a_text_model_that_is_not_supported(
    tmp_path: Path, llava_folder: Path, picture: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(llava_folder, tmp_path / "qwen2")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.delitem(sys.modules["pyramiddrop.hf.masks"]._KINDS, "full_attention")
    result = run("--model", folder, "--image", picture, *PROMPT, "--method", method)
    assert result.exit_code == 2
    assert "is not supported: layers of type 'full_attention' are not known" in result.stderr


def test_an_unexpected_error_keeps_its_traceback(
    llava_folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("pyramiddrop.inference.request.run", broken)
    result = run("--model", llava_folder, "--image", picture, *PROMPT)
    assert (result.exit_code, repr(result.exception)) == (1, "ValueError('a bug')")


def test_as_a_process_a_name_that_the_hub_does_not_give(picture: Path) -> None:
    command = [sys.executable, "-m", "pyramiddrop", "generate", "--model", "nobody/nothing", "--image", str(picture)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--prompt", "w7"], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: no such folder: nobody/nothing, and no checkpoint of that name can be read from"
    )
    assert done.stderr.count("\n") == 1


def test_version_and_help() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout.startswith("pyramiddrop 0.")
    for arguments in ([], ["--help"]):
        shown = runner.invoke(app, arguments)
        assert shown.exit_code == 0
        assert "generate" in shown.stdout
        assert "demo" in shown.stdout
    assert_one_line(runner.invoke(app, ["odd"]), "odd")


def test_the_bundled_model_says_what_it_cannot_know(picture: Path) -> None:
    result = run("--image", picture, "--prompt", "Describe this.", "--max-new-tokens", "2")
    assert result.exit_code == 0
    assert "warning: not in the bundled model's vocabulary: 'Describe'" in result.stderr
    assert "is resized to 336 x 336" in result.stderr


def test_a_named_model_is_not_remarked_on(llava_folder: Path, picture: Path) -> None:
    assert "warning" not in run("--model", llava_folder, "--image", picture, *PROMPT).stderr
