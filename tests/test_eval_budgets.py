"""Equal cost: methods solved for FLOPs or for average tokens spend as much as they can of them, and never more."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from pyramiddrop import Downsample, FastV, Method, PyramidDrop, RandomDrop, UniformDrop, VisionDrop
from pyramiddrop.cost import DecoderShape, ModelShape, Prompt, attention_ranking_flops, estimate_cost
from pyramiddrop.evaluation.budgets import PERCENT, TOKENS, Budget, decoder_flops
from pyramiddrop.inference import InputError
from pyramiddrop.schedule import Schedule

SHAPE = DecoderShape(layers=8, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8)
PROMPTS = [Prompt(64, 6)] * 3 + [Prompt(100, 9), Prompt(7, 20)]
METHODS = [
    PyramidDrop(),
    PyramidDrop(stages=3),
    PyramidDrop(layers=[3], keep=[0.5]),
    PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.4, 0.1]),
    FastV(layer=2),
    RandomDrop(),
    UniformDrop(layers=[1, 5]),
]


def spent(method: Method | None, prompts: list[Prompt] = PROMPTS) -> int:
    return decoder_flops(method, SHAPE, Counter(prompts))


def counts(method: Method, tokens: int) -> list[int]:
    return method.schedule(SHAPE.layers).counts(tokens)


@pytest.mark.parametrize("method", [None, *METHODS])
def test_each_prompt_counts_as_often_as_it_comes(method: Method | None) -> None:
    schedule = method.schedule(SHAPE.layers) if method else None
    ranking = attention_ranking_flops if isinstance(method, PyramidDrop | FastV) else (lambda shape, choice: 0)
    parts = [estimate_cost(ModelShape(SHAPE), prompt, schedule, ranking).full for prompt in PROMPTS]
    assert spent(method) == sum(one.decoder + one.ranking for one in parts)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("percent", [40.0, 52.0, 66.5])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_used_up_and_kept(method: Method, percent: float) -> None:
    limit = percent / 100 * spent(None)
    if percent == 40 and isinstance(method, PyramidDrop) and method.layers == (3,):
        with pytest.raises(InputError, match="out of reach"):  # three whole layers of eight cost more than 40 %
            Budget(PERCENT, percent).solve(method, SHAPE, PROMPTS)
        return
    solved = Budget(PERCENT, percent).solve(method, SHAPE, PROMPTS)
    assert spent(solved) <= limit
    name = "keep" if getattr(solved, "keep", None) is not None else "lam"
    value: Any = getattr(solved, name)
    longer = 1 / 64  # a token more of the most frequent prompts
    more = [ratio * (1 + longer / value[0]) for ratio in value] if isinstance(value, tuple) else value + longer
    assert spent(replace(solved, **{name: more})) > limit
    assert spent(solved) > 0.96 * limit


def test_of_one_prompt_one_token_more_is_too_much() -> None:
    one = [Prompt(64, 6)]
    solved = Budget(PERCENT, 52).solve(FastV(layer=2), SHAPE, one)
    (kept,) = counts(solved, 64)
    more = FastV(layer=2, keep=(kept + 1) / 64)
    assert spent(solved, one) <= 0.52 * spent(None, one) < spent(more, one)


def test_shares_of_several_drops_keep_their_proportions_and_settings_stay() -> None:
    method = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.4, 0.1], positions="compact")
    solved = Budget(PERCENT, 60).solve(method, SHAPE, PROMPTS)
    assert solved.keep is not None
    assert [ratio / solved.keep[0] for ratio in solved.keep] == pytest.approx([1, 0.8, 0.2])
    assert (solved.layers, solved.positions) == ((2, 4, 6), "compact")


def test_the_model_may_drop_elsewhere_than_its_depth_says() -> None:
    late = Budget(PERCENT, 60).solve(PyramidDrop(), SHAPE, PROMPTS, layers=[4, 5, 6])
    there = decoder_flops(late, SHAPE, Counter(PROMPTS), [4, 5, 6])
    assert 0.57 * spent(None) < there <= 0.6 * spent(None)
    assert isinstance(late, PyramidDrop)
    assert spent(late) < there  # what its depth says, before layers 2, 4 and 6


def test_the_whole_of_vanilla_keeps_everything() -> None:
    assert Budget(PERCENT, 100).solve(PyramidDrop(), SHAPE, PROMPTS) == PyramidDrop(lam=1.0)


def test_numbers_are_as_short_as_they_can_be() -> None:
    share = Budget(PERCENT, 52).solve(FastV(layer=2), SHAPE, [Prompt(64, 6)]).keep
    assert len(f"{share}") <= len("0.32")


@pytest.mark.parametrize("percent", [0, -1, 100.5, float("nan")])
def test_what_is_no_percentage(percent: float) -> None:
    with pytest.raises(InputError, match="--percent must be above 0 and at most 100"):
        Budget(PERCENT, percent).solve(PyramidDrop(), SHAPE, PROMPTS)


def test_what_is_out_of_reach_says_what_is_not() -> None:
    with pytest.raises(
        InputError, match=r"10 % of vanilla's .* out of reach of FastV: .* spend here is (\d+\.\d) %"
    ) as caught:
        Budget(PERCENT, 10).solve(FastV(layer=4), SHAPE, PROMPTS)
    least = float(str(caught.value).split()[-2])
    assert least == pytest.approx(100 * spent(FastV(layer=4, keep=1e-9)) / spent(None), abs=0.05)


def test_a_method_without_a_share_cannot_be_solved() -> None:
    class Fixed(Method):
        def schedule(self, num_layers: int, allowed: Any = None) -> Schedule:
            return Schedule.equal(num_layers, 2, [0.5])

    with pytest.raises(InputError, match="Fixed has no share to solve for --percent"):
        Budget(PERCENT, 50).solve(Fixed(), SHAPE, PROMPTS)


# ---- average tokens ------------------------------------------------------------------------------------------------


def average_tokens(method: Method, prompts: list[Prompt] = PROMPTS) -> float:
    """Visual tokens of a layer, counted layer by layer and prompt by prompt."""
    total = 0
    for prompt in prompts:
        schedule = method.schedule(SHAPE.layers)
        kept = [prompt.visual_tokens, *schedule.counts(prompt.visual_tokens)]
        total += sum(kept[schedule.stage_of(layer)] for layer in range(SHAPE.layers))
    return total / SHAPE.layers / len(prompts)


@pytest.mark.parametrize("tokens", [27.0, 36.5])
@pytest.mark.parametrize("method", [*METHODS, VisionDrop(), Downsample()])
def test_average_tokens_are_used_up_and_kept(method: Method, tokens: float) -> None:
    solved = Budget(TOKENS, tokens).solve(method, SHAPE, PROMPTS)
    assert 0.93 * tokens < average_tokens(solved) <= tokens
    if isinstance(solved, FastV):
        assert average_tokens(replace(solved, keep=solved.keep + 1 / 64)) > tokens


def test_the_papers_layers_reach_a_quarter_of_the_tokens_at_the_least() -> None:
    """Before layers 8, 16 and 24 of 32 an average below 8/32 of 576 tokens cannot be had; one token stays of each."""
    shape, prompts = replace(SHAPE, layers=32), [Prompt(576, 30)]
    assert Budget(TOKENS, 192).solve(PyramidDrop(), shape, prompts).schedule(32).layers == (8, 16, 24)
    with pytest.raises(
        InputError, match=r"of 128 visual tokens a layer is out of reach of PyramidDrop: .* 144\.8 tokens"
    ):
        Budget(TOKENS, 128).solve(PyramidDrop(), shape, prompts)
    assert Budget(TOKENS, 128).solve(PyramidDrop(stages=8), shape, prompts).schedule(32).layers[0] == 4


def test_enough_tokens_keep_everything() -> None:
    assert Budget(TOKENS, 1000).solve(PyramidDrop(), SHAPE, PROMPTS) == PyramidDrop(lam=1.0)


@pytest.mark.parametrize("tokens", [0, -3, float("nan"), float("inf")])
def test_what_is_no_number_of_tokens(tokens: float) -> None:
    with pytest.raises(InputError, match="--average-tokens must be above 0; got"):
        Budget(TOKENS, tokens).solve(PyramidDrop(), SHAPE, PROMPTS)
