"""The trade-off and the ablation: what they run, what it costs, what they draw, and the paper's numbers beside."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from pyramiddrop import PyramidDrop
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.cost import DecoderShape, prefill_flops
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.run import EvalOptions
from pyramiddrop.evaluation.studies.method_studies import METHODS, PERCENTS, prepare_ablation, prepare_tradeoff
from pyramiddrop.evaluation.tasks import digits_task
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.report.studies.ablation import show_ablation
from pyramiddrop.report.studies.study import write_study
from pyramiddrop.report.studies.tradeoff import show_tradeoff

WORDS = ("pyramiddrop:layers=2/6", "vanilla", "fastv:layer=3")


@cache
def tradeoff() -> dict[str, Any]:
    """Two methods at two budgets, on a scene and a half."""
    return prepare_tradeoff(digits_task(limit=24), EvalOptions(WORDS, (60.0, 80.0))).record()


@cache
def ablation() -> dict[str, Any]:
    """Two λ, given out of order."""
    return prepare_ablation(digits_task(limit=24), (0.7, 0.5), EvalOptions()).record()


def lines_of(figure: Figure, panel: int = 0) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[panel].get_lines()}


# ---- the trade-off -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method_is_tried_at_every_budget() -> None:
    vanilla, *variants = tradeoff()["methods"]
    assert vanilla["name"] == "vanilla"
    assert [(variant["line"], variant["percent"]) for variant in variants] == [
        ("pyramiddrop:layers=2/6", 60),
        ("fastv:layer=3", 60),
        ("pyramiddrop:layers=2/6", 80),
        ("fastv:layer=3", 80),
    ]
    for variant in variants:
        assert variant["method"]["method"] == ("FastV" if variant["line"].startswith("fastv") else "PyramidDrop")
        assert variant["percent"] - 3 < 100 * variant["flops_ratio"] <= variant["percent"]


def test_a_point_is_what_answering_under_its_method_gives() -> None:
    variant = tradeoff()["methods"][1]
    method = PyramidDrop(layers=[2, 6], lam=variant["method"]["lam"])
    samples = digits_task(limit=24).samples
    replies = Answerer(load_checkpoint(digits_checkpoint(), "cpu")).answers(samples, method)
    right = [reply.text in sample.answers for reply, sample in zip(replies, samples, strict=True)]
    assert variant["scores"]["all"]["mean"] == pytest.approx(sum(right) / 24)


def test_the_usual_methods_are_published_ones_and_controls() -> None:
    prepared = prepare_tradeoff(digits_task(limit=1), EvalOptions())
    assert [label["line"] for label in prepared.labels] == list(METHODS) * len(PERCENTS)
    assert prepared.evaluator.total == 1 + len(METHODS) * len(PERCENTS)


def test_the_curves_go_through_the_points() -> None:
    shown = show_tradeoff(tradeoff())
    variants = tradeoff()["methods"]
    lines = lines_of(shown.plots[0].figure)
    expected = [
        [100 * variant["flops_ratio"], 100 * variant["scores"]["all"]["mean"]] for variant in (variants[2], variants[4])
    ]
    assert lines["fastv:layer=3"] == [pytest.approx(point) for point in expected]
    assert [y for _, y in lines["vanilla"]] == pytest.approx([100 * variants[0]["scores"]["all"]["mean"]] * 2)
    by_kind = shown.plots[1].figure
    read_row = tradeoff()["kinds"].index("read_row")
    assert by_kind.axes[read_row].get_title("left") == "read_row"
    drawn = lines_of(by_kind, read_row)["pyramiddrop:layers=2/6"]
    assert [y for _, y in drawn] == pytest.approx(
        [100 * variants[place]["scores"]["read_row"]["mean"] for place in (1, 3)]
    )
    top = shown.plots[0].figure.axes[0].child_axes[0]
    assert top.get_xlabel() == "MFLOPs a prompt"
    low, high = shown.plots[0].figure.axes[0].get_xlim()
    shown.plots[0].figure.draw_without_rendering()
    assert top.get_xlim() == pytest.approx([limit / 100 * variants[0]["flops"] / 1e6 for limit in (low, high)])


def test_the_conclusion_names_the_best_at_the_ends() -> None:
    def variant(line: str, budget: float | None, mean: float) -> dict[str, Any]:
        return {**tradeoff()["methods"][1], "line": line, "percent": budget, "scores": {"all": scored(mean)}}

    def scored(mean: float) -> dict[str, Any]:
        return {"mean": mean, "error": 0.01, "count": 24}

    scores = {
        ("a", 40.0): 0.5,
        ("b", 40.0): 0.6,
        ("a", 60.0): 0.9,
        ("b", 60.0): 0.1,
        ("a", 80.0): 0.97,
        ("b", 80.0): 0.97,
    }
    variants = [variant("vanilla", None, 0.96), *(variant(*place, mean) for place, mean in scores.items())]
    assert show_tradeoff({**tradeoff(), "methods": variants, "kinds": ["all"]}).conclusion == (
        "With 40 % of vanilla's decoder FLOPs b keeps most answers right, 36.0 points below vanilla; "
        "with 80 % of vanilla's decoder FLOPs a or b keeps most answers right, 1.0 points above vanilla."
    )


def test_the_ablation_concludes_with_its_ends() -> None:
    vanilla, half, more = ablation()["methods"]
    means = [variant["scores"]["all"]["mean"] for variant in (vanilla, half, more)]
    said = show_ablation(ablation()).conclusion
    assert said.startswith(f"λ = 0.5 spends {100 * half['flops_ratio']:.1f} % of vanilla's decoder FLOPs and scores ")
    assert f"scores {100 * abs(means[0] - means[1]):.1f} points" in said
    assert "; λ = 0.7 spends " in said


def test_everything_is_written(tmp_path: Path) -> None:
    record = {**tradeoff(), "command": "pyramiddrop study tradeoff"}
    text = write_study(tmp_path, "tradeoff", record, show_tradeoff(record)).read_text()
    for word in ("fastv:layer=3", "minus vanilla", "read_row", "pyramiddrop study tradeoff", "questions"):
        assert word in text
    rows = list(csv.DictReader((tmp_path / "tradeoff.csv").open()))
    assert len(rows) == 5 * (1 + len(record["kinds"]))
    assert {row["line"] for row in rows} == {"vanilla", "pyramiddrop:layers=2/6", "fastv:layer=3"}


@pytest.mark.parametrize(
    ("methods", "percents", "message"),
    [
        (("bogus",), (), "method 'bogus' is not one of"),
        (("fastv", "fastv"), (), "named twice"),
        (("vanilla",), (), "names vanilla alone"),
        ((), (0.0,), "--percent must be above 0"),
    ],
)
def test_what_cannot_be_tried_is_refused(methods: tuple[str, ...], percents: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_tradeoff(digits_task(limit=1), EvalOptions(methods, percents))


# ---- the ablation --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_costs_of_a_lambda_are_those_of_its_schedule() -> None:
    vanilla, half, more = ablation()["methods"]
    assert (half["lam"], more["lam"]) == (0.5, 0.7)
    assert half["method"]["lam"] == 0.5
    visual = [64, 64, 32, 32, 16, 16, 8, 8]
    assert half["visual_tokens"]["per_layer"] == sum(visual) / 8
    assert more["visual_tokens"]["per_layer"] == sum([64, 64, 44, 44, 31, 31, 21, 21]) / 8
    assert vanilla["visual_tokens"]["per_layer"] == 64
    shape = DecoderShape(layers=8, hidden=128, intermediate=352, heads=4, kv_heads=4, head_dim=32)
    fewest, most = (  # prompts have 4 to 12 tokens of text
        prefill_flops(shape, [text + count for count in visual], [text + 64, text + 32, text + 16])
        / prefill_flops(shape, [text + 64] * 8)
        for text in (4, 12)
    )
    assert fewest < half["flops_ratio"] < most < fewest + 0.06
    assert half["kv_ratio"] < more["kv_ratio"] < 1


@pytest.mark.slow
def test_lambda_of_one_is_vanilla() -> None:
    vanilla, one = prepare_ablation(digits_task(limit=16), (1.0,), EvalOptions()).record()["methods"]
    assert one["scores"] == vanilla["scores"]
    assert one["flops_ratio"] == 1
    assert one["differences"]["to_vanilla"]["mean"] == 0


def test_the_ablation_is_drawn_with_vanilla_at_one() -> None:
    variants = ablation()["methods"]
    lines = lines_of(show_ablation(ablation()).plots[0].figure)
    means = [variant["scores"]["all"]["mean"] for variant in (variants[1], variants[2], variants[0])]
    assert lines["all"] == [[lam, pytest.approx(100 * mean)] for lam, mean in zip((0.5, 0.7, 1), means, strict=True)]
    assert set(lines) == {"all", *ablation()["kinds"]}
    costs = lines_of(show_ablation(ablation()).plots[0].figure, 1)
    assert costs["visual tokens of a layer"][0] == [0.5, pytest.approx(100 * 30 / 64)]
    assert costs["decoder FLOPs"][-1] == [1.0, 100.0]


def test_the_papers_rows_stand_beside_the_same_lambda() -> None:
    shown = show_ablation(ablation())
    beside = shown.sheets[-1]
    assert beside.head == (
        "λ",
        *(f"{model}: {what}" for model in ("bundled", "LLaVA-NeXT-7B", "LLaVA-1.5-7B") for what in ("FLOPs", "score")),
    )
    # Table 4: 9.46 of 20.8 TFLOPs and 62.8 of 63.5; 1.78 of 3.82 and 52.4 of 52.6. It has no λ = 0.7.
    assert beside.rows[0][3:] == ("45.5 %", "98.9 %", "46.6 %", "99.6 %")
    assert beside.rows[1][3:] == ("", "", "", "")


def test_a_model_that_is_never_right_is_shown() -> None:
    variants = [
        {**variant, "scores": {"all": {"mean": 0.0, "error": 0.0, "count": 24}}} for variant in ablation()["methods"]
    ]
    shown = show_ablation({**ablation(), "methods": variants, "kinds": ["all"]})
    assert shown.sheets[-1].rows[0][2] == "not known"  # of nothing there is no part
