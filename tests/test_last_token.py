"""The short path of the usual prefill, whose last token asks, keeps the rows that the general path keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from checks import EXIT, method_of
from pyramiddrop import FastV, Method, PyramidDrop
from pyramiddrop.hf import dispatch
from pyramiddrop.hf.plan import GeneralPlan, LastTokenPlan, Plan, make_plan, plan_last_token
from pyramiddrop.hf.prompt_masks import Prompt, read_prompt_masks
from pyramiddrop.hf.ranking import LastTokenRanking, active_rows, select_rows
from pyramiddrop.hf.rows import Selection
from pyramiddrop.schedule import Schedule
from reference import Rule
from tiny import make_batch, text_model, tiny_model

HALVES = Rule([2, 4, 6], [0.5, 0.25, 0.125])
FEW = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def prompt_of(visual: Tensor) -> Prompt:
    return Prompt({}, (visual.shape[0], visual.shape[1]), 0, visual, None, None, None, None, 0)


def general(prompt: Prompt, schedule: Schedule) -> GeneralPlan:
    return make_plan(read_prompt_masks(prompt, None, False, "sample"), schedule)  # type: ignore[arg-type]


@st.composite
def visual_masks(draw: st.DrawFn) -> Tensor:
    """(B, L) bool with as many True in each row, anywhere but at the end."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    count = draw(st.integers(1, length - 1))
    rows = [draw(st.permutations(range(length - 1)))[:count] for _ in range(batch)]
    mask = torch.zeros(batch, length, dtype=torch.bool)
    return mask.scatter(1, torch.tensor(rows), True)


ratios = st.lists(st.sampled_from([1.0, 0.7, 0.5, 0.29, 0.1]), min_size=1, max_size=3)


@FEW
@given(visual_masks(), ratios, st.booleans(), st.integers(0, 1000))
def test_both_paths_keep_the_same_rows(visual: Tensor, keep: list[float], leaves: bool, seed: int) -> None:
    """With scores of few values, infinities and NaN, so that ties decide; some schedules end in an early exit."""
    shares = [*sorted(keep, reverse=True)[:-1], 0.0 if leaves else min(keep)]
    schedule = Schedule.of(range(1, len(keep) + 1), shares)
    prompt = prompt_of(visual)
    short, whole = plan_last_token(prompt, schedule), general(prompt, schedule)
    assert short is not None
    assert (short.drops, short.drop_counts, short.reach) == (whole.drops, whole.drop_counts, whole.reach)
    assert [own.tolist() for own in short.visual_columns] == [own.tolist() for own in whole.visual_columns]
    ranking, kept = LastTokenRanking(short, None), None  # type: ignore[arg-type]
    values = torch.tensor([0.0, 1.0, 2.0, float("inf"), float("-inf"), float("nan")])
    generator = torch.Generator().manual_seed(seed)
    for drop, planned in enumerate(short.drops):
        rows, _, candidates = active = active_rows(whole, kept)
        scores = values[torch.randint(0, len(values), rows.shape, generator=generator)]
        expected = select_rows(whole, drop, active, scores)
        if not planned.happens:
            continue
        found = ranking.choose(drop, kept, scores[candidates].view(len(rows), -1))
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.index, expected.index)
        assert found.valid is expected.valid is None
        kept = found


UNUSUAL: dict[str, dict[str, Any]] = {
    "padding": {"valid": torch.tensor([[False, True, True, True]])},
    "several documents": {"documents": torch.tensor([[0, 0, 1, 1]])},
    "labels": {"labels": torch.tensor([[False, False, False, True]])},
    "a query mask": {"query": torch.tensor([[False, False, True, False]])},
    "a cache": {"past": 3},
    "candidates": {"candidates": 1},
    "a visual token that asks": {"visual": torch.tensor([[False, True, True, True]])},
    "no visual token": {"visual": torch.zeros(1, 4, dtype=torch.bool)},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_other_prefills_are_planned_in_general(name: str) -> None:
    usual = prompt_of(torch.tensor([[False, True, True, False]]))
    assert plan_last_token(usual, Schedule.of([2], [0.5])) is not None
    assert plan_last_token(Prompt(**(vars(usual) | UNUSUAL[name])), Schedule.of([2], [0.5])) is None


def test_samples_with_more_and_fewer_visual_tokens_are_planned_in_general() -> None:
    visual = torch.tensor([[True, True, False, False], [True, False, False, False]])
    assert plan_last_token(prompt_of(visual), Schedule.of([2], [0.5])) is None


# --- With a model -----------------------------------------------------------------------------------------------------


@contextmanager
def plans_made(monkeypatch: pytest.MonkeyPatch, in_general: bool = False) -> Iterator[list[Plan | None]]:
    """The plans of usual prefills that are made in the block; `in_general`: none, so that all go the general way."""
    made: list[Plan | None] = []
    own = dispatch.plan_last_token

    def plan(*given: Any) -> LastTokenPlan | None:
        made.append(None if in_general else own(*given))
        return made[-1]  # type: ignore[return-value]

    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "plan_last_token", plan)
        yield made


METHODS: list[Method] = [
    method_of(HALVES),
    method_of(Rule([2, 4, 6], [0.5, 0.25, 0.125], "compact", "next", False)),
    method_of(Rule([2, 4, 6], [0.5, 0.25, 0.125], "original", "last", False)),
    method_of(Rule([2, 4, 6], [1.0, 0.5, 0.5])),
    FastV(layer=2, keep=0.3),
    method_of(EXIT),
]
SPECS: list[list[list[Any]]] = [
    [[3, "image", 6]],
    [["image", 2, "image", 5]],
    [[3, "image", 6], [5, "image", 4]],
]


@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_model_runs_alike_on_both_paths(
    method: Method, specs: list[list[Any]], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llava-gqa", attention)
    inputs = make_batch(model, specs)
    found = []
    for in_general in (False, True):
        with plans_made(monkeypatch, in_general) as made, method(model) as trace:
            logits = model(**inputs).logits
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert [plan is None for plan in made] == [in_general] * 2
        kept = [[columns.tolist() for columns in stage.kept] for stage in trace.stages]
        scores = [stage.scores and torch.stack(stage.scores) for stage in trace.stages]
        found.append((logits, ids, kept, scores, trace.lengths, trace.cost()))
    (short, ids, kept, scores, *rest), (whole, *general_ids, general_scores, lengths, cost) = found
    assert [ids.tolist(), kept] == [general_ids[0].tolist(), general_ids[1]]
    assert rest == [lengths, cost]
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-5)
    for own, other in zip(scores, general_scores, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, equal_nan=True)


def test_embeddings_and_training_take_the_path_that_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    model: PreTrainedModel = tiny_model("llava-gqa")
    text = text_model(model)
    visual = torch.zeros(1, 12, dtype=torch.bool)
    visual[0, 3:9] = True
    with (
        plans_made(monkeypatch) as made,
        torch.no_grad(),
        PyramidDrop(layers=[2], keep=[0.5])(text, visual_mask=visual),
    ):
        text(inputs_embeds=torch.randn(1, 12, 64))
        text(inputs_embeds=torch.randn(1, 12, 64), attention_mask=torch.ones(1, 12))
        assert all(isinstance(plan, LastTokenPlan) for plan in made)
        assert len(made) == 2
        text.train()
        with pytest.warns(UserWarning, match="no token asks"):
            text(inputs_embeds=torch.randn(1, 12, 64))
        assert len(made) == 2


def test_a_selection_is_known_by_itself() -> None:
    """It stands in keys of tables: two of the same rows are two."""
    rows = torch.arange(3)[None]
    assert Selection(rows, rows, None) != Selection(rows, rows, None)
