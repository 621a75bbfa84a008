"""The verb `study`: what each study writes and prints, how it goes on, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from checkpoints import save_picture
from pyramiddrop.cli.main import app

SMALL = ["--limit", "8", "--batch", "4", "--layers", "2,6", "--keep", "0.25", "--maps", "1"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["study", *arguments], env={"COLUMNS": "160"})


def record_of(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def refused(*arguments: str) -> str:
    """The one line that an unusable command gets."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    return str(lines[0])


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A user's file: two pictures, three questions, no answers."""
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "b.png", 40, 60)
    records = [{"image": name, "question": question} for name, question in (("a.png", "w9 w8"), ("b.png", "w7"))]
    (tmp_path / "data.json").write_text(json.dumps([*records, {"image": "a.png", "question": "w5 w6 w7"}]))
    return tmp_path / "data.json"


# ---- redundancy ----------------------------------------------------------------------------------------------------


def test_redundancy_of_the_bundled_model(tmp_path: Path) -> None:
    result = run("redundancy", *SMALL, "--output", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    for word in ("bundled: accuracy (%)", "before layer", "keep 25 %", "8 samples, 64 visual tokens", "index.html"):
        assert word in result.stdout
    names = {path.name for path in tmp_path.iterdir()}
    for name in ("index.html", "redundancy.json", "redundancy.csv", "profile.json"):
        assert name in names
    for name in ("redundancy-accuracy", "redundancy-agreement", "redundancy-top1", "redundancy-kl", "attention"):
        assert {f"{name}.png", f"{name}.svg"} <= names
    record = json.loads((tmp_path / "redundancy.json").read_text())
    assert [(cell["layer"], cell["keep"]) for cell in record["models"][0]["cells"]] == [(2, 0.25), (6, 0.25)]
    assert record["models"][0]["shared_prefix"]
    planned = CliRunner().invoke(
        app, ["plan", "--profile", str(tmp_path / "profile.json"), "--visual-tokens", "64", *DIGITS, "--json"]
    )
    assert planned.exit_code == 0, planned.stderr
    stages = json.loads(planned.stdout)["stages"]
    assert stages
    assert {stage["layer"] for stage in stages} <= {2, 6}
    assert {stage["keep"] for stage in stages} == {0.25}


DIGITS = ["--num-layers", "8", "--hidden", "128", "--intermediate", "352", "--heads", "4", "--percent", "80"]


@pytest.mark.slow
def test_redundancy_of_several_models_on_own_data(llava_folder: Path, own_data: Path, tmp_path: Path) -> None:
    models = ["--model", str(llava_folder), "--model", str(llava_folder), "--name", "one", "--name", "other"]
    options = ["--data", str(own_data), "--keep", "0.5", "--layers", "3", "--max-new-tokens", "2"]
    record = record_of("redundancy", *models, *options, "--output", str(tmp_path / "out"))
    one, other = record["models"]
    assert (one["name"], other["name"], one["samples"]) == ("one", "other", 3)
    assert one["vanilla"]["accuracy"] is None
    assert one["cells"] == other["cells"]
    assert one["cells"][0]["kl"]["mean"] > 0
    assert one["cells"][0]["kl"]["count"] == 3
    assert (tmp_path / "out" / "profile-one.json").is_file()
    assert not (tmp_path / "out" / "redundancy-accuracy.png").exists()


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "half"], "--keep must be numbers with commas between them; got 'half'"),
        (["--keep", "0"], "keep"),
        (["--layers", "1.5"], "--layers must be whole numbers"),
        (["--layers", "9"], "layer"),
        (["--metric", "vqa"], "--metric belongs to --data"),
        (["--name", "a", "--name", "b"], "give one --name for each --model; got 2 for 1"),
        (["--model", "bundled", "--model", "bundled"], "models need different names (--name)"),
        (["--model", "/nowhere"], "no such folder: /nowhere"),
        (["--images", "pictures"], "--images belongs to --data"),
        (["--data", "nothing.json"], "no such file: nothing.json"),
        (["--data", "nothing.json", "--seed", "3"], "--seed means nothing with --data"),
        (["--split", "none"], "split"),
    ],
)
def test_redundancy_refuses_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused("redundancy", *options, "--output", str(tmp_path / "out"))


# ---- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tradeoff_of_the_bundled_model(tmp_path: Path) -> None:
    words = ["tradeoff", "--limit", "8", "--method", "pyramiddrop", "fastv:layer=3", "--percent", "60", "80"]
    result = run(*words, "--output", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    for word in ("PyramidDrop(lam=", "FastV(layer=3, keep=", "minus vanilla", "read_row", "8 questions", "index.html"):
        assert word in result.stdout
    for name in ("index.html", "tradeoff.json", "tradeoff.csv", "tradeoff.png", "tradeoff.svg", "tradeoff-by-kind.svg"):
        assert (tmp_path / name).is_file()
    assert len(list((tmp_path / "replies").iterdir())) == 5  # what a stopped study goes on with
    record = json.loads((tmp_path / "tradeoff.json").read_text())
    assert [variant["percent"] for variant in record["methods"]] == [None, 60, 60, 80, 80]


@pytest.mark.slow
def test_ablation_of_the_bundled_model(tmp_path: Path) -> None:
    record = record_of("ablation", "--limit", "8", "--lam", "0.6,0.4", "--output", str(tmp_path))
    assert [variant.get("lam") for variant in record["methods"]] == [None, 0.4, 0.6]
    for name in ("index.html", "ablation.json", "ablation.csv", "ablation.png", "ablation.svg"):
        assert (tmp_path / name).is_file()


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tradeoff", "--method", "bogus"], "method 'bogus' is not one of"),
        (["tradeoff", "--percent", "0"], "--percent must be above 0"),
        (["tradeoff", "--limit", "4", "--percent", "5"], "is out of reach of PyramidDrop"),
        (["ablation", "--lam", "half"], "--lam must be numbers with commas between them; got 'half'"),
        (["ablation", "--lam", "1.5"], "lam must be a number in (0, 1]; got 1.5"),
        (["ablation", "--model", "/nowhere"], "no such folder: /nowhere"),
        (["ablation", "--data", "nothing.json"], "no such file: nothing.json"),
    ],
)
def test_studies_of_methods_refuse_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(*words, "--output", str(tmp_path / "out"))


def test_questions_without_answers_are_refused_where_they_are_needed(own_data: Path, tmp_path: Path) -> None:
    assert 'no "answer" to compare with' in refused("ablation", "--data", str(own_data), "--output", str(tmp_path))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert f"cannot write into {tmp_path}/out" in refused("redundancy", "--output", str(tmp_path / "out"))


def test_without_a_study_the_help_names_them() -> None:
    result = run()
    assert result.exit_code == 0
    assert "redundancy" in result.stdout
