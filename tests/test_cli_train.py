"""The verb `train`: a whole training as it is typed, what it says, and its files for many devices."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pyramiddrop.assets import digits_checkpoint, digits_images
from pyramiddrop.cli.main import app

pytest.importorskip("trl")

from pyramiddrop.cli.train import train
from pyramiddrop.inference.checkpoint import load_processor
from pyramiddrop.training.collate import AnswerCollator

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "training"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words], env={"COLUMNS": "120"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight questions about bundled pictures, and two about one that is not there."""
    names = [str(path) for path in digits_images()]
    records = [
        {
            "image": names[number % len(names)] if number < 8 else f"gone-{number}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat digit is at row {number % 8 + 1} column 2?"},
                {"from": "gpt", "value": str(number)},
            ],
        }
        for number in range(10)
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return path


def settings(data: Path, output: Path) -> list[str]:
    words = f"--model {digits_checkpoint()} --data {data} --output {output} --batch 4 --device-batch 2"
    return [*words.split(), "--log-every", "1", "--learning-rate", "1e-3", "--skip-broken"]


def test_a_training(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(*settings(data, out), "--lam", "0.6", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout[result.stdout.index("\n{\n") :])["output"] == str(out)
    assert "skipped: train.json[8]: no such picture: " in result.stderr
    assert "2 of 10 samples are broken" in result.stderr
    assert (out / "broken.txt").read_text().count("train.json[") == 2
    assert json.loads((out / "pyramiddrop.json").read_text())["lam"] == 0.6


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--recipe", "some"], "recipe 'some' is not one of projector, all, lora"),
        (["--lam", "2"], "lam must be a number in (0, 1]; got 2.0"),
        (["--batch", "3"], "--batch 3 is no multiple of 2 samples"),
        (["--resume"], "nothing to resume"),
        (["--data", "gone.json"], "no such file: gone.json"),
        (["--max-length", "20"], "holds no sample to train on; train.json[0]: "),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], reason: str, data: Path, tmp_path: Path) -> None:
    result = run(*settings(data, tmp_path / "out"), *words)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert reason in result.stderr.splitlines()[-1]


# --- Many devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_accelerates(path: Path) -> None:
    """accelerate knows every word in them; it raises for one that it does not."""
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes in (2, 8)


def test_the_examples_name_options_that_there_are() -> None:
    commands = re.findall(r"pyramiddrop train \\\n(.*?)\n\n", (EXAMPLES / "README.md").read_text(), flags=re.DOTALL)
    used = {word for command in commands for word in re.findall(r"--([a-z-]+)", command)}
    assert len(commands) == 2
    assert {word.replace("-", "_") for word in used} <= set(train.__annotations__)


def test_the_template_of_llava() -> None:
    processor = load_processor(digits_checkpoint())
    processor.chat_template = (EXAMPLES / "llava-v1.jinja").read_text()
    collator = AnswerCollator(processor)
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"].insert(0, {"type": "image"})  # type: ignore[attr-defined]
    text, answers = collator.write(messages)
    assert text == "USER: <image>\nHello ASSISTANT: Hi</s>USER: Why? ASSISTANT: So.</s>"
    assert [text[start:stop] for start, stop in answers] == [" Hi</s>", " So.</s>"]
    assert collator.ends_answers


TWO = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "cpu.yaml")]


def test_two_processes_are_two() -> None:
    found = subprocess.run([*TWO, "--no_python", "printenv", "WORLD_SIZE"], capture_output=True, text=True, timeout=300)
    assert found.stdout.split() == ["2", "2"]


ZERO2 = [*TWO[:3], "--config_file", str(EXAMPLES / "zero2.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
LAUNCHERS = {
    "accelerate": TWO,
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
    "deepspeed": ZERO2,
}


def curve(launcher: list[str], data: Path, output: Path) -> list[tuple[float, float]]:
    """Loss and norm of the gradient at each step of two epochs."""
    words = [*launcher, "-m", "pyramiddrop", "train", *settings(data, output), "--epochs", "2"]
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # DeepSpeed compiles with ninja
    subprocess.run(words, check=True, capture_output=True, timeout=600, env=os.environ | {"PATH": tools})
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_curve_of_one(launcher: str, data: Path, tmp_path: Path) -> None:
    """Seven samples, of which two have no picture: an epoch's last batch is not full, and leaves the second process one
    sample short; two that share a step are of like length, so that one process has them."""
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="needs an environment of its own: .ci/deepspeed")
    records = json.loads(data.read_text())[:7]
    for record in records[:2]:
        del record["image"]
        record["conversations"][0]["value"] = "What digit is it?"
    data.write_text(json.dumps(records))
    one, two = (curve(LAUNCHERS.get(name, [sys.executable]), data, tmp_path / name) for name in ("one", launcher))
    assert len(one) == 4
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)
