"""README and docs/ are true: their commands and their Python run, their counts and links are right."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import documents
from documents import (
    INSTEAD,
    NOT_RUN,
    PAGES,
    PYTHON_NOT_RUN,
    ROOT,
    blocks,
    commands,
    parse,
    reason_not_to_run,
    runnable,
)
from pyramiddrop.cli.main import app
from pyramiddrop.inference.catalog import PROVEN, all_families

LANGUAGES = {"bash", "console", "json", "python", "text"}
ALL_COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]
SITE = "https://pyramiddrop.github.io/pyramiddrop/"


def by_page(page: Path) -> str:
    return page.name


# --- Commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=by_page)
def test_every_block_says_its_language(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize(
    ("page", "command"), [one for one in ALL_COMMANDS if "pyramiddrop " in one[1] and "pip install" not in one[1]]
)
def test_the_options_of_a_command_are_there(page: str, command: str) -> None:
    words = shlex.split(command.partition(" > ")[0])
    if "pyramiddrop" in words:  # not `lmms-eval --model pyramiddrop`, nor a clone of the repository
        at = words.index("pyramiddrop")
        if all("=" in word for word in words[:at]):
            parse(words[at + 1 :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documents.make_folder(tmp_path_factory.mktemp("reader"))


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({one for _, one in ALL_COMMANDS if reason_not_to_run(one) is None}))
def test_a_command_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, because Transformers takes long to import; the file that the output goes to is left out."""
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, runnable(command))
    assert result.exit_code == 0, (result.output[-2000:], result.exception)


@pytest.mark.parametrize("table", [NOT_RUN, PYTHON_NOT_RUN], ids=["commands", "python"])
def test_every_reason_not_to_run_is_needed(table: dict[str, str]) -> None:
    texts = [block.text for page in PAGES for block in blocks(page) if block.language == "python"]
    texts += [command for _, command in ALL_COMMANDS]
    assert [pattern for pattern in table if not any(re.search(pattern, text) for text in texts)] == []


# --- Python ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))], ids=by_page
)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a reader would who has a model, its processor and the inputs of a prompt (docs/python.md makes them)."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(ROOT / "docs" / "python.md")[:1] if page.stem != "python" else []:
        exec(block.text, names)
        names["images"] = [names["image"]]
    ran = 0
    for block in blocks(page):
        if block.language == "python" and reason_not_to_run(block.text, PYTHON_NOT_RUN) is None:
            exec(_offline(block.text), names)
            ran += 1
    assert ran or any(reason_not_to_run(block.text, PYTHON_NOT_RUN) for block in blocks(page))


def _offline(code: str) -> str:
    for name, own in INSTEAD.items():
        code = code.replace(name, own)
    return code.replace(', device_map="auto"', "")  # which needs accelerate


# --- Counts and links -----------------------------------------------------------------------------------------------


def test_the_versions_in_the_text_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    oldest = re.search(r"transformers>=([\d.]+)", str(project["dependencies"]))
    newest = re.search(r"^TRANSFORMERS := (\d+\.\d+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert oldest is not None
    assert newest is not None
    told = {
        pair for page in PAGES for pair in re.findall(r"Transformers \|? ?([\d.]+) to ([\d.]+[\d])", page.read_text())
    }
    assert told == {(oldest[1], newest[1])}


def test_the_number_of_families_in_the_text_is_true() -> None:
    proven = sum(entry.status == PROVEN for entry in all_families())
    told = [int(count) for page in PAGES for count in re.findall(r"[Mm]ore than (\d+) families", page.read_text())]
    assert told
    assert all(proven - 10 < count < proven for count in told)


def test_nothing_else_that_grows_is_counted() -> None:
    """Methods, scorers and verbs are listed by commands and tables; a count of all in a sentence grows stale."""
    number = r"\b(?:\d+|five|six|seven|eight|nine|ten|eleven|twelve)"
    counts = {
        (page.name, found)
        for page in PAGES
        for found in re.findall(rf"{number} (?:methods|scorers|verbs|checks|modules)\b", page.read_text())
    }
    assert counts == set()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and GitHub make them."""
    text = documents.FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_of_the_readme_work_anywhere() -> None:
    """On the package index too: all are absolute, and those to the site have a page."""
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not link.startswith("https://")] == []
    for link in links:
        if link.startswith(SITE):
            name, _, anchor = link.removeprefix(SITE).partition("#")
            page = ROOT / "docs" / f"{name.strip('/') or 'index'}.md"
            assert page.is_file(), link
            assert not anchor or anchor in anchors(page), link
