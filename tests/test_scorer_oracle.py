"""The scorers and options in a model: each against its own plain loops, batch against single, and beside each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import scorer_oracle
from pyramiddrop import FastV, PyramidDrop
from pyramiddrop.hf.versions import cache_argument, output_cache
from pyramiddrop.scoring import SCORERS
from reference import Rule
from scorer_oracle import Look, looks
from tiny import Answer, collate, make_batch, make_rows, tiny_model

LAYERS, KEEP = [2, 3, 6], [0.6, 0.4, 0.2]
SPECS = [[5, "image", 7], [3, "image", 2, "image", 4]]
SCORES = [name for name in SCORERS if name not in ("random", "uniform", "vision")]


def staged(**settings: Any) -> PyramidDrop:
    return PyramidDrop(layers=LAYERS, keep=KEEP, **settings)


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("family", ["llava", "llava-qwen3"])
@pytest.mark.parametrize("score", scorer_oracle.SCORES)
def test_a_score_is_what_its_rule_says(score: str, family: str, per_image: bool) -> None:
    model = tiny_model(family)
    for look, scores, _ in looks(model, staged(score=score, per_image=per_image), make_batch(model, SPECS)):
        expected = torch.tensor(scorer_oracle.SCORES[score](look), dtype=torch.float32)
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("score", ["attention", "rope_free"])
def test_a_rotation_that_also_scales_scales_without_rotation_too(score: str) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, "rope_theta": 10000.0}
    model = tiny_model(rope_parameters=rope)
    assert model.model.language_model.rotary_emb.attention_scaling == 1.7
    for look, scores, _ in looks(model, staged(score=score), make_batch(model, SPECS)):
        expected = torch.tensor(scorer_oracle.SCORES[score](look), dtype=torch.float32)
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("per_image", [False, True])
def test_diversity_chooses_the_farthest_from_those_it_has(per_image: bool) -> None:
    model = tiny_model()
    for look, _, kept in looks(model, staged(score="diversity", per_image=per_image), make_batch(model, SPECS)):
        assert set(kept.tolist()) == scorer_oracle.diversity(look)


def test_the_layer_before_ranks_for_rank_layer_last() -> None:
    """Also where that layer starts a stage itself: layer 2 ranks for the drop before layer 3, on the rows it has."""
    model = tiny_model()
    inputs = make_batch(model, SPECS)
    with torch.no_grad(), staged(score="variation", rank_layer="last")(model) as trace:
        model(**inputs)
    case = reference.inference_case(model, inputs)
    with torch.no_grad():
        result = reference.run(model, Rule(LAYERS, KEEP), case, forced=[stage.kept for stage in trace.stages])
    stage = trace.stages[1]
    assert stage.scores is not None
    for sample, scores in enumerate(stage.scores):
        there = [int(c) for c in trace.visual_columns[sample] if result.alive[2][sample, c]]
        expected = scorer_oracle.variation(Look(model, case, result, 2, sample, there, [], {}))
        torch.testing.assert_close(scores[~scores.isnan()], torch.tensor(expected), atol=2e-5, rtol=1e-4)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("score", SCORES)
def test_a_sample_does_not_depend_on_its_batch_or_its_padding(score: str) -> None:
    model = tiny_model("llava-gqa")
    method = staged(score=score, reserve=0.3, merge=True)
    rows = make_rows(model, SPECS)
    for side in ("left", "right"):
        with torch.no_grad(), method(model) as trace:
            model(**collate(rows, side))
        starts = [columns[0] for columns in trace.visual_columns]
        for number, row in enumerate(rows):
            with torch.no_grad(), method(model) as single:
                model(**collate([row]))
            for stage, alone in zip(trace.stages, single.stages, strict=True):
                kept, expected = stage.kept[number] - starts[number], alone.kept[0] - single.visual_columns[0][0]
                assert kept.tolist() == expected.tolist()


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("score", SCORES)
def test_keep_one_changes_no_bit(score: str) -> None:
    model = tiny_model()
    inputs = make_batch(model, SPECS)
    method = PyramidDrop(layers=LAYERS, keep=[1.0] * 3, score=score, reserve=0.5, merge=True, random_from=6)
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with method(model):
            assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("score", SCORES)
def test_training_ranks_by_every_score_and_gradients_flow(score: str) -> None:
    model = tiny_model().train()
    inputs = make_batch(model, [[5, "image", 4, Answer(3), 2, Answer(2)], [2, "image", 3, Answer(4)]], labels=True)
    with staged(score=score, merge=True)(model) as trace:
        model(**inputs).loss.backward()
    assert all(len(stage.kept[0]) == reference.num_keep(16, stage.keep) for stage in trace.stages)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_a_token_that_predicts_an_answer_stays_whatever_is_reserved() -> None:
    """Of 32 tokens 9 stay, all on a grid that has neither the first image's last token nor the token before it."""
    model = tiny_model()
    inputs = make_batch(model, [[2, "image", Answer(2), "image", 4, Answer(1)]], labels=True)
    with torch.no_grad(), PyramidDrop(layers=[2], keep=[0.3], reserve=1.0)(model) as trace:
        model(**inputs)
    kept = trace.stages[0].kept[0].tolist()
    assert len(kept) == 9
    assert 2 + 15 in kept


def test_in_training_the_instruction_is_the_text_without_the_answers() -> None:
    """One image, then 4 tokens, an answer of 3, 2 tokens, an answer of 2: who asks is those 6 tokens."""
    model = tiny_model(attention="eager")
    row = [5, "image", 4, Answer(3), 2, Answer(2)]
    inputs = make_batch(model, [row], labels=True)
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[2][0].mean(0)
        with PyramidDrop(layers=[2], keep=[0.5], score="instruction")(model) as trace:
            model(**inputs)
    asking = [21, 22, 23, 24, 28, 29]
    assert trace.stages[0].scores is not None
    torch.testing.assert_close(trace.stages[0].scores[0], weights[asking][:, 5:21].mean(0))


def test_a_prompt_that_ends_with_its_image_has_no_instruction_but_its_last_token() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[6, "image"]])
    kept = []
    for score in ("attention", "instruction"):
        with torch.no_grad(), staged(score=score)(model) as trace:
            model(**inputs)
        kept.append([stage.kept[0].tolist() for stage in trace.stages])
    assert kept[0] == kept[1]


def test_the_instruction_ends_with_the_token_that_asks() -> None:
    """Five tokens, an image, seven tokens of which the third asks: the first three of them are the instruction."""
    model = tiny_model(attention="eager")
    inputs = make_batch(model, [[5, "image", 7]])
    asks = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    asks[0, 23] = True
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[2][0].mean(0)
        with PyramidDrop(layers=[2], keep=[0.5], score="instruction")(model, query_mask=asks) as trace:
            model(**inputs)
    assert trace.stages[0].scores is not None
    torch.testing.assert_close(trace.stages[0].scores[0], weights[[21, 22, 23], 5:21].mean(0))


def test_a_further_image_on_a_cache_is_refused_without_rotation() -> None:
    model = tiny_model()
    first, second = make_batch(model, [[5, "image", 7]]), make_batch(model, [[3, "image", 4]], seed=2)
    with torch.no_grad(), staged(score="rope_free")(model):
        cache = output_cache(model(**first, use_cache=True))
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        with pytest.raises(ValueError, match="score='rope_free' cannot rank a further image on top of a cache"):
            model(**(second | {"attention_mask": mask}), **cache_argument(cache))


# --- Options --------------------------------------------------------------------------------------------------------


def test_half_of_what_stays_is_a_grid_and_the_rest_the_best_of_the_others() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    with torch.no_grad(), PyramidDrop(layers=[2], keep=[0.5])(model) as plain:
        model(**inputs)
    with torch.no_grad(), PyramidDrop(layers=[2], keep=[0.5], reserve=0.5)(model) as mixed:
        model(**inputs)
    grid = [3, 7, 11, 15]  # 4 of 16
    assert plain.stages[0].scores is not None
    others = [(-float(score), place) for place, score in enumerate(plain.stages[0].scores[0]) if place not in grid]
    best = [place for _, place in sorted(others)[:4]]
    assert (mixed.stages[0].kept[0] - 5).tolist() == sorted(grid + best)


def test_chance_chooses_from_a_layer_on() -> None:
    model = tiny_model()
    inputs = make_batch(model, SPECS)
    traces = []
    for method in (staged(), staged(random_from=3), staged(score="random")):
        with torch.no_grad(), method(model) as trace:
            model(**inputs)
        traces.append(trace)
    ranked, late, drawn = traces
    assert torch.equal(late.stages[0].kept[0], ranked.stages[0].kept[0])
    assert not torch.equal(late.stages[1].kept[0], ranked.stages[1].kept[0])
    for late_stage, drawn_stage in zip(late.stages[1:], drawn.stages[1:], strict=True):
        by_chance, throughout = late_stage.scores[1], drawn_stage.scores[1]
        there = ~(by_chance.isnan() | throughout.isnan())
        assert there.any()
        assert torch.equal(by_chance[there], throughout[there])
    assert late.cost().flops < ranked.cost().flops


def merged_by_hand(model: Any, inputs: dict[str, Tensor], kept: list[Tensor]) -> Tensor:
    """Logits of one sample whose dropped tokens are averaged into the kept ones, token by token."""
    text = model.model.language_model
    hidden = reference.embed(model, **inputs)[0]
    columns = list(range(len(hidden)))
    rows = {c: hidden[c] for c in columns}
    sizes = dict.fromkeys(columns, 1)
    visual = [c for c in columns if inputs["input_ids"][0, c] == model.config.image_token_id]
    for number, layer in enumerate(text.layers):
        if number in LAYERS:
            stays = kept[LAYERS.index(number)].tolist()
            parts = {c: [(rows[c], sizes[c])] for c in stays}
            for c in [c for c in visual if c in rows and c not in stays]:
                target = max(stays, key=lambda s: float(torch.cosine_similarity(rows[c], rows[s], dim=0)))
                parts[target].append((rows[c], sizes[c]))
                del rows[c]
            for c, these in parts.items():
                sizes[c] = sum(size for _, size in these)
                rows[c] = sum(row * size for row, size in these) / sizes[c]
        there = sorted(rows)
        states = torch.stack([rows[c] for c in there])[None]
        ids = torch.tensor([there])
        mask = torch.full((len(there), len(there)), float("-inf")).triu(1)[None, None]
        output = layer(states, attention_mask=mask, position_ids=ids, position_embeddings=text.rotary_emb(states, ids))
        rows = dict(zip(there, output[0], strict=True))
    return model.lm_head(text.norm(rows[max(rows)]))


@torch.no_grad()
def test_merging_averages_what_goes_into_what_is_most_like_it() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 3, "image", 7]])
    with staged(merge=True)(model) as trace:
        logits = model(**inputs).logits[0, -1]
    expected = merged_by_hand(model, inputs, [stage.kept[0] for stage in trace.stages])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    with staged()(model):
        assert not torch.allclose(logits, model(**inputs).logits[0, -1], atol=1e-3)


def test_merging_a_batch_is_merging_each_sample() -> None:
    model = tiny_model()
    rows = make_rows(model, SPECS)
    with torch.no_grad(), staged(merge=True, per_image=True)(model):
        together = model(**collate(rows)).logits[:, -1]
        alone = torch.cat([model(**collate([row])).logits[:, -1] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_checkpointing_gives_the_same_gradients_of_a_merged_model() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = make_batch(model, [[5, "image", 4, Answer(3)], [2, "image", 3, Answer(4)]], labels=True)
        with staged(score="variation", merge=True)(model):
            model(**inputs).loss.backward()
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_every_score_goes_with_fastv_and_generates() -> None:
    model = tiny_model()
    inputs = make_batch(model, SPECS)
    for score in SCORES:
        with FastV(layer=2, keep=0.5, score=score)(model) as trace:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert [len(kept) for kept in trace.stages[0].kept] == [8, 16]
