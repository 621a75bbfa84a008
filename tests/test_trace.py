"""The trace tells the scores by which a stage chose, and shows itself in one line and as a table."""

from __future__ import annotations

import torch

from checks import HALVES, method_of
from pyramiddrop import PyramidDrop
from tiny import make_batch, tiny_model

MIXED = [[5, "image", 7], [3, "image", 2, "image", 1], [9]]


def test_scores_are_the_attention_of_the_ranking_layer() -> None:
    """The first stage ranks in a model from which nothing was dropped yet: the untouched model has the same weights."""
    model = tiny_model(attention="eager")
    inputs = make_batch(model, MIXED)
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[2].mean(1)[:, -1]
        with PyramidDrop(layers=[2], keep=[0.5])(model) as trace:
            model(**inputs)
    scores = trace.stages[0].scores
    assert scores is not None
    assert [len(row) for row in scores] == [16, 32, 0]
    for row, found, columns in zip(weights, scores, trace.visual_columns, strict=True):
        torch.testing.assert_close(found, row[columns])


def test_scores_are_nan_at_tokens_that_were_gone_and_the_best_stayed() -> None:
    model = tiny_model()
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        model(**make_batch(model, MIXED, side="right"))
    before = trace.visual_columns
    for stage in trace.stages:
        assert stage.scores is not None
        for scores, columns, there, kept in zip(stage.scores, trace.visual_columns, before, stage.kept, strict=True):
            assert torch.equal(columns[~scores.isnan()], there)
            best = scores.nan_to_num(-1).topk(len(kept)).indices
            assert torch.equal(columns[best].sort().values, kept)
        before = stage.kept


def test_a_stage_that_drops_nothing_has_no_scores() -> None:
    model = tiny_model()
    with torch.no_grad(), PyramidDrop(layers=[2, 4], keep=[0.5, 0.5])(model) as trace:
        model(**make_batch(model, MIXED))
    assert trace.stages[0].scores is not None
    assert trace.stages[1].scores is None


def test_a_trace_shows_itself_in_one_line_and_as_a_table() -> None:
    model = tiny_model()
    method = PyramidDrop(layers=[2, 4], keep=[0.5, 0.25])
    with torch.no_grad(), method(model) as trace:
        assert repr(trace) == "Trace(no prefill yet)"
        assert "<tr>" not in trace._repr_html_()
        model(**make_batch(model, [[5, "image", 7]]))
    share = f"{100 * trace.cost().flops_ratio:.0f} % of FLOPs"
    assert repr(trace) == f"Trace(16 -> 8 -> 4 visual tokens, {share})"
    table = trace._repr_html_()
    assert "<tr><td>2</td><td>0.5</td><td>8</td></tr><tr><td>4</td><td>0.25</td><td>4</td></tr>" in table
    assert "Trace(16 -&gt; 8 -&gt; 4 visual tokens, " in table
    with torch.no_grad(), method(model) as trace:
        model(**make_batch(model, MIXED))
    assert repr(trace).startswith("Trace(3 samples, 48 -> 24 -> 12 visual tokens, ")
    assert "<td>16</td><td>32</td><td>0</td>" in trace._repr_html_()
