"""The statistics of answers against hand-computed numbers and a brute-force bootstrap; and when an answer is right."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pyramiddrop.evaluation.scores import Difference, Score, difference, score, score_by_kind
from pyramiddrop.evaluation.tasks import exact, same, vqa

# Three pictures: "a" with three questions, "b" with two, "c" with one.
CLUSTERS = ["a", "a", "a", "b", "b", "c"]
RIGHT = [1, 1, 0, 0, 0, 1]
BASE = [1, 1, 1, 0, 1, 0]


def test_the_error_of_a_mean_takes_a_cluster_as_one_draw() -> None:
    # Mean 3/6. Residual sums: a: 2 - 1.5 = 0.5, b: 0 - 1 = -1, c: 1 - 0.5 = 0.5. Squares: 0.25 + 1 + 0.25 = 1.5.
    # Error: sqrt(3/2 * 1.5) / 6 = 1.5 / 6.
    assert score(RIGHT, CLUSTERS) == Score(0.5, 0.25, 6)


def test_with_a_question_a_cluster_the_error_is_the_usual_one() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert score(values, range(4)).error == pytest.approx(values.std(ddof=1) / 2)


def test_questions_that_always_agree_count_once() -> None:
    alone = score([1, 0, 1, 0, 0], range(5))
    thrice = score(np.repeat([1, 0, 1, 0, 0], 3), np.repeat(range(5), 3))
    assert thrice == Score(alone.mean, pytest.approx(alone.error), 15)


def test_one_cluster_says_nothing_about_the_error() -> None:
    assert np.isnan(score([1, 0], ["a", "a"]).error)
    assert np.isnan(difference([1, 0], [0, 0], ["a", "a"]).low)


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1, 0], ["a"])])
def test_values_without_a_cluster_each_are_refused(values: list[int], clusters: list[str]) -> None:
    with pytest.raises(ValueError, match="must be equally long and not empty"):
        score(values, clusters)


def test_scores_by_kind_are_in_order_and_end_with_all() -> None:
    found = score_by_kind(RIGHT, CLUSTERS, ["y", "x", "y", "x", "x", "x"])
    assert list(found) == ["y", "x", "all"]
    assert (found["y"].mean, found["y"].count, found["x"].mean) == (0.5, 2, 0.5)
    assert found["all"] == score(RIGHT, CLUSTERS)
    # Kind x: a: 1 of 1, b: 0 of 2, c: 1 of 1; residuals 0.5, -1, 0.5.
    assert found["x"].error == pytest.approx((3 / 2 * 1.5) ** 0.5 / 4)


def test_a_difference_is_paired() -> None:
    # Gains: 0, 0, -1 | 0, -1 | 1: mean -1/6; residuals a: -1 + 1/2, b: -1 + 1/3, c: 1 + 1/6.
    found = difference(RIGHT, BASE, CLUSTERS)
    residuals = np.array([-1 / 2, -2 / 3, 7 / 6])
    assert found.mean == pytest.approx(-1 / 6)
    assert found.error == pytest.approx((3 / 2 * (residuals**2).sum()) ** 0.5 / 6)


def test_the_bootstrap_interval_is_that_of_all_draws_of_clusters() -> None:
    sizes = [1, 2, 3, 4, 1, 2]
    clusters = np.repeat(range(6), sizes)
    gains = np.random.default_rng(0).normal(size=13) + clusters / 2
    sums = np.array([gains[clusters == one].sum() for one in range(6)])
    drawn = np.array(list(product(range(6), repeat=6)))  # all of them, each as likely
    means = sums[drawn].sum(1) / np.array(sizes)[drawn].sum(1)
    found = difference(gains, np.zeros(13), clusters)
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_the_bootstrap_covers_what_it_should() -> None:
    """Of 200 experiments whose true difference is known, 95 % of the intervals hold it, up to chance."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        shared = generator.normal(0.3, 1, 40).repeat(4)  # questions of a picture rise and fall together
        gains = shared + generator.normal(0, 1, 160)
        found = difference(gains, np.zeros(160), np.arange(40).repeat(4), draws=400)
        held += found.low <= 0.3 <= found.high
    assert 180 <= held <= 198


def test_the_same_seed_gives_the_same_interval() -> None:
    first, again, other = (difference(RIGHT, BASE, CLUSTERS, draws=50, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_a_method_against_itself_differs_by_nothing() -> None:
    assert difference(RIGHT, RIGHT, CLUSTERS) == Difference(0, 0, 6, 0, 0)


def test_scores_are_written_in_percent() -> None:
    assert str(Score(0.5, 0.0125, 8)) == "50.0 ± 1.2"
    assert Score(-0.0625, 0.25, 8).signed() == "-6.2 ± 25.0"


@pytest.mark.parametrize("answer", ["Yes", " yes ", "yes.", "YES. "])
def test_case_space_and_a_final_full_stop_do_not_matter(answer: str) -> None:
    assert exact(answer, ["no", "yes"]) == 1
    assert same(answer, ["yes"]) == 0


@pytest.mark.parametrize("answer", ["y.es", "yes!", "yes..", "yes or no", ""])
def test_everything_else_matters(answer: str) -> None:
    assert exact(answer, ["yes", "no"]) == 0


@pytest.mark.parametrize("agree", range(11))
def test_vqa_leaves_each_person_out_in_turn(agree: int) -> None:
    people = ["red"] * agree + [f"other {number}" for number in range(10 - agree)]
    expected = np.mean([min(1, (agree - (one == "red")) / 3) for one in people])
    assert vqa("Red.", people) == pytest.approx(expected)
    if agree:
        assert vqa("red", people[:3]) == 1
