"""Scorers on numbers small enough to check by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyramiddrop.cost import PRESETS, DropCounts
from pyramiddrop.scoring import (
    SCORERS,
    AttentionScorer,
    DebiasedScorer,
    DiversityScorer,
    GridReserveScorer,
    InstructionScorer,
    KeyNormScorer,
    RandomAfterScorer,
    RandomScorer,
    RopeFreeScorer,
    ScorerInputs,
    TopHeadsScorer,
    UniformScorer,
    VariationScorer,
    attention_received,
)
from pyramiddrop.selection import select


def scorer_inputs(
    visual: list[list[int]], num_keep: list[list[int]], groups: list[list[int]] | None = None, **known: Any
) -> ScorerInputs:
    """What a scorer sees; `known` is what it may ask for."""
    mask = torch.tensor(visual).bool()

    def nothing(**options: bool) -> Tensor:
        raise AssertionError("this scorer must not ask for attention or keys")

    return ScorerInputs(
        layer=known.pop("layer", 2),
        visual=mask,
        token_index=(mask.long().cumsum(1) - 1).clamp(min=0),
        groups=torch.zeros_like(mask, dtype=torch.long) if groups is None else torch.tensor(groups),
        num_keep=torch.tensor(num_keep),
        **({"hidden": torch.zeros(*mask.shape, 2), "attention": nothing, "keys": nothing} | known),
    )


def test_attention_is_a_softmax_over_all_keys_and_a_mean_over_heads() -> None:
    queries = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # two heads, one query
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]])  # one key head: grouped-query attention
    visible = torch.tensor([[[[True, True, False]]]])
    received = attention_received(queries, keys, visible, torch.ones(1, 1), scale=1.0)
    first = torch.tensor([1.0, 0.0]).softmax(0)
    second = torch.tensor([0.0, 2.0]).softmax(0)
    expected = torch.cat([(first + second) / 2, torch.zeros(1)])
    torch.testing.assert_close(received[0], expected)


def test_an_additive_mask_says_the_same_as_a_bool_one() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    visible = torch.rand(2, 1, 3, 5) > 0.3
    visible[..., 0] = True
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    weights = torch.ones(2, 3)
    by_bool, by_number = (attention_received(queries, keys, mask, weights, 0.5) for mask in (visible, additive))
    torch.testing.assert_close(by_bool, by_number)


def test_query_tokens_weigh_the_same_and_padded_ones_nothing() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 4)
    visible = torch.ones(1, 1, 3, 6, dtype=torch.bool)
    visible[:, :, 2] = False  # the padded query sees nothing: it must not turn the scores to NaN
    both = attention_received(queries, keys, visible, torch.tensor([[1.0, 1.0, 0.0]]), 1.0)
    each = [attention_received(queries[:, :, [q]], keys, visible[:, :, [q]], torch.ones(1, 1), 1.0) for q in (0, 1)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_a_sample_that_nobody_asks_of_has_no_attention_and_no_nan() -> None:
    queries, keys = torch.ones(2, 1, 1, 2), torch.ones(2, 1, 3, 2)
    visible = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    received = attention_received(queries, keys, visible, torch.tensor([[1.0], [0.0]]), 1.0)
    torch.testing.assert_close(received, torch.tensor([[1 / 3] * 3, [0.0] * 3]))


def test_a_softcap_flattens_the_logits() -> None:
    queries, keys = torch.tensor([[[[9.0]]]]), torch.tensor([[[[9.0], [0.0]]]])
    visible = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    received = attention_received(queries, keys, visible, torch.ones(1, 1), 1.0, softcap=1.0)
    torch.testing.assert_close(received[0], torch.tensor([torch.tensor(81.0).tanh().item(), 0.0]).softmax(0))


def test_sinks_take_a_share_that_no_key_gets() -> None:
    """Two heads with logits 1 and 0; the first has a sink of 2, the second one that weighs nothing."""
    queries, keys = torch.tensor([[[[1.0]], [[1.0]]]]), torch.tensor([[[[1.0], [0.0]]]])
    visible = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    sinks = torch.tensor([2.0, float("-inf")])
    received = attention_received(queries, keys, visible, torch.ones(1, 1), 1.0, sinks=sinks)
    first = torch.tensor([1.0, 0.0, 2.0]).softmax(0)[:2]
    second = torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(received[0], (first + second) / 2)


def test_the_scale_comes_before_the_softcap_and_the_mask_behind_it() -> None:
    """Logits 8 and 4 at scale 0.5, capped at 2, with a sink of 1 that is not capped; the third key is hidden."""
    queries, keys = torch.tensor([[[[4.0]]]]), torch.tensor([[[[4.0], [2.0], [9.0]]]])
    hidden = torch.tensor([[[[0.0, 0.0, torch.finfo(torch.float32).min]]]])
    received = attention_received(queries, keys, hidden, torch.ones(1, 1), 0.5, softcap=2.0, sinks=torch.tensor([1.0]))
    capped = torch.tensor([8.0, 4.0]).div(2).tanh() * 2
    expected = torch.cat([capped, torch.tensor([1.0])]).softmax(0)
    torch.testing.assert_close(received[0], torch.cat([expected[:2], torch.zeros(1)]))


def test_scores_are_float32_for_half_precision_models() -> None:
    queries, keys = torch.randn(1, 1, 1, 4).bfloat16(), torch.randn(1, 1, 3, 4).bfloat16()
    received = attention_received(queries, keys, torch.ones(1, 1, 1, 3, dtype=torch.bool), torch.ones(1, 1), 1.0)
    assert received.dtype == torch.float32


@pytest.mark.parametrize(("tokens", "kept"), [(8, 4), (7, 3), (9, 1), (5, 5), (64, 13)])
def test_uniform_keeps_evenly_spaced_tokens(tokens: int, kept: int) -> None:
    scores = UniformScorer()(scorer_inputs([[0, *[1] * tokens, 0]], [[kept]]))[0, 1:-1]
    chosen = scores.nonzero()[:, 0]
    gaps = chosen.diff()
    assert len(chosen) == kept
    assert kept == 1 or gaps.max() - gaps.min() <= 1


def test_uniform_spaces_each_group_on_its_own() -> None:
    case = scorer_inputs([[1, 1, 1, 1, 0, 1, 1]], [[2, 1]], groups=[[0, 0, 0, 0, 0, 1, 1]])
    scores = UniformScorer()(case) * case.visual
    assert scores.tolist() == [[0, 1, 0, 1, 0, 0, 1]]


def test_random_is_reproducible_and_does_not_depend_on_the_batch() -> None:
    alone = RandomScorer(3)(scorer_inputs([[1, 1, 1, 1]], [[2]]))
    padded = RandomScorer(3)(scorer_inputs([[0, 0, 1, 1, 1, 1], [1] * 6], [[2], [3]]))
    assert torch.equal(alone[0], padded[0, 2:])
    assert not torch.equal(alone, RandomScorer(4)(scorer_inputs([[1, 1, 1, 1]], [[2]])))


def test_random_without_a_seed_draws_anew() -> None:
    case = scorer_inputs([[1] * 32], [[2]])
    assert not torch.equal(RandomScorer(None)(case), RandomScorer(None)(case))


def test_a_seed_draws_the_same_tokens_in_every_release() -> None:
    drawn = {seed: chosen(RandomScorer(seed)(scorer_inputs([[1] * 16], [[4]])), 4) for seed in (0, 1, 7)}
    assert drawn == {0: [1, 3, 8, 11], 1: [0, 2, 5, 11], 7: [3, 4, 13, 14]}


def test_random_is_uniform_over_seeds() -> None:
    case = scorer_inputs([[1] * 16], [[4]])
    chosen = torch.stack([RandomScorer(seed)(case)[0].topk(4).indices for seed in range(2000)])
    share = torch.bincount(chosen.flatten(), minlength=16) / 2000
    assert (share - 0.25).abs().max() < 0.05


# --- Remedies, on numbers small enough to check by hand ---------------------------------------------------------------


def looking(heads: list[list[float]]) -> Any:
    """One sample whose heads attend so."""
    return lambda **options: torch.tensor([heads])


def test_attention_is_the_mean_over_heads() -> None:
    case = scorer_inputs([[1, 1, 1]], [[1]], attention=looking([[0.1, 0.2, 0.6], [0.3, 0.4, 0.0]]))
    torch.testing.assert_close(AttentionScorer()(case), torch.tensor([[0.2, 0.3, 0.3]]))


def test_who_asks_and_how_is_the_scorers_choice() -> None:
    asked: list[dict[str, bool]] = []

    def attention(**options: bool) -> Tensor:
        asked.append(options)
        return torch.zeros(1, 1, 2)

    case = scorer_inputs([[1, 1]], [[1]], attention=attention)
    for scorer in (AttentionScorer(), InstructionScorer(), RopeFreeScorer()):
        scorer(case)
    assert asked == [{}, {"instruction": True}, {"rotated": False}]


def test_top_heads_are_those_that_look_at_the_picture() -> None:
    """Of four heads one: the second, which gives the two visual tokens 0.9; the first gives most of its to the text."""
    heads = [[0.9, 0.1, 0.0], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3], [0.8, 0.1, 0.1]]
    case = scorer_inputs([[0, 1, 1]], [[1]], attention=looking(heads))
    torch.testing.assert_close(TopHeadsScorer()(case)[0, 1:], torch.tensor([0.2, 0.7]))
    two = TopHeadsScorer(share=0.5)(case)[0, 1:]
    torch.testing.assert_close(two, torch.tensor([0.3, 0.5]))
    torch.testing.assert_close(TopHeadsScorer(share=0.1)(case)[0, 1:], torch.tensor([0.2, 0.7]))  # at least one
    torch.testing.assert_close(TopHeadsScorer(share=1)(case), AttentionScorer()(case))
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]; got 0"):
        TopHeadsScorer(share=0)


def test_an_exponential_trend_is_taken_out() -> None:
    """Attention that doubles from token to token says nothing; one token that has three times its due does."""
    doubling = [0.01 * 2**place for place in range(6)]
    case = scorer_inputs([[1] * 6], [[3]], attention=looking([doubling]), hidden=torch.ones(1, 6, 2))
    torch.testing.assert_close(DebiasedScorer()(case), torch.zeros(1, 6), atol=1e-5, rtol=0)
    doubling[1] *= 3
    raised = scorer_inputs([[1] * 6], [[3]], attention=looking([doubling]), hidden=torch.ones(1, 6, 2))
    assert DebiasedScorer()(raised).argmax() == 1
    assert AttentionScorer()(raised).argmax() == 5


def test_text_is_no_part_of_a_trend() -> None:
    attention = looking([[0.9, 0.01, 0.02, 0.04, 0.08, 0.7]])
    case = scorer_inputs([[0, 1, 1, 1, 1, 0]], [[2]], attention=attention, hidden=torch.ones(1, 6, 2))
    torch.testing.assert_close(DebiasedScorer()(case)[:, 1:-1], torch.zeros(1, 4), atol=1e-5, rtol=0)


def test_each_group_has_a_trend_of_its_own_and_one_token_none() -> None:
    attention = looking([[0.1, 0.2, 0.4, 0.8, 0.8, 0.4, 0.2, 0.1, 0.7]])
    groups = [[0, 0, 0, 0, 1, 1, 1, 1, 2]]
    case = scorer_inputs([[1] * 9], [[1, 1, 1]], groups, attention=attention, hidden=torch.ones(1, 9, 2))
    torch.testing.assert_close(DebiasedScorer()(case), torch.zeros(1, 9), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weights", [[0.1, 0.2], [0.3, 0.2], [0.2, 0.1, 0.3], [0.3, 0.1, 0.2]])
def test_two_or_three_tokens_have_no_trend_and_are_ranked_by_attention(weights: list[float]) -> None:
    """A line leaves nothing of two, and of three the same to the first and the last: rounding would choose."""
    case = scorer_inputs(
        [[1] * len(weights)], [[1]], attention=looking([weights]), hidden=torch.ones(1, len(weights), 2)
    )
    logarithms = torch.tensor([weights]).log()
    torch.testing.assert_close(DebiasedScorer()(case), logarithms - logarithms.mean())


def test_a_sink_goes_first_whatever_attention_it_gets() -> None:
    hidden = torch.ones(1, 3, 500)
    hidden[0, 1, 7] = 100.0  # 21.8 times the root mean square of its row
    case = scorer_inputs([[1, 1, 1]], [[1]], attention=looking([[0.1, 0.8, 0.1]]), hidden=hidden)
    assert DebiasedScorer()(case).argmin() == 1
    assert DebiasedScorer(sink=50.0)(case).argmax() == 1


def test_a_large_negative_activation_is_a_sink_too() -> None:
    hidden = torch.ones(1, 3, 500)
    hidden[0, 1, 7] = -100.0
    case = scorer_inputs([[1, 1, 1]], [[1]], attention=looking([[0.1, 0.8, 0.1]]), hidden=hidden)
    assert DebiasedScorer()(case).argmin() == 1


def test_a_sink_has_at_least_its_share() -> None:
    """One activation of 20 among 400 is exactly 20 times the root mean square."""
    hidden = torch.zeros(1, 2, 400)
    hidden[0, 0, 3] = 20.0
    hidden[0, 1] = 1.0
    case = scorer_inputs([[1, 1]], [[1]], attention=looking([[0.9, 0.1]]), hidden=hidden)
    assert DebiasedScorer(sink=20.0)(case).argmin() == 0


def test_a_token_without_any_attention_spoils_no_trend() -> None:
    """Its logarithm would be minus infinity, and the line through it no number."""
    case = scorer_inputs([[1] * 5], [[3]], attention=looking([[0.1, 0.2, 0.0, 0.3, 0.4]]), hidden=torch.ones(1, 5, 2))
    scores = DebiasedScorer()(case)
    assert scores.isfinite().all()
    assert scores.argmin() == 2


def test_short_keys_stay() -> None:
    keys = torch.tensor([[[[3.0, 4.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 2.0]]]])  # (1, 2 heads, 2 tokens, 2)
    case = scorer_inputs([[1, 1]], [[1]], keys=lambda: keys)
    torch.testing.assert_close(KeyNormScorer()(case), torch.tensor([[-3.0, -1.5]]))


def test_what_a_layer_changed_stays() -> None:
    hidden, previous = torch.tensor([[[3.0, 4.0], [1.0, 1.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    case = scorer_inputs([[1, 1]], [[1]], hidden=hidden, previous=previous)
    torch.testing.assert_close(VariationScorer()(case), torch.tensor([[5.0, 1.0]]))


def test_a_change_is_measured_in_float32() -> None:
    """511 is no bfloat16 number."""
    hidden, previous = torch.tensor([[[512.0]]]).bfloat16(), torch.tensor([[[1.0]]]).bfloat16()
    assert VariationScorer()(scorer_inputs([[1]], [[1]], hidden=hidden, previous=previous)).item() == 511


def directions(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], -1)[None]


def chosen(scores: Tensor, count: int) -> list[int]:
    return sorted(scores[0].topk(count).indices.tolist())


def test_diversity_takes_the_farthest_from_those_it_has() -> None:
    """Degrees, whose mean points to about 42: first goes 100, then 0, and then, of 5, 12 and 92, which are
    5, 12 and 8 from the nearest, 12."""
    case = scorer_inputs([[1] * 5], [[3]], hidden=directions(0, 5, 12, 92, 100))
    scores = DiversityScorer()(case)
    assert scores[0].tolist() == [2, 0, 1, 0, 3]


def test_diversity_among_equal_tokens_takes_as_many_as_asked_for() -> None:
    case = scorer_inputs([[1] * 4], [[3]], hidden=directions(30, 30, 30, 30))
    assert int((DiversityScorer()(case) > 0).sum()) == 3


def test_diversity_looks_at_the_mean_for_the_first_token_alone() -> None:
    """160 and 10 go first; then, of 30, 90 and 110, which are 20, 70 and 50 from the nearest of them, 90: no matter
    that the mean is at 83."""
    case = scorer_inputs([[1] * 5], [[3]], hidden=directions(10, 30, 90, 110, 160))
    assert chosen(DiversityScorer()(case), 3) == [0, 2, 4]


def test_diversity_of_a_group_does_not_depend_on_other_groups() -> None:
    hidden = directions(0, 50, 90, 0, 2, 80, 90)
    together = scorer_inputs([[1] * 7], [[2, 3]], [[0, 0, 0, 1, 1, 1, 1]], hidden=hidden)
    scores = DiversityScorer()(together)
    first = DiversityScorer()(scorer_inputs([[1] * 3], [[2]], hidden=hidden[:, :3]))
    second = DiversityScorer()(scorer_inputs([[1] * 4], [[3]], hidden=hidden[:, 3:]))
    assert chosen(scores[:, :3], 2) == chosen(first, 2)
    assert chosen(scores[:, 3:], 3) == chosen(second, 3)


def test_a_reserve_is_evenly_spaced_and_the_rest_are_the_best() -> None:
    """Six of twelve stay, half of them on a grid: every fourth; then the three best of the others."""
    attention = [float(place in (0, 1, 2, 3)) + place / 100 for place in range(12)]
    case = scorer_inputs([[1] * 12], [[6]], attention=looking([attention]))
    assert chosen(GridReserveScorer(AttentionScorer(), 0.5)(case), 6) == sorted([3, 7, 11, 2, 1, 0])
    assert chosen(GridReserveScorer(AttentionScorer(), 1.0)(case), 6) == [1, 3, 5, 7, 9, 11]


def test_a_reserved_token_gives_way_to_one_that_must_stay() -> None:
    """The grid of two in eight is 3 and 7; 5 and 6 must stay, as tokens that predict a label do."""
    case = scorer_inputs([[1] * 8], [[2]], attention=looking([[0.1] * 8]))
    scores = GridReserveScorer(AttentionScorer(), 1.0)(case)
    assert scores[0].topk(2).indices.sort().values.tolist() == [3, 7]
    scores[0, [5, 6]] = float("inf")
    assert select(scores, case.visual, case.groups, case.num_keep)[0].nonzero()[:, 0].tolist() == [5, 6]


def test_a_reserve_of_less_than_a_token_is_none() -> None:
    case = scorer_inputs([[1] * 4], [[1]], attention=looking([[0.4, 0.1, 0.1, 0.1]]))
    assert chosen(GridReserveScorer(AttentionScorer(), 0.9)(case), 1) == [0]


def test_chance_takes_over_at_a_layer() -> None:
    early = scorer_inputs([[1] * 4], [[1]], attention=looking([[0.4, 0.1, 0.2, 0.1]]))
    late = scorer_inputs([[1] * 4], [[1]], layer=5)  # and asks for no attention
    scorer = RandomAfterScorer(AttentionScorer(), 5)
    assert torch.equal(scorer(early), AttentionScorer()(early))
    assert torch.equal(scorer(late), RandomScorer()(late))


def test_chance_costs_nothing_from_its_layer_on() -> None:
    scorer, shape = RandomAfterScorer(AttentionScorer(), 5), PRESETS["llava-1.5-7b"].shape.decoder
    before, at, after = (DropCounts(layer, 100, 64, 32, 1, 10) for layer in (4, 5, 6))
    assert scorer.flops(shape, before) == AttentionScorer().flops(shape, before) > 0
    assert scorer.flops(shape, at) == scorer.flops(shape, after) == 0


def test_what_goes_around_a_scorer_needs_what_it_needs() -> None:
    around = GridReserveScorer(RandomAfterScorer(VariationScorer(), 5), 0.5)
    assert (around.needs_attention, around.needs_previous_hidden) == (False, True)
    assert GridReserveScorer(KeyNormScorer(), 0.5).needs_attention


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_says_its_rule(name: str) -> None:
    scorer = SCORERS[name]()
    assert (scorer.__doc__ or "").endswith((".", "\n    "))
    assert scorer.source or name in ("random", "uniform")
