"""The verb `demo`: what it prints, and the files that it leaves, which need no network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from browser import act, needs_browser
from pyramiddrop.cli.main import app
from pyramiddrop.inference.demo import pick_questions
from pyramiddrop.report.demo_page import README_ONLINE, readme_link

ROOT = Path(__file__).parents[1]

#: What a person does: hold the third stage, and point at the first patch of the second row.
TOUCH = """
document.querySelectorAll(".stage")[2].click();
const panel = document.querySelector(".card svg"), box = panel.getBoundingClientRect();
const place = {clientX: box.left + box.width / 48, clientY: box.top + box.height * 3 / 48};
panel.dispatchEvent(new PointerEvent("pointermove", place));
return [
  document.body.dataset.stage,
  document.querySelectorAll("[aria-pressed=true]").length,
  document.querySelector(".fate").textContent,
  document.querySelectorAll(".mark[x='0'][y='1']").length,
];
"""


@pytest.fixture(autouse=True, scope="module")
def _a_shorter_demo() -> Iterator[None]:
    """Two questions, one of them that which dropping fails at, and few runs: these tests are not about seconds."""
    patch = pytest.MonkeyPatch()
    questions = [one for one in pick_questions(6) if one.why or one.kind == "highest"]
    patch.setattr("pyramiddrop.inference.demo.pick_questions", lambda count: questions[:count])
    for name, value in {"RUNS": 1, "BATCH": 2}.items():
        patch.setattr(f"pyramiddrop.inference.demo.{name}", value)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = CliRunner().invoke(app, ["demo", "--output", str(folder)])
    assert result.exit_code == 0, result.stderr
    return folder, result.stdout


def test_it_says_what_counts(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    tokens = "576 → 288 → 144 → 72"
    for word in ("true answer", "vanilla", "PyramidDrop", tokens, "FLOPs", "KV cache", "CPU time", "prompts at once"):
        assert word in printed
    assert f"{folder}/index.html" in printed
    assert "--model ID_OR_FOLDER" in printed


def test_it_shows_where_dropping_fails(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    assert "vanilla 2 of 2, PyramidDrop 1 of 2" in " ".join(printed.split())
    assert printed.count("Where dropping fails") == 1
    assert (folder / "index.html").read_text(encoding="utf-8").count("Where dropping fails") == 1


def test_the_overlays(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    overlays = sorted(folder.glob("overlay-*.png"))
    assert len(overlays) == 2
    assert all(Image.open(path).width > 600 and path.stat().st_size < 700_000 for path in overlays)


def test_the_page_needs_no_network(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'<a href="([^"]+)"', page)
    assert "https://arxiv.org/abs/2410.17247" in links
    assert links[0] == readme_link(demo[0])
    loaded = re.sub(r'<a href="[^"]+"', "<a", page)
    assert not re.search(r"https?://|//cdn|@import|<link|<iframe", loaded)
    assert set(re.findall(r'(?:src|href)="([^"]{5})', loaded)) == {"data:", "#pict"}


def test_the_page_links_the_readme_here_or_online(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    assert readme_link(tmp_path / "demo", tmp_path) == "../README.md"
    assert readme_link(tmp_path, tmp_path / "installed without its source") == README_ONLINE
    assert f'Homepage = "{README_ONLINE.removesuffix("#readme")}"' in (ROOT / "pyproject.toml").read_text()


def test_the_page_says_each_number_once(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "index.html").read_text(encoding="utf-8")
    assert page.index('class="tiles"') < page.index('class="card')
    assert page.count("<dt>Prefill time</dt>") == 1
    assert "FLOPs" not in page[page.index('class="card') : page.index("<section>")]


@needs_browser
def test_the_page_in_a_browser(demo: tuple[Path, str], tmp_path: Path) -> None:
    page = (demo[0] / "index.html").read_text(encoding="utf-8")
    stage, pressed, said, marked = act(page, TOUCH, tmp_path)
    assert (stage, pressed, marked) == ("2", 1, 4)  # the same patch is marked in each stage's panel
    assert said.startswith("Patch in row 2, column 1: ")


def test_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), "--questions", "1", "--json"])
    found = json.loads(result.stdout)
    assert Path(found["page"]).is_file()
    assert [Path(path).is_file() for path in found["overlays"]] == [True]
    (question,) = found["questions"]
    assert question["pruned_right"] == (question["pruned"]["answer"] == question["true_answer"])
    assert question["pruned"]["stages"][-1] == {"layer": 9, "keep": 0.125, "tokens": 72}
    assert question["vanilla"]["visual_tokens"] == 576
    assert (found["vanilla_right"], found["pruned_right"]) == (1, 1)
    # The vision tower, which is not made cheaper, does a quarter of vanilla's work: 0.65 of all is 0.53 of the decoder.
    assert question["flops_ratio"] < 0.5
    assert question["kv_ratio"] < 0.5
    for variant in ("vanilla", "pruned"):
        assert (
            min(question[variant][name] for name in ("prefill_seconds", "prefill_cpu_seconds", "flops", "kv_bytes")) > 0
        )
    assert found["batch"]["size"] == 2
    assert min(found["prefill_cpu_ratio"], found["batch"]["prefill_cpu_ratio"]) > 0


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (["--questions", "0"], ["--output", str(tmp_path / "file")]):
        result = CliRunner().invoke(app, ["demo", *arguments])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_the_first_questions_are_about_different_pictures() -> None:
    everything = pick_questions(1000)
    assert pick_questions(6) == everything
    assert len({question.kind for question in everything}) == 6
    assert len({question.image for question in pick_questions(3)}) == 3
    with pytest.raises(ValueError, match="questions must be at least 1"):
        pick_questions(0)
