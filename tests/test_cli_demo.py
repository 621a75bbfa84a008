"""The verb `demo`: what it prints, and the files that it leaves, which need no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from browser import act, needs_browser
from pyramiddrop.cli.main import app
from pyramiddrop.inference.demo import bundled_questions, pick_questions
from pyramiddrop.inference.midsize import midsize_prefill

#: What a person does: hold the third stage, and point at the first patch of the second row.
TOUCH = """
document.querySelectorAll(".stage")[2].click();
const panel = document.querySelector(".card svg"), box = panel.getBoundingClientRect();
const place = {clientX: box.left + box.width / 16, clientY: box.top + box.height * 3 / 16};
panel.dispatchEvent(new PointerEvent("pointermove", place));
return [
  document.body.dataset.stage,
  document.querySelectorAll("[aria-pressed=true]").length,
  document.querySelector(".fate").textContent,
  document.querySelectorAll(".mark[x='0'][y='1']").length,
];
"""


@pytest.fixture(autouse=True, scope="module")
def _a_smaller_midsize() -> Any:
    """The timing of the bigger model is the demo's longest part; its size is not what these tests are about."""
    patch = pytest.MonkeyPatch()
    for name, value in {"HIDDEN": 64, "LAYERS": 4}.items():
        patch.setattr(f"pyramiddrop.inference.midsize.{name}", value)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = CliRunner().invoke(app, ["demo", "--out", str(folder), "--questions", "3"])
    assert result.exit_code == 0, result.stderr
    return folder, result.stdout


def test_it_says_what_counts(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for word in ("true answer", "vanilla", "PyramidDrop", "64 → 32 → 16 → 8", "FLOPs", "KV cache", "CPU time", "tiny"):
        assert word in printed
    assert f"{folder}/index.html" in printed


def test_the_overlays(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    overlays = sorted(folder.glob("overlay-*.png"))
    assert len(overlays) == 3
    assert all(Image.open(path).width > 600 and path.stat().st_size < 300_000 for path in overlays)


def test_the_page_needs_no_network(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|<link|<iframe", page)
    assert set(re.findall(r'(?:src|href)="([^"]{5})', page)) == {"data:", "#pict"}


@needs_browser
def test_the_page_in_a_browser(demo: tuple[Path, str], tmp_path: Path) -> None:
    page = (demo[0] / "index.html").read_text(encoding="utf-8")
    stage, pressed, said, marked = act(page, TOUCH, tmp_path)
    assert (stage, pressed, marked) == ("2", 1, 4)  # the same patch is marked in each stage's panel
    assert said.startswith("Patch in row 2, column 1: ")


def test_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--questions", "1", "--json"])
    found = json.loads(result.stdout)
    assert Path(found["page"]).is_file()
    assert [Path(path).is_file() for path in found["overlays"]] == [True]
    (question,) = found["questions"]
    assert question["pruned_right"] == (question["pruned"]["answer"] == question["true_answer"])
    assert question["pruned"]["stages"][-1] == {"layer": 6, "keep": 0.125, "tokens": 8}
    assert question["vanilla"]["visual_tokens"] == 64
    assert 0.3 < question["flops_ratio"] < 0.7
    assert 0.3 < question["kv_ratio"] < 0.7
    for way in ("vanilla", "pruned"):
        assert min(question[way][name] for name in ("prefill_seconds", "prefill_cpu_seconds", "flops", "kv_bytes")) > 0
    assert found["midsize"]["visual_tokens"] == [576, 288, 144, 72]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (["--questions", "0"], ["--out", str(tmp_path / "file")]):
        result = CliRunner().invoke(app, ["demo", *arguments])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_questions_are_picked_by_kind_not_by_success() -> None:
    everything = bundled_questions()
    picked = pick_questions(6)
    assert len({question.kind for question in picked}) == 6
    assert len({question.image for question in picked}) == 3
    assert pick_questions(1000) != everything
    assert sorted(map(repr, pick_questions(1000))) == sorted(map(repr, everything))
    with pytest.raises(ValueError, match="questions must be at least 1"):
        pick_questions(0)


def test_the_midsize_model_leaves_the_random_state_alone() -> None:
    import torch

    from pyramiddrop import PyramidDrop

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ratio = midsize_prefill(PyramidDrop(), runs=1)
    assert torch.equal(torch.rand(3), expected)
    assert 0 < ratio.predicted < 1
    assert ratio.measured > 0
