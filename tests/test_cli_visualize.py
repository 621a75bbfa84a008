"""The verb `visualize`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyramiddrop.cli.main import app


def test_without_a_word_it_draws_a_bundled_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["visualize", "--output", "kept.png", "kept.gif", "--scores", "scores.svg", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["files"] == ["kept.png", "kept.gif", "scores.svg"]
    assert all(Path(name).stat().st_size > 1000 for name in found["files"])
    assert [stage["tokens"] for stage in found["kept"]] == [576, 288, 144, 72]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method vanilla", "vanilla keeps every token"),
        ("--image x.png", "--prompt"),
        ("--output kept.odd", "by its suffix"),
        ("--output kept.png --scores s.gif", "no picture of the scores alone"),
    ],
)
def test_one_line_for_what_cannot_be_drawn(words: str, said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["visualize", *words.split()])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("words", [["visualize"], ["generate", "--prompt", "Read row 6.", "--overlay", "kept.png"]])
def test_a_smaller_picture_is_not_drawn_over_the_larger_one(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--method", "downsample"])
    assert result.exit_code == 2
    assert "downsample shows the model a smaller picture" in result.stderr
