"""The verb `eval`, as a user types it: digits and own questions, equal cost, resuming, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pyramiddrop import (
    Downsample,
    FastV,
    Method,
    PyramidDrop,
    RandomDrop,
    UniformDrop,
    UnsupportedModelError,
    VisionDrop,
)
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.cli.main import app
from pyramiddrop.evaluation import run as run_module
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.reader import KINDS
from pyramiddrop.evaluation.samples import read_samples
from pyramiddrop.evaluation.scores import difference, score
from pyramiddrop.evaluation.tasks import digits_task
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.report.tables.evaluation import eval_markdown, eval_notes
from test_cli_generate import assert_one_line

WORDS = ["w7", "w8 w9 w10", "w3 w4", "w7 w8", "w9", "w5 w6 w7"]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["eval", "--device", "cpu", *map(str, arguments)])


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


@pytest.fixture
def data(tmp_path: Path, llava_folder: Path) -> Path:
    """Six questions about three pictures; what the tiny model says to every second one is right."""
    generator = np.random.default_rng(0)
    for number in range(3):
        noise = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    records = [
        {"image": f"{number // 2}.png", "question": question, "answers": ["x", "y"], "kind": "ab"[number % 2]}
        for number, question in enumerate(WORDS)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    said = Answerer(load_checkpoint(llava_folder, "cpu"), max_new_tokens=3).answers(read_samples(path))
    for number in range(0, 6, 2):
        records[number]["answers"] = ["x", f" {said[number].text.upper()}. "]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def tiny(data: Path, llava_folder: Path) -> list[str | Path]:
    return ["--model", llava_folder, "--data", data, "--batch", "2", "--max-new-tokens", "3"]


def test_digits_are_scored_as_by_hand() -> None:
    record = run_json("--limit", "20", "--seed", "3", "--split", "val", "--method", "fastv:layer=1,keep=0.2")
    samples = digits_task("val", 3, limit=20).samples
    answerer = Answerer(load_checkpoint(digits_checkpoint(), "cpu"))
    right = [
        [float(reply.text == sample.answers[0]) for reply, sample in zip(replies, samples, strict=True)]
        for replies in (answerer.answers(samples), answerer.answers(samples, FastV(layer=1, keep=0.2)))
    ]
    clusters = [sample.cluster for sample in samples]
    vanilla, fastv = record["methods"]
    for variant, values in zip((vanilla, fastv), right, strict=True):
        assert variant["scores"]["all"] == vars(score(values, clusters))
    assert fastv["differences"] == {"to_vanilla": vars(difference(right[1], right[0], clusters))}
    assert vanilla["differences"] == {}
    assert 0 < vanilla["scores"]["all"]["mean"] != fastv["scores"]["all"]["mean"]
    assert sum(vanilla["scores"][kind]["count"] for kind in record["kinds"]) == 20
    assert (record["task"]["split"], record["task"]["seed"], record["pictures"]) == ("val", 3, 20)


def test_questions_about_text_are_scored_apart(tiny: list[str | Path], data: Path) -> None:
    """By the names of their kinds, or as each says itself."""
    words = [*tiny, "--rounds", "0", "--method", "fastv:layer=1,keep=0.2"]
    records = json.loads(data.read_text())
    for number, (one, told) in enumerate(zip(records, (None, None, True, False, False, True), strict=True)):
        one["kind"], one["reads_text"] = ("scene_text", "other")[number % 2], told
    data.write_text(json.dumps(records))
    reads = [0, 2, 5]
    record = run_json(*words)
    vanilla = record["methods"][0]
    said = Answerer(load_checkpoint(str(tiny[1]), "cpu"), max_new_tokens=3).answers(read_samples(data))
    right = [
        reply.text.strip().strip(".").lower() in [one.strip().strip(". ").lower() for one in record["answers"]]
        for reply, record in zip(said, records, strict=True)
    ]
    assert vanilla["reading"]["text"]["count"] == 3 == vanilla["reading"]["other"]["count"]
    assert vanilla["reading"]["text"]["mean"] == pytest.approx(sum(right[number] for number in reads) / 3)
    assert vanilla["reading"]["other"]["mean"] == pytest.approx((sum(right) - sum(right[n] for n in reads)) / 3)
    assert "read in the picture (3)" in eval_markdown(record)
    assert "not read in it (3)" in eval_markdown(record)
    records[0]["reads_text"] = "yes"
    data.write_text(json.dumps(records))
    assert_one_line(run(*words), "\"reads_text\" must be true or false; got 'yes'")


def test_a_report_names_the_controls_that_it_does_not_have() -> None:
    def notes(*methods: Method, **record: Any) -> str:
        variants = [{"method": None}, *({"method": method.settings()} for method in methods)]
        blank = {"group_a": None, "prefill": None}
        return " ".join(
            eval_notes({"methods": [blank | one for one in variants], "machine": {"device": "cpu"}, **record})
        )

    before = VisionDrop(score={"name": "random", "seed": 1})
    assert "Not compared with random inside the decoder, random before it, uniform, a smaller picture:" in notes(
        FastV()
    )
    assert "Not compared with random before it, a smaller picture:" in notes(RandomDrop(), UniformDrop(), VisionDrop())
    assert "Not compared with a smaller picture:" in notes(RandomDrop(), UniformDrop(), before)
    for rest in ({"methods": Downsample()}, {"left_out": {"Downsample": "no such pictures"}}):
        method = [rest.pop("methods")] if "methods" in rest else []
        assert "Not compared" not in notes(RandomDrop(), UniformDrop(), before, *method, **rest)


def test_below_ten_pictures_no_interval_is_drawn() -> None:
    for limit, drawn in ((9, False), (10, True)):
        words = ["--limit", str(limit), "--rounds", "0", "--method", "fastv:layer=1,keep=0.2"]
        (_, fastv) = run_json(*words)["methods"]
        assert (fastv["differences"]["to_vanilla"]["low"] is not None) == drawn


@pytest.mark.slow
def test_controls_answer_beside_the_methods_at_their_budget() -> None:
    """Agreement, the questions that downsampling gets wrong, and draws by chance, all counted by hand."""
    words = ["--limit", "5", "--rounds", "0", "--percent", "60", "--controls"]
    record = run_json(*words, "--method", "pyramiddrop:positions=compact")
    variants = record["methods"]
    kinds = [variant["method"]["method"] for variant in variants[1:]]
    assert kinds == ["PyramidDrop", *["RandomDrop"] * 3, "UniformDrop", *["VisionDrop"] * 3, "Downsample"]
    assert all(variant["method"]["positions"] == "compact" for variant in variants[1:])
    assert all(100 * variant["flops_ratio"] <= 60 for variant in variants[1:])
    samples = digits_task("test", 0, limit=5).samples
    answerer = Answerer(load_checkpoint(digits_checkpoint(), "cpu"))
    methods = [None, *(Method.from_settings(variant["method"], "record") for variant in variants[1:])]
    said = [[reply.text for reply in answerer.answers(samples, method)] for method in methods]
    right = [[text == sample.answers[0] for text, sample in zip(one, samples, strict=True)] for one in said]
    wrong = [number for number, one in enumerate(right[-1]) if not one]
    for variant, texts, points in zip(variants, said, right, strict=True):
        same = [own == plain for own, plain in zip(texts, said[0], strict=True)]
        assert variant["agreement"]["mean"] == pytest.approx(sum(same) / 5)
        assert variant["group_a"]["count"] == len(wrong) > 0
        assert variant["reading"] is None or variant["reading"]["text"] == variant["scores"]["read_row"]
        assert variant["group_a"]["mean"] == pytest.approx(sum(points[number] for number in wrong) / len(wrong))
    assert variants[-1]["group_a"]["mean"] == 0
    means = [sum(points) / 5 for points in right]
    inside, before = record["draws"]
    assert (inside["name"], before["name"]) == ("RandomDrop", "VisionDrop")
    for draws, own in ((inside, means[2:5]), (before, means[6:9])):
        assert (draws["count"], draws["percent"]) == (3, 60)
        assert (draws["low"], draws["high"]) == pytest.approx((min(own), max(own)))
        assert draws["mean"] == pytest.approx(sum(own) / 3)


def test_controls_that_a_model_cannot_have_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    own = run_module.drop_layers

    def refused(model: Any, method: Method) -> Any:
        if isinstance(method, Downsample):
            raise UnsupportedModelError("no smaller picture here")
        return own(model, method)

    monkeypatch.setattr(run_module, "drop_layers", refused)
    words = ["--limit", "2", "--rounds", "0", "--percent", "60", "--controls", "--method", "fastv:layer=2"]
    record = run_json(*words)
    assert record["left_out"] == {"Downsample": "no smaller picture here"}
    assert len(record["methods"]) == 1 + 1 + 7
    assert all(variant["group_a"] is None for variant in record["methods"])
    assert "Downsample is left out: no smaller picture here" in run(*words).stdout


@pytest.mark.slow
def test_the_reader_answers_its_own_benchmark() -> None:
    words = ["--tasks", "reader", "--limit", "3", "--max-new-tokens", "6", "--rounds", "0"]
    record = run_json(*words, "--method", "pyramiddrop")
    assert (record["task"]["name"], record["kinds"]) == ("reader", ["scenes", "documents", "charts"])
    vanilla, pyramid = record["methods"]
    assert vanilla["scores"]["all"]["mean"] == 1
    assert pyramid["visual_tokens"]["by_stage"] == [576, 288, 144, 72]
    assert {kind for kinds in KINDS.values() for kind in kinds} >= set(record["subkinds"]) == set(pyramid["subscores"])
    assert sum(score["count"] for score in pyramid["subscores"].values()) == 3


def test_own_questions_are_scored_by_kind(tiny: list[str | Path]) -> None:
    record = run_json(*tiny, "--method", "pyramiddrop:layers=3,keep=0.5", "fastv")
    vanilla, pyramid, fastv = record["methods"]
    assert record["kinds"] == ["a", "b"]
    assert [vanilla["scores"][kind]["mean"] for kind in ("a", "b", "all")] == [1, 0, 0.5]
    assert (vanilla["flops_ratio"], vanilla["kv_ratio"], vanilla["method"]) == (1, 1, None)
    assert (pyramid["name"], fastv["name"]) == ("PyramidDrop(layers=(3,), keep=(0.5,))", "FastV")
    assert pyramid["method"] == {**PyramidDrop().settings(), "layers": [3], "keep": [0.5]}
    assert pyramid["visual_tokens"] == {"by_stage": [16, 8], "drop_layers": [3], "per_layer": 16 * 3 / 8 + 8 * 5 / 8}
    assert list(pyramid["differences"]) == ["to_vanilla"]
    assert list(fastv["differences"]) == ["to_vanilla", "to_first"]
    assert all(variant["prefill"]["cpu"] > 0 for variant in record["methods"])


def test_methods_at_equal_cost(tiny: list[str | Path]) -> None:
    record = run_json(*tiny, "--limit", "3", "--method", "pyramiddrop", "fastv:layer=2", "--percent", "60", "80")
    variants = record["methods"]
    assert [variant["percent"] for variant in variants] == [None, 60, 60, 80, 80]
    for variant in variants[1:]:
        assert variant["percent"] - 6 < 100 * variant["flops_ratio"] <= variant["percent"]
    assert [list(variant["differences"]) for variant in variants[3:]] == [["to_vanilla"], ["to_vanilla", "to_first"]]


def test_methods_at_equal_tokens(tiny: list[str | Path]) -> None:
    words = ["--method", "pyramiddrop", "fastv:layer=2", "--percent", "80", "--average-tokens", "10", "12"]
    record = run_json(*tiny, *words, "--rounds", "0")
    variants = record["methods"]
    budgets = [(variant["percent"], variant["average_tokens"]) for variant in variants]
    assert budgets == [(None, None), *[(80, None)] * 2, *[(None, 10)] * 2, *[(None, 12)] * 2]
    for variant in variants[3:]:
        assert variant["average_tokens"] - 1 < variant["visual_tokens"]["per_layer"] <= variant["average_tokens"]
    assert [variant["visual_tokens"]["drop_layers"] for variant in variants[:3]] == [[], [2, 4, 6], [2]]
    assert all(variant["prefill"] is None for variant in variants)
    shown = run(*tiny, *words, "--rounds", "0").stdout
    for words_shown in ("10 tokens", "80 %", "(2) → "):
        assert words_shown in shown
    assert "prefill" not in shown.lower()


@pytest.mark.parametrize("words", [["--percent", "5"], ["--percent", "60", "5"]])
def test_a_budget_out_of_reach_is_found_before_anything_is_answered(
    tiny: list[str | Path], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    answered: list[Any] = []
    monkeypatch.setattr(Answerer, "_answer", lambda self, inputs, *others: answered.append(inputs))
    result = run(*tiny, "--method", "pyramiddrop", *words)
    assert result.exit_code == 2
    assert "5 % of vanilla's decoder FLOPs is out of reach of PyramidDrop" in result.stderr
    assert not answered


def test_the_table_tells_the_same(tiny: list[str | Path]) -> None:
    result = run(*tiny, "--method", "pyramiddrop:lam=0.4")
    assert result.exit_code == 0
    for words in ("vanilla", "lam=0.4", "decoder FLOPs", "all (6)", "a (3)", "100.0 ± 0.0", "minus vanilla"):
        assert words in result.stdout
    assert "minus the first" not in result.stdout


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    variants = [{name: value for name, value in variant.items() if name != "prefill"} for variant in record["methods"]]
    return {**record, "methods": variants}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("lost", [0, 1, 400])
def test_a_run_that_was_stopped_goes_on(
    tiny: list[str | Path], tmp_path: Path, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny, "--method", "pyramiddrop", "--percent", "70"]
    unbroken = run_json(*words)
    answered: list[int] = []
    answer, stop_at = Answerer._answer, 4

    def counted(self: Answerer, samples: Any, *arguments: Any) -> Any:
        if len(answered) == stop_at:
            raise KeyboardInterrupt
        answered.append(len(samples))
        return answer(self, samples, *arguments)

    monkeypatch.setattr(Answerer, "_answer", counted)
    assert run(*words, "--output", tmp_path / "run").exit_code != 0
    assert answered == [2, 2, 2, 2]  # two batches under each of the two methods
    (journal,) = (tmp_path / "run" / "replies").glob("PyramidDrop-*.jsonl")
    journal.write_bytes(journal.read_bytes()[: -lost or None])

    answered.clear()
    stop_at = -1
    resumed = run_json(*words, "--output", tmp_path / "run")
    assert sum(answered) == (4 if lost == 0 else 6)
    assert without_times(resumed) == without_times(unbroken)

    answered.clear()
    assert run_json(*words, "--output", tmp_path / "run") == resumed
    assert answered == []
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == resumed


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--split dev", "split='dev' is not one of train, val, test"),
        ("--limit 0", "--limit must be at least 1; got 0"),
        ("--percent 0", "--percent must be above 0 and at most 100; got 0"),
        ("--average-tokens 0", "--average-tokens must be above 0; got 0"),
        ("--average-tokens 9 --limit 1", "an average of 9 visual tokens a layer is out of reach of PyramidDrop"),
        ("--percent 5 --limit 1", "5 % of vanilla's decoder FLOPs is out of reach of PyramidDrop"),
        ("--method fastv fastv:layer=2", "FastV is named twice"),
        ("--method fastv fastv:keep=0.3 --percent 52 --limit 1", "two of the methods are FastV(keep="),
        ("--method vanilla vanilla", "vanilla is named twice"),
        ("--method fastv:layer=9", "layers must be in 1..7 for a model of 8 layers"),
        ("--method pyramid", "method 'pyramid' is not one of"),
        ("--images pictures", "--images means nothing with --tasks digits"),
        ("--metric exact", "--metric means nothing with --tasks digits"),
        ("--data none.json", "no such file: none.json"),
        ("--data none.json --tasks digits", "--tasks means nothing with --data"),
        ("--data none.json --seed 0", "--seed means nothing with --data"),
        ("--model /none", "no such folder: /none"),
    ],
)
def test_bad_input_is_one_line(arguments: str, words: str) -> None:
    assert_one_line(run(*arguments.split()), words)


def test_questions_without_an_answer_and_unknown_metrics(data: Path, llava_folder: Path) -> None:
    assert_one_line(run("--data", data, "--metric", "bleu"), "--metric must be one of", "exact, vqa; got 'bleu'")
    records = json.loads(data.read_text())
    del records[3]["answers"]
    data.write_text(json.dumps(records))
    assert_one_line(run("--data", data), 'data.json[3]: no "answer" to compare with')
    assert run("--model", llava_folder, "--data", data, "--limit", "2", "--method", "vanilla").exit_code == 0
