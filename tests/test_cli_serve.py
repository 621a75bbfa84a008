"""`pyramiddrop serve`: what vLLM is told, and what is said of it; the server itself is tested in tests/serving."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import is_serve_available

from pyramiddrop import FastV, PyramidDrop
from pyramiddrop.cli.main import app
from pyramiddrop.inference import serving
from pyramiddrop.inference.checkpoint import load_processor
from pyramiddrop.vllm import hf_overrides, registration


def run(
    capsys: pytest.CaptureFixture[str], *arguments: str, backend: tuple[str, ...] = ("--backend", "vllm")
) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        app(["serve", *arguments, *backend])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    code, out, err = run(capsys, *arguments, "--show-command")
    assert code == 0, err
    return shlex.split(out)


def overrides(words: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(words[words.index("--hf-overrides") + 1])
    return settings


def test_the_command_names_the_dropping_architecture_and_the_method(
    llava_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(capsys, str(llava_folder), "--lam", "0.6", "--stages", "2")
    assert words[:3] == ["vllm", "serve", str(llava_folder)]
    told = overrides(words)
    assert told["architectures"] == ["PyramidDropLlavaForConditionalGeneration"]
    assert told["pyramiddrop"] == json.loads(json.dumps(PyramidDrop(lam=0.6, stages=2).settings()))


def test_other_options_are_vllm_s(llava_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(
        capsys,
        str(llava_folder),
        "--port",
        "8123",
        "--lam=0.5",
        "--enforce-eager",
        "--hf-overrides",
        '{"rope_theta": 5}',
    )
    assert words[-3:] == ["--port", "8123", "--enforce-eager"]
    assert overrides(words)["rope_theta"] == 5
    assert words.count("--hf-overrides") == 1


def test_the_chat_template_begins_as_transformers_begins_a_sequence(
    llava_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM adds no `<s>` to what a template makes, which Transformers does."""
    words = command(capsys, str(llava_folder))
    processor = load_processor(llava_folder)
    template = words[words.index("--chat-template") + 1]
    assert template == "{{ bos_token }}" + processor.chat_template
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w5"}]}]
    mended = processor.apply_chat_template(said, chat_template=template)
    tokenizer = processor.tokenizer
    plain = tokenizer(processor.apply_chat_template(said)).input_ids
    assert tokenizer(mended, add_special_tokens=False).input_ids == plain
    assert command(capsys, str(llava_folder), "--chat-template", "mine.jinja").count("--chat-template") == 1

    shutil.copytree(llava_folder, tmp_path / "mended")
    processor.chat_template = template
    processor.save_pretrained(tmp_path / "mended")
    assert "--chat-template" not in command(capsys, str(tmp_path / "mended"))


def test_the_method_beside_the_checkpoint_is_served(
    llava_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((llava_folder / "config.json").read_text())
    FastV(layer=3, keep=0.25).save_pretrained(tmp_path)
    assert overrides(command(capsys, str(tmp_path)))["pyramiddrop"]["layer"] == 3


def test_it_says_what_it_saves(llava_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, str(llava_folder), "--keep", "0.5,0.25", "--layers", "2,4", "--show-command")
    # 8 layers: 2 of 16 + 64 rows, 2 of 8 + 64, 4 of 4 + 64.
    assert "16 visual tokens (16 → 8 → 4) and 64 others" in err
    assert f"{(2 * 80 + 2 * 72 + 4 * 68) / (8 * 80):.0%}".replace("%", " %") + " of its KV cache" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "vanilla"], "start the server itself"),
        (["--lam", "2"], "lam must be a number"),
        (["--layers", "9", "--keep", "0.5"], "layers must be in 1..7"),
        (["--hf-overrides", "{"], "takes a JSON object"),
        (["--hf-overrides"], "takes a JSON object"),
        (["--hf-overrides", '{"architectures": ["Other"]}'], "which are set here"),
    ],
)
def test_what_cannot_be_served_is_refused(
    llava_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, str(llava_folder), *arguments, "--show-command")
    assert (code, out) == (2, "")
    assert message in err


def test_transformers_server_is_the_default_without_vllm(
    llava_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    code, out, err = run(capsys, str(llava_folder), "--port", "8123", "--show-command", backend=())
    assert code == 0, err
    assert shlex.split(out) == ["transformers", "serve", str(llava_folder), "--port", "8123"]
    assert "16 visual tokens (16 → 8 → 4 → 2)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "sglang"), "--backend must be one of vllm, transformers; got 'sglang'"),
        (("--backend", "transformers", "--continuous-batching"), "--continuous-batching cannot be served"),
    ],
)
def test_other_servers_are_refused(
    llava_folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, str(llava_folder), backend=arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


@pytest.mark.skipif(is_serve_available(), reason="Transformers' server is installed")
def test_without_transformers_server_nothing_starts(llava_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, str(llava_folder), backend=("--backend", "transformers"))
    assert code == 2
    assert "pip install 'transformers[serving]'" in err


def internvl_chat(folder: Path, text: dict[str, Any]) -> str:
    """A configuration in the format of InternVL's authors. The code that it names is not there: it must not be run."""
    code = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config | {"llm_config": text}))
    return str(folder)


def test_a_configuration_that_comes_with_code_is_read_without_running_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = internvl_chat(tmp_path, {"model_type": "qwen2", "num_hidden_layers": 12})
    words = command(capsys, folder, "--layers", "11", "--keep", "0.5", "--trust-remote-code")
    assert overrides(words)["architectures"] == ["PyramidDropInternVLChatModel"]
    assert words[-1] == "--trust-remote-code"
    code, _, err = run(capsys, folder, "--layers", "12", "--keep", "0.5", "--show-command")
    assert (code, "layers must be in 1..11" in err) == (2, True)


def test_a_language_model_that_nobody_knows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, internvl_chat(tmp_path, {"model_type": "internlm2"}), "--show-command")
    assert (code, out) == (2, "")
    assert "internlm2" in err


def test_without_vllm_nothing_starts(
    llava_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    code, _, err = run(capsys, str(llava_folder))
    assert code == 2
    assert "pip install 'pyramiddrop[vllm]'" in err


@pytest.fixture
def unknown_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A vLLM that has a version and nothing else. tests/serving does the same to a real one."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.99.1"')
    monkeypatch.syspath_prepend(package.parent)
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "vllm"}
    yield
    sys.modules.pop("vllm", None)
    sys.modules.update(held)


@pytest.mark.usefixtures("unknown_vllm")
def test_an_unknown_vllm_is_refused(llava_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, str(llava_folder))
    assert (code, out) == (2, "")
    assert err.startswith("error: pyramiddrop's plugin fits vLLM 0.32 and 0.33; 0.99.1 is installed. To drop")
    assert err.count("\n") == 1
    with pytest.raises(RuntimeError, match=r"0\.99\.1 is installed"):
        hf_overrides(str(llava_folder), PyramidDrop())


@pytest.mark.usefixtures("unknown_vllm")
def test_the_plugin_steps_aside_of_an_unknown_vllm(caplog: pytest.LogCaptureFixture) -> None:
    registration._warn_once.cache_clear()
    [plugin] = entry_points(group="vllm.general_plugins", name="pyramiddrop")
    for _ in range(2):
        plugin.load()()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Nothing is dropped" in caplog.text


@pytest.mark.usefixtures("unknown_vllm")
def test_the_plugin_steps_aside_of_a_vllm_whose_parts_have_moved(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "KNOWN", ("0.99",))
    registration.register()
    assert "0.99.1 is installed, but not as expected: ImportError" in caplog.text
