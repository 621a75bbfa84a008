"""Scorers on numbers small enough to check by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyramiddrop.scoring import Evidence, RandomScorer, UniformScorer, attention_received


def evidence(visual: list[list[int]], quota: list[list[int]], groups: list[list[int]] | None = None) -> Evidence:
    mask = torch.tensor(visual).bool()

    def no_attention() -> Tensor:
        raise AssertionError("this scorer must not ask for attention")

    return Evidence(
        visual=mask,
        ordinal=(mask.long().cumsum(1) - 1).clamp(min=0),
        groups=torch.zeros_like(mask, dtype=torch.long) if groups is None else torch.tensor(groups),
        quota=torch.tensor(quota),
        hidden=torch.zeros(*mask.shape, 2),
        attention=no_attention,
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
    scores = UniformScorer()(evidence([[0, *[1] * tokens, 0]], [[kept]]))[0, 1:-1]
    chosen = scores.nonzero()[:, 0]
    gaps = chosen.diff()
    assert len(chosen) == kept
    assert kept == 1 or gaps.max() - gaps.min() <= 1


def test_uniform_spaces_each_group_on_its_own() -> None:
    case = evidence([[1, 1, 1, 1, 0, 1, 1]], [[2, 1]], groups=[[0, 0, 0, 0, 0, 1, 1]])
    scores = UniformScorer()(case) * case.visual
    assert scores.tolist() == [[0, 1, 0, 1, 0, 0, 1]]


def test_random_is_reproducible_and_does_not_depend_on_the_batch() -> None:
    alone = RandomScorer(3)(evidence([[1, 1, 1, 1]], [[2]]))
    padded = RandomScorer(3)(evidence([[0, 0, 1, 1, 1, 1], [1] * 6], [[2], [3]]))
    assert torch.equal(alone[0], padded[0, 2:])
    assert not torch.equal(alone, RandomScorer(4)(evidence([[1, 1, 1, 1]], [[2]])))


def test_random_without_a_seed_draws_anew() -> None:
    case = evidence([[1] * 32], [[2]])
    assert not torch.equal(RandomScorer(None)(case), RandomScorer(None)(case))


def test_random_is_uniform_over_seeds() -> None:
    case = evidence([[1] * 16], [[4]])
    chosen = torch.stack([RandomScorer(seed)(case)[0].topk(4).indices for seed in range(2000)])
    share = torch.bincount(chosen.flatten(), minlength=16) / 2000
    assert (share - 0.25).abs().max() < 0.05
