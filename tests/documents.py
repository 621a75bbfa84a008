"""README, CONTRIBUTING and docs/: their code and commands, which of them run, and why the others do not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import typer
from PIL import Image

from pyramiddrop.assets import demo_images, demo_questions, digits_checkpoint, reader_checkpoint
from pyramiddrop.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)

#: What a reader fills in, and checkpoints of a hub: the bundled model of the same family stands for them.
INSTEAD = {"llava-hf/llava-1.5-7b-hf": str(reader_checkpoint()), "ID_OR_DIR": str(reader_checkpoint())}
#: Measurements run on fewer questions, rounds and steps: it is the command that is tested, not its result.
SHORTER = {
    "eval": "--limit 2 --batch 2 --max-new-tokens 4",
    "study": "--limit 2 --batch 2 --max-new-tokens 4",
    "bench": "--repeats 1",
    "train": "--steps 1 --batch 2 --max-length 4096 --dtype float32",
    "demo": "--questions 1",
}
#: The commands that do not run here: what in them tells it, and the reason.
NOT_RUN = {
    r"^pip install": "downloads packages; the environment of these tests was made by such a command",
    r"^make ": "runs these tests, or makes an environment of its own",
    r"^git clone": "downloads",
    r"^\.ci/|^\.venv/|pre-commit": "makes an environment of its own",
    r"^lmms-eval|--tasks mme": "needs lmms-eval, which has its own environment (.ci/lmms), and downloads",
    r"^swift ": "needs ms-swift, which has an environment of its own (.ci/swift)",
    r"digits_checkpoint|\$DIGITS": "tests/serving/test_documented.py runs the whole example",
    r"^vllm serve|pyramiddrop serve": "needs vLLM, which has an environment of its own (.ci/vllm), and never ends",
    r"Qwen/": "downloads a checkpoint; a video needs torchvision as well",
    r"bench --shape (llava|mid|small|qwen)": "takes minutes to hours and up to 30 GB of memory",
    r"benchmarks/gpu\.py": "needs a GPU",
    r"examples/(digits|reader)/": "trains or evaluates for minutes to hours; each script has a fast test of its own",
    r"plan --measure": "solves for milliseconds of the machine, which on a busy one are out of reach",
    r"-m conformance": "runs for minutes; tests/test_conformance.py runs the same checks",
    r"python benchmarks/": "makes the pages from results that are committed, or measures for minutes to hours",
    r"runs/models/with|--results runs/mme": "reads what a command before it, which does not run here, has written",
}
#: The same for blocks of Python.
PYTHON_NOT_RUN = {
    r"BrightScorer|with method\(model\)": "tests/test_cli_methods.py runs it, and takes the new scorer out again",
    r"vllm import": "needs vLLM, which has an environment of its own (.ci/vllm)",
    r"client\.chat": "asks a server; tests/serving does",
    r"digits_questions\(\)": "tests/serving/test_documented.py runs the whole example",
    r"evaluation\.lmms": "needs lmms-eval, which has an environment of its own (.ci/lmms)",
    r"Member\(\"|^\"apertus1p5\"": "a piece of a file that it stands in",
    r"\(model, \.\.\.\)": "stands for the reader's own trainer",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, without their indentation."""
    return [
        Block(language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in FENCE.findall(page.read_text("utf-8"))
    ]


def commands(page: Path) -> list[str]:
    """The shell commands of a page, each on one line, without comments; those in a table's code too."""
    shell = "\n".join(block.text for block in blocks(page) if block.language == "bash").replace("\\\n", " ")
    lines = [re.sub(r"\s+#\s.*$", "", line) for line in shell.splitlines()]
    in_tables = re.findall(r"^\|.*\| `(pyramiddrop [^`]+)` \|", page.read_text("utf-8"), flags=re.MULTILINE)
    return [re.sub(r"\s+", " ", line).strip() for line in [*_joined(lines), *in_tables] if line.strip()]


def _joined(lines: list[str]) -> list[str]:
    """One entry a command: a line that leaves a quotation open goes on in the next."""
    joined: list[str] = []
    for line in lines:
        if joined and joined[-1].count("'") % 2:
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return joined


def parse(words: list[str]) -> None:
    """Raise for a verb or an option that is not there, and for a missing one."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("pyramiddrop", words)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)


def reason_not_to_run(text: str, table: dict[str, str] = NOT_RUN) -> str | None:
    """Why a command (or block) is not run here; None if it is."""
    return next((reason for pattern, reason in table.items() if re.search(pattern, text)), None)


def runnable(command: str) -> list[str]:
    """The words behind `pyramiddrop` as they run here: bundled instead of downloaded, short, not into a file."""
    for name, own in INSTEAD.items():
        command = command.replace(name, own)
    _, _, words = command.partition(" > ")[0].partition("pyramiddrop ")
    short = "" if "--suite" in words else SHORTER.get(words.partition(" ")[0], "")
    return shlex.split(f"{words} {short}")


def make_folder(folder: Path) -> Path:
    """Write what the pages' commands take for given: pictures, questions, a profile, bench's record, a checkpoint."""
    _write_pictures(folder)
    _write_questions(folder)
    _write_profile(folder / "profile.json")
    shutil.copy(ROOT / "benchmarks" / "results" / "llava-1.5-7b-cpu.json", folder / "bench.json")
    (folder / "path" / "or").mkdir(parents=True)
    (folder / "path" / "or" / "hub-id").symlink_to(digits_checkpoint())
    return folder


def _write_pictures(folder: Path) -> None:
    (folder / "pictures").mkdir()
    for path in demo_images():
        shutil.copy(path, folder / "pictures")
    for name in ("photo.jpg", "cat.png", "mine.png"):
        with Image.open(demo_images()[0]) as picture:
            picture.convert("RGB").save(folder / name)


def _write_questions(folder: Path) -> None:
    questions, conversations = [], []
    for name, entries in demo_questions().items():
        for entry in entries:
            questions.append({"image": name, "question": entry["question"], "answer": entry["answer"]})
            turns = [("human", f"<image>\n{entry['question']}"), ("gpt", entry["answer"])]
            conversations.append(
                {"image": name, "conversations": [{"from": who, "value": said} for who, said in turns]}
            )
    (folder / "mine.json").write_text(json.dumps(questions))
    (folder / "train.json").write_text(json.dumps(conversations))


def _write_profile(path: Path) -> None:
    grid = [(layer, keep) for layer in (2, 8, 16, 24) for keep in (0.5, 0.25, 0.125)]
    cells = [{"layer": layer, "keep": keep, "accuracy": 0.6 + layer / 200 + keep / 100} for layer, keep in grid]
    path.write_text(json.dumps({"num_layers": 32, "vanilla": 0.8, "cells": cells}))
