"""Inference held against the slow reference: prompts, caches, every way to generate, further turns."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import reference
from checks import (
    CLOSE,
    COMPACT,
    EXIT,
    HALVES,
    LAST,
    UNEVEN,
    check_kept,
    check_logits,
    check_trace,
    generated,
    method_of,
    new_tokens,
    stacked,
)
from pyramiddrop.hf.generation import Generation
from pyramiddrop.hf.versions import cache_argument, output_cache
from reference import Case, Rule, Turn
from tiny import FAMILIES, IMAGE_TOKEN, IMPLEMENTATIONS, Row, collate, make_batch, make_rows, text_model, tiny_model

MIXED = [[5, "image", 7], [3, "image", 2, "image", 1], [9]]
LONG_TEXT = [[5, "image", 7], [60], [3, "image", 4]]  # the text-only row keeps the rectangle from shrinking
ONE_EACH = [[5, "image", 7], [3, "image", 3], [9]]
WITH_IMAGES = [[5, "image", 7], [3, "image", 2, "image", 4]]
# Transformers before 5.11 fails without an end; this one never comes.
LOOKUP: dict[str, Any] = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1, "eos_token_id": 1000}
RULES = {"original": HALVES, "compact": COMPACT, "uneven": UNEVEN, "last": LAST, "exit": EXIT}


def check_prefill(model: PreTrainedModel, rule: Rule, inputs: dict[str, Tensor], **options: Any) -> None:
    expected = reference.prefill(model, rule, inputs)
    with torch.no_grad(), method_of(rule)(model) as trace:
        output = model(**inputs, **options)
    check_trace(trace, expected, rule)
    check_logits(output.logits, expected)


# --- One forward pass -----------------------------------------------------------------------------------------------


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill(family: str, attention: str, rule: str) -> None:
    model = tiny_model(family, attention)
    check_prefill(model, RULES[rule], make_batch(model, [[5, "image", 7]]))
    check_prefill(model, RULES[rule], make_batch(model, MIXED, "left"))


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    "specs", [MIXED, LONG_TEXT, [[2, "image"], ["image", 1], ["image"]], [[4, "image", "image", 3]]]
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_prefill_of_a_padded_batch(attention: str, side: str, specs: list) -> None:
    model = tiny_model("llava-gqa", attention)
    check_prefill(model, HALVES, make_batch(model, specs, side))
    check_prefill(model, COMPACT, make_batch(model, specs, side))


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_prefill_without_a_cache_or_a_mask(attention: str) -> None:
    model = tiny_model("llava", attention)
    inputs = make_batch(model, [[5, "image", 7]])
    check_prefill(model, HALVES, inputs, use_cache=False)
    del inputs["attention_mask"]
    check_prefill(model, HALVES, inputs)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    check_prefill(model, COMPACT, inputs, position_ids=positions)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("specs", [MIXED, LONG_TEXT])
@pytest.mark.parametrize("family", ["llava", "next"])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_mates(family: str, specs: list, side: str) -> None:
    model = tiny_model(family)
    rows = make_rows(model, specs)
    batch = collate(rows, side)
    with method_of(HALVES)(model) as trace:
        together = model(**batch).logits
        kept_together = [[columns.tolist() for columns in stage.kept] for stage in trace.stages]
        for b, row in enumerate(rows):
            alone = model(**collate([row])).logits[0]
            offset = batch["input_ids"].shape[1] - len(row.ids) if side == "left" else 0
            for stage, kept in zip(trace.stages, kept_together, strict=True):
                assert [column + offset for column in stage.kept[0].tolist()] == kept[b]
            torch.testing.assert_close(together[b, offset : offset + len(row.ids)], alone, **CLOSE)


def test_the_longest_row_sets_the_lengths() -> None:
    model = tiny_model()
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        model(**make_batch(model, WITH_IMAGES))  # 28 and 41 columns, 16 and 32 of them visual
        assert trace.lengths == [41, 41, 25, 25, 17, 17, 14, 14]
        assert trace.visual_tokens == [16, 32]
        assert [columns.tolist() for columns in trace.visual_columns] == [
            list(range(18, 34)),
            [*range(3, 19), *range(21, 37)],
        ]
        model(**make_batch(model, LONG_TEXT))
        assert trace.lengths == [60] * 8
        model(**make_batch(model, [[5, "image", 7]]))
        assert trace.lengths == [28, 28, 20, 20, 16, 16, 14, 14]
        cost = trace.cost()
    assert cost.flops < cost.vanilla_flops
    assert cost.kv_ratio == pytest.approx(sum(trace.lengths) / (8 * 28))


@pytest.mark.parametrize("keep", [0.5, 0.01])
@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_a_few_visual_tokens(count: int, keep: float) -> None:
    """At least one visual token stays, of however few."""
    model = tiny_model()
    rule = Rule([2, 4], [keep, keep])
    embeds = reference.embed(model, **make_batch(model, [[2, "image", 2]]))[:, [0, 1, *range(2, 2 + count), 18, 19]]
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, 2 : 2 + count] = True
    last = embeds.shape[1] - 1
    expected = reference.run(model, rule, Case(embeds, torch.ones_like(visual), visual, [Turn(0, last + 1, [[last]])]))
    with method_of(rule)(model, visual_mask=visual) as trace:
        output = model(inputs_embeds=embeds)
    check_trace(trace, expected, rule)
    check_logits(output.logits, expected)
    assert len(trace.stages[-1].kept[0]) == 1


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_text_only_call_is_untouched(attention: str, side: str) -> None:
    model = tiny_model("llava", attention)
    inputs = make_batch(model, [[12], [9]], side)
    vanilla = model(**inputs, output_hidden_states=True)
    tokens = generated(model, inputs, 4)
    with method_of(HALVES)(model):
        patched = model(**inputs, output_hidden_states=True)
        patched_tokens = generated(model, inputs, 4)
    assert torch.equal(patched.logits, vanilla.logits)
    assert all(torch.equal(a, b) for a, b in zip(patched.hidden_states, vanilla.hidden_states, strict=True))
    assert torch.equal(patched_tokens.sequences, tokens.sequences)
    assert all(torch.equal(a, b) for a, b in zip(patched_tokens.logits, tokens.logits, strict=True))


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_ways_to_call(attention: str) -> None:
    """By position, as a tuple, with a prepared mask, and the model without its head: all the same prefill."""
    model = tiny_model("llava", attention)
    inputs = make_batch(model, MIXED, "right")
    expected = reference.prefill(model, HALVES, inputs)
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    seen = torch.ones(38, 38, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with method_of(HALVES)(model) as trace:
        results = [
            model(ids, pixels, mask).logits,
            model(**inputs, return_dict=False)[0],
            model(**inputs | {"attention_mask": added}).logits,
            model.lm_head(model.model(**inputs).last_hidden_state),
        ]
        if attention == "sdpa":
            results.append(model(**inputs | {"attention_mask": seen}).logits)
        for logits in results:
            check_logits(logits, expected)
        check_trace(trace, expected, HALVES)


# --- What the caller asks to see ------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_to_keep() -> None:
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    with method_of(HALVES)(model):
        full = model(**inputs).logits
        assert full.shape[:2] == inputs["input_ids"].shape
        for wanted in (1, 3, torch.tensor([0, 2, 37])):
            some = model(**inputs, logits_to_keep=wanted).logits
            expected = full[:, wanted] if isinstance(wanted, Tensor) else full[:, -wanted:]
            torch.testing.assert_close(some, expected, **CLOSE)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_hidden_states_come_back_at_full_length(attention: str) -> None:
    model = tiny_model("llava", attention)
    inputs = make_batch(model, MIXED)
    expected = reference.prefill(model, HALVES, inputs)
    with method_of(HALVES)(model):
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 9
    for number in range(8):
        state, alive = states[number], expected.alive[number]
        assert state.shape == expected.hidden[number].shape
        torch.testing.assert_close(state[alive], expected.hidden[number][alive], **CLOSE)
        visual = inputs["input_ids"] == IMAGE_TOKEN
        dropped = visual & ~expected.alive[max(number - 1, 0)]
        assert not state[dropped].any()
    visual_dropped = (inputs["input_ids"] == IMAGE_TOKEN) & ~expected.alive[-1]
    assert visual_dropped.any()
    assert not states[8][visual_dropped].any()


@torch.no_grad()
def test_attentions_under_eager() -> None:
    """Each layer's probabilities, over the rows that it computed on."""
    model = tiny_model("llava", "eager")
    inputs = make_batch(model, [[5, "image", 7]])
    expected = reference.prefill(model, HALVES, inputs)
    text = text_model(model)
    with method_of(HALVES)(model) as trace:
        attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 8
    with reference.eager(text):
        for number, (layer, attention) in enumerate(zip(text.layers, attentions, strict=True)):
            alive = expected.alive[number]
            valid = torch.ones_like(alive)
            probabilities, _ = reference.run_layer(text, layer, expected.hidden[number], alive, valid, "original")
            rows = alive[0].nonzero()[:, 0]
            among_alive = probabilities[:, :, rows][:, :, :, rows]
            assert attention.shape[-1] in (trace.lengths[number], trace.lengths[0])
            if attention.shape[-1] == trace.lengths[0]:
                attention = attention[:, :, rows][:, :, :, rows]
            torch.testing.assert_close(attention, among_alive, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_half_precision(attention: str, dtype: torch.dtype) -> None:
    model = tiny_model("llava-gqa", attention).to(dtype)
    inputs = make_batch(model, MIXED)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with method_of(HALVES)(model) as trace:
        output = model(**inputs)
        tokens = generated(model, inputs, 3)
    assert output.logits.dtype == dtype
    assert output.logits[inputs["attention_mask"].bool()].isfinite().all()
    assert all(logits.isfinite().all() for logits in tokens.logits)
    assert [len(columns) for columns in trace.stages[0].kept] == [8, 16, 0]


# --- Generation -----------------------------------------------------------------------------------------------------


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("rule", ["original", "compact", "last"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["llava-gqa", "next"])
def test_greedy(family: str, attention: str, rule: str) -> None:
    model = tiny_model(family, attention)
    for specs in ([[5, "image", 7]], MIXED, LONG_TEXT):
        check_greedy(model, RULES[rule], make_batch(model, specs), steps=4)


def check_greedy(model: PreTrainedModel, rule: Rule, inputs: dict[str, Tensor], steps: int, **options: Any) -> Any:
    expected = reference.greedy(model, rule, inputs, steps)
    with method_of(rule)(model) as trace:
        output = generated(model, inputs, steps, **options)
    assert expected.first is not None
    check_trace(trace, expected.first, rule)
    assert new_tokens(output, inputs) == stacked(expected.tokens)
    for logits, wanted in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, **CLOSE)
    return output


@pytest.mark.parametrize("family", ["llava-mistral", "llava-qwen2", "llava-qwen3"])
def test_greedy_on_other_text_models(family: str) -> None:
    model = tiny_model(family)
    check_greedy(model, HALVES, make_batch(model, MIXED), steps=4)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("rule", ["original", "compact", "uneven", "last", "exit"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_greedy_without_a_cache(attention: str, rule: str) -> None:
    model = tiny_model("llava", attention)
    check_greedy(model, RULES[rule], make_batch(model, MIXED), steps=4, use_cache=False)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("rule", ["original", "compact", "uneven", "exit"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_greedy_on_a_static_cache(attention: str, rule: str) -> None:
    model = tiny_model("llava-gqa", attention)
    for specs in ([[5, "image", 7]], MIXED, LONG_TEXT):
        check_greedy(model, RULES[rule], make_batch(model, specs), steps=4, cache_implementation="static")


def test_later_layers_hold_fewer_keys() -> None:
    model = tiny_model()
    inputs = make_batch(model, WITH_IMAGES)
    output = check_greedy(model, HALVES, inputs, steps=4)
    held = [layer.keys.shape[-2] for layer in output_cache(output).layers]
    assert held == [length + 3 for length in (41, 41, 25, 25, 17, 17, 14, 14)]
    assert output_cache(output).get_seq_length() == 41 + 3


@torch.no_grad()
def test_a_static_cache_can_be_reset() -> None:
    model = tiny_model()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
    first, second = make_batch(model, [[5, "image", 7], [9]]), make_batch(model, [[3, "image", 2, "image", 4], [30]])
    for inputs in (first, second, make_batch(model, [[12], [8]]), first):
        cache.reset()
        check_greedy_tokens(model, inputs, **cache_argument(cache))


def check_greedy_tokens(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> None:
    expected = reference.greedy(model, HALVES, inputs, steps=3)
    with method_of(HALVES)(model):
        output = generated(model, inputs, 3, **options)
    assert new_tokens(output, inputs) == stacked(expected.tokens)
    torch.testing.assert_close(output.logits[-1], expected.logits[-1], **CLOSE)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_decoding_by_hand(attention: str, positions: str) -> None:
    """Forward calls of the user's own, without `generate`: one token, then two at once, then an image id as text."""
    model = tiny_model("llava", attention)
    rule = Rule(HALVES.layers, HALVES.keep, positions)
    inputs = make_batch(model, MIXED)
    steps = [
        torch.tensor(ids) for ids in ([[11], [12], [13]], [[21, 31], [22, 32], [23, 33]], [[IMAGE_TOKEN], [4], [5]])
    ]
    talk = reference.Talk(reference.inference_case(model, inputs))
    expected = []
    for tokens in steps:
        talk.append(model.get_input_embeddings()(tokens))
        expected.append(reference.run(model, rule, talk.case).logits[:, -tokens.shape[1] :])

    cache = DynamicCache(config=model.config.get_text_config())
    mask = inputs["attention_mask"]
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with method_of(rule)(model) as trace:
        model(**inputs, position_ids=places, **cache_argument(cache), use_cache=True)
        lengths = list(trace.lengths)
        for tokens, wanted in zip(steps, expected, strict=True):
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            places = (mask.cumsum(dim=1) - 1)[:, -tokens.shape[1] :]
            output = model(input_ids=tokens, attention_mask=mask, position_ids=places, **cache_argument(cache))
            torch.testing.assert_close(output.logits, wanted, **CLOSE)
            assert trace.lengths == lengths, "the trace holds the prefill, not the last step"


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("specs", [ONE_EACH, MIXED])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_beam_search(attention: str, specs: list) -> None:
    model = tiny_model("llava", attention)
    rows = make_rows(model, specs)
    inputs = collate(rows)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    vanilla = [generated(model, inputs, 4, use_cache=cache, **options).sequences_scores for cache in (True, False)]
    if not torch.allclose(*vanilla, atol=1e-4):
        pytest.skip("older Transformers hand the images of a row to the wrong beams")
    with method_of(HALVES)(model):
        cached = generated(model, inputs, 4, **options)
        uncached = generated(model, inputs, 4, use_cache=False, **options)
        static = generated(model, inputs, 4, cache_implementation="static", **options)
        alone = [generated(model, collate([row]), 4, **options) for row in rows]
    for other in (uncached, static):
        assert other.sequences.tolist() == cached.sequences.tolist()
        torch.testing.assert_close(other.sequences_scores, cached.sequences_scores, **CLOSE)
    singles = [tokens for output, row in zip(alone, rows, strict=True) for tokens in new_tokens(output, collate([row]))]
    assert singles == new_tokens(cached, inputs)
    torch.testing.assert_close(
        torch.cat([output.sequences_scores for output in alone]), cached.sequences_scores, **CLOSE
    )
    check_beam_score(model, inputs, cached)


def check_beam_score(model: PreTrainedModel, inputs: dict[str, Tensor], output: Any) -> None:
    """The best beam's score is the reference's mean log probability of its tokens."""
    case = reference.inference_case(model, inputs)
    best = output.sequences[::2, -4:]
    talk = reference.Talk(case)
    talk.append(model.get_input_embeddings()(best))
    with torch.no_grad():
        logits = reference.run(model, HALVES, talk.case).logits[:, -5:-1].log_softmax(dim=-1)
    scores = logits.gather(2, best[:, :, None])[:, :, 0].mean(dim=1)
    torch.testing.assert_close(output.sequences_scores[::2], scores, **CLOSE)


def test_sampling() -> None:
    model = tiny_model()
    inputs = make_batch(model, ONE_EACH)
    outputs = []
    with method_of(HALVES)(model):
        for options in ({}, {}, {"use_cache": False}, {"cache_implementation": "static"}):
            torch.manual_seed(5)
            options = {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2} | options
            outputs.append(generated(model, inputs, 4, **options).sequences.tolist())
        torch.manual_seed(6)
        other = generated(model, inputs, 4, do_sample=True, num_return_sequences=2).sequences.tolist()
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    assert other != outputs[0]
    assert len(outputs[0]) == 6
    assert outputs[0][0] != outputs[0][1]


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("rule", ["original", "compact"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_prompt_lookup(attention: str, rule: str) -> None:
    """Several guessed tokens at once, image ids among them, most of them taken back."""
    model = tiny_model("llava-gqa", attention)
    [row] = make_rows(model, [[5, "image", 7]])
    probe = reference.greedy(model, RULES[rule], collate([row]), steps=2)
    # The prompt repeats what the model is likely to say, followed by other text or by the image.
    said = [int(tokens[0]) for tokens in probe.tokens]
    row = Row([*said, 17, *row.ids[:4], said[0], *row.ids[5:], 3, 3], [], row.pixels, row.sizes)
    inputs = collate([row])
    widths: list[int] = []
    handle = text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    expected = reference.greedy(model, RULES[rule], inputs, steps=16)
    widths.clear()
    with method_of(RULES[rule])(model) as trace:
        options = LOOKUP
        output = generated(model, inputs, 16, **options)
    handle.remove()
    assert len(output.sequences[0]) == len(row.ids) + 16
    assert new_tokens(output, inputs) == stacked(expected.tokens)
    assert any(width > 1 for width in widths[1:]), "nothing was ever guessed: the test tests nothing"
    assert expected.first is not None
    check_kept(trace, expected.first)  # (the first pass is one longer than the prompt: it holds a guess, too)


@pytest.mark.parametrize("rule", ["original", "compact"])
def test_guessed_image_ids_are_text(rule: str) -> None:
    """The word before the image is said again, so that image ids are guessed: nothing is dropped for them."""
    model = tiny_model("llava")
    [row] = make_rows(model, [[5, "image", 7]])
    row.ids[4] = 77
    inputs = collate([row])
    likeliest = reference.greedy(model, RULES[rule], inputs, steps=1).tokens[0]
    with torch.no_grad():
        model.lm_head.weight[77] = 1.5 * model.lm_head.weight[likeliest]
    expected = reference.greedy(model, RULES[rule], inputs, steps=12)
    guesses: list[list[int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: guesses.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    with method_of(RULES[rule])(model) as trace:
        output = generated(model, inputs, 12, **LOOKUP)
    handle.remove()
    assert any(IMAGE_TOKEN in ids for ids in guesses[1:]), "no image id was ever guessed: the test tests nothing"
    assert new_tokens(output, inputs) == stacked(expected.tokens)
    check_kept(trace, expected.first)


@pytest.mark.parametrize("perturbed", [0.0, 0.02])
def test_assisted_decoding(perturbed: float) -> None:
    """A second model guesses; the patched one decides."""
    model, assistant = tiny_model("llava"), tiny_model("llava")
    with torch.no_grad():
        for parameter in text_model(assistant).parameters():
            parameter.add_(perturbed * torch.randn_like(parameter))
    inputs = make_batch(model, [[5, "image", 7]])
    expected = reference.greedy(model, HALVES, inputs, steps=8)
    with method_of(HALVES)(model):
        output = generated(model, inputs, 8, assistant_model=assistant)
    assert new_tokens(output, inputs) == stacked(expected.tokens)


def test_assisted_decoding_by_a_model_with_its_own_method() -> None:
    model, assistant = tiny_model("llava"), tiny_model("llava")
    inputs = make_batch(model, [[5, "image", 7]])
    expected = reference.greedy(model, HALVES, inputs, steps=8)
    with method_of(HALVES)(model) as trace, method_of(HALVES, keep=[0.25, 0.25, 0.25])(assistant) as other:
        output = generated(model, inputs, 8, assistant_model=assistant)
    assert new_tokens(output, inputs) == stacked(expected.tokens)
    check_kept(trace, expected.first)
    assert len(other.stages[0].kept[0]) == 4


def test_generating_in_training_mode() -> None:
    """As a reinforcement learner does: the prompt's last token asks, labels or not."""
    model = tiny_model().train()
    check_greedy(model, HALVES, make_batch(model, MIXED), steps=3)
    check_greedy(model, HALVES, make_batch(model, MIXED), steps=3, use_cache=False)


def test_chunked_prefill_of_an_image_is_refused() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    chunked = copy.deepcopy(model.generation_config)
    chunked.prefill_chunk_size = 8
    with method_of(HALVES)(model):
        for options in ({"prefill_chunk_size": 8}, {"generation_config": chunked}):
            with pytest.raises((ValueError, NotImplementedError), match="prefill_chunk_size"):
                generated(model, inputs, 2, **options)
        check = generated(model, inputs, 2)
    assert new_tokens(check, inputs) == stacked(reference.greedy(model, HALVES, inputs, steps=2).tokens)


# --- Further turns on the same cache --------------------------------------------------------------------------------


def further_inputs(model: PreTrainedModel, before: Any, mask: Tensor, rows: list[Row]) -> dict[str, Any]:
    """The whole conversation for `generate`: what was said, then the new rows (of equal length)."""
    new = collate(rows)
    said = before.sequences
    ids = torch.cat([said, new["input_ids"]], dim=1)
    mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
    images = {name: new[name] for name in ("pixel_values", "image_sizes") if name in new}
    return {"input_ids": ids, "attention_mask": mask} | cache_argument(output_cache(before)) | images


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("new", [[[4], [4]], [[2, "image", 3], [4, "image", 1]], [[2, "image", 3], [21]]])
@pytest.mark.parametrize("rule", ["original", "compact", "last"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_further_turn(attention: str, rule: str, new: list) -> None:
    model = tiny_model("llava-gqa", attention)
    check_conversation(model, RULES[rule], WITH_IMAGES, new)


def test_further_turn_after_text() -> None:
    model = tiny_model()
    check_conversation(model, HALVES, [[9], [6]], [[2, "image", 3], [2, "image", 3]])


def test_further_turn_of_llava_next() -> None:
    model = tiny_model("next")
    check_conversation(model, HALVES, [[5, "image", 7]], [[2, "image", 3]])


def test_further_turn_on_a_static_cache() -> None:
    model = tiny_model()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    check_conversation(model, HALVES, WITH_IMAGES, [[2, "image", 3], [2, "image", 3]], **cache_argument(cache))


def check_conversation(model: PreTrainedModel, rule: Rule, first: list, new: list, **options: Any) -> None:
    inputs, rows = make_batch(model, first), make_rows(model, new, seed=2)
    talk = reference.greedy(model, rule, inputs, steps=3)
    reference.further_turn(model, rule, talk, collate(rows), steps=3)
    with method_of(rule)(model):
        before = generated(model, inputs, 3, **options)
    with method_of(rule)(model) as trace:  # a cache may outlive the block
        further = further_inputs(model, before, inputs["attention_mask"], rows)
        after = generated(model, further, 3)
    assert new_tokens(after, further) == stacked(talk.tokens[3:])
    for logits, wanted in zip(after.logits, talk.logits[3:], strict=True):
        torch.testing.assert_close(logits, wanted, **CLOSE)
    if any("image" in spec for spec in new):
        check_scores_of_the_last_turn(trace, talk)
        for stage, kept in enumerate(talk.first.kept):
            start = inputs["input_ids"].shape[1] + 3
            mine = [[column for column in columns.tolist() if column >= start] for columns in kept]
            theirs = [
                [column for column in columns.tolist() if column >= start] for columns in trace.stages[stage].kept
            ]
            assert theirs == mine


def check_scores_of_the_last_turn(trace: Any, talk: Any) -> None:
    """Each visual token of the turn has the attention that the reference's ranking layer gives it."""
    scores = [per_stage for number, per_stage in enumerate(talk.first.scores) if number % len(talk.case.turns)]
    assert len(scores) == len(trace.stages)
    for stage, expected in zip(trace.stages, scores, strict=True):
        assert stage.scores is not None
        for found, wanted, columns in zip(stage.scores, expected, trace.visual_columns, strict=True):
            assert len(found) == len(columns)
            there = ~found.isnan()
            torch.testing.assert_close(found[there], wanted[columns[there]], **CLOSE)


def test_a_further_turn_without_a_mask() -> None:
    """`generate` makes its own mask; how many columns are the prompt is told by its ids."""
    model = tiny_model()
    inputs, rows = make_batch(model, [[5, "image", 7]]), make_rows(model, [[2, "image", 3]], seed=2)
    talk = reference.greedy(model, HALVES, inputs, steps=3)
    reference.further_turn(model, HALVES, talk, collate(rows), steps=3)
    with method_of(HALVES)(model) as trace:
        before = generated(model, inputs, 3)
        further = further_inputs(model, before, inputs["attention_mask"], rows)
        del further["attention_mask"]
        after = generated(model, further, 3)
    assert new_tokens(after, further) == stacked(talk.tokens[3:])
    check_scores_of_the_last_turn(trace, talk)


@pytest.mark.parametrize("guessed", [0, 3])
def test_guessed_columns_are_counted_without_a_mask(guessed: int) -> None:
    """20 columns in the cache, 10 new ones; `generate` was given all of them, or the new ones alone."""
    for given in (30, 10):
        assert Generation(torch.zeros(1, given), None, None, False).candidates(20, 10 + guessed) == guessed
    assert Generation(torch.zeros(1, 30), None, None, False).candidates(0, 30 + guessed) == guessed
    assert Generation(None, None, None, False).candidates(0, 30) == 0


@pytest.mark.parametrize("rule", RULES)
def test_three_turns(rule: str) -> None:
    """Image, text, image: each turn ranks its own, over what the earlier ones left."""
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, [[5, "image", 7]])
    turns = [make_rows(model, [spec], seed) for seed, spec in ((2, [6]), (3, [2, "image", 3]), (4, [3, "image", 2]))]
    talk = reference.greedy(model, RULES[rule], inputs, steps=2)
    for rows in turns:
        reference.further_turn(model, RULES[rule], talk, collate(rows), steps=2)
    with method_of(RULES[rule])(model):
        outputs = [generated(model, inputs, 2)]
        for rows in turns:
            further = further_inputs(model, outputs[-1], inputs["attention_mask"], rows)
            outputs.append(generated(model, further, 2))
    logits = [step for output in outputs for step in output.logits]
    for ours, wanted in zip(logits, talk.logits, strict=True):
        torch.testing.assert_close(ours, wanted, **CLOSE)


@pytest.mark.parametrize("rule", ["original", "compact"])
@torch.no_grad()
def test_one_prompt_many_questions(rule: str) -> None:
    """The cache of a common prompt is copied for each question, and what it remembers is copied with it."""
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    questions = [make_rows(model, [spec], seed) for seed, spec in ((2, [6]), (3, [9]), (4, [2, "image", 3]))]
    expected = []
    for question in questions:
        talk = reference.greedy(model, RULES[rule], inputs, steps=0)
        expected.append(reference.further_turn(model, RULES[rule], talk, collate(question), steps=3))
    with method_of(RULES[rule])(model):
        cache = output_cache(model(**inputs, **cache_argument(DynamicCache(config=model.config.get_text_config()))))
        for question, wanted in zip(questions, expected, strict=True):
            new = collate(question)
            whole = new | {
                name: torch.cat([inputs[name], new[name]], dim=1) for name in ("input_ids", "attention_mask")
            }
            output = generated(model, whole, 3, **cache_argument(copy.deepcopy(cache)))
            assert new_tokens(output, whole) == stacked(wanted.tokens)
            torch.testing.assert_close(output.logits[-1], wanted.logits[-1], **CLOSE)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    "specs", [[[5, "image", 7]], [[5, "image", 7], [9]], [[5, "image", 7], [3, "image", 2, "image", 5]]]
)
@pytest.mark.parametrize("rule", ["original", "compact"])
@torch.no_grad()
def test_a_cropped_cache(rule: str, specs: list) -> None:
    """The end of the prompt is taken back and said differently: what was kept of the image stays as it was."""
    model = tiny_model()
    inputs = make_batch(model, specs)
    case = reference.inference_case(model, inputs)
    new = torch.tensor([[33, 44, 55]]).expand(len(specs), -1)
    mask = inputs["attention_mask"]
    with method_of(RULES[rule])(model) as trace:
        cache = output_cache(model(**inputs, **cache_argument(DynamicCache(config=model.config.get_text_config()))))
        kept = [stage.kept for stage in trace.stages]
        cache.crop(-4)
        ours = model(input_ids=new, attention_mask=mask[:, :-1], **cache_argument(cache)).logits
        again = model(input_ids=new[:, :1], attention_mask=mask, **cache_argument(cache)).logits
    talk = reference.Talk(case)
    case.embeds, case.valid, case.visual = case.embeds[:, :-4], case.valid[:, :-4], case.visual[:, :-4]
    talk.append(model.get_input_embeddings()(new))
    wanted = reference.run(model, RULES[rule], talk.case, forced=kept).logits
    torch.testing.assert_close(ours, wanted[:, -3:], **CLOSE)
    talk.append(model.get_input_embeddings()(new[:, :1]))
    wanted = reference.run(model, RULES[rule], talk.case, forced=kept).logits
    torch.testing.assert_close(again, wanted[:, -1:], **CLOSE)


@torch.no_grad()
def test_a_cache_cropped_into_the_image_is_refused() -> None:
    model = tiny_model()
    with method_of(HALVES)(model):
        cache = output_cache(model(**make_batch(model, [[5, "image", 7]]), use_cache=True))
        cache.crop(-15)
        with pytest.raises(ValueError, match="crop"):
            model(input_ids=torch.tensor([[33, 44]]), **cache_argument(cache))


# --- Models fed with embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_embeddings_with_a_visual_mask(attention: str) -> None:
    model = tiny_model("llava", attention)
    inputs = make_batch(model, MIXED)
    visual = inputs["input_ids"] == IMAGE_TOKEN
    embeds = {"inputs_embeds": reference.embed(model, **inputs), "attention_mask": inputs["attention_mask"]}
    expected = reference.greedy(model, HALVES, inputs, steps=3)
    with method_of(HALVES)(model):
        by_ids = model(**inputs).logits
    with method_of(HALVES)(model, visual_mask=visual) as trace:
        assert torch.equal(model(**embeds).logits, by_ids)
        output = generated(model, embeds, 3)
        assert output.sequences.tolist() == stacked(expected.tokens)
        check_trace(trace, expected.first, HALVES)
        output = generated(model, embeds, 3, use_cache=False)
        assert output.sequences.tolist() == stacked(expected.tokens)
        if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 11):
            return  # beams from embeddings are others there, without a method too
        beams = generated(model, embeds, 3, num_beams=2).sequences
    with method_of(HALVES)(model):
        assert beams.tolist() == new_tokens(generated(model, inputs, 3, num_beams=2), inputs)


def test_embeddings_without_a_mask_are_an_error() -> None:
    model = tiny_model()
    embeds = reference.embed(model, **make_batch(model, MIXED))
    with method_of(HALVES)(model), pytest.raises(ValueError, match="visual_mask"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("shape", [(3, 40), (2, 41), (3, 41, 1), (41,)])
def test_a_visual_mask_of_a_wrong_shape_is_an_error(shape: tuple[int, ...]) -> None:
    model = tiny_model()
    embeds = reference.embed(model, **make_batch(model, MIXED))
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="visual_mask"), method_of(HALVES)(model, visual_mask=mask):
        model(inputs_embeds=embeds)


@torch.no_grad()
def test_a_visual_mask_may_cover_padding() -> None:
    """Padding is nobody's visual token: it neither counts nor stays."""
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7], [3, "image", 2, "image", 1]])
    embeds = {"inputs_embeds": reference.embed(model, **inputs), "attention_mask": inputs["attention_mask"]}
    expected = reference.prefill(model, HALVES, inputs)
    visual = (inputs["input_ids"] == IMAGE_TOKEN) | (inputs["attention_mask"] == 0)
    with method_of(HALVES)(model, visual_mask=visual) as trace:
        output = model(**embeds)
    check_trace(trace, expected, HALVES)
    check_logits(output.logits, expected)
    assert trace.visual_tokens == [16, 32]


@torch.no_grad()
def test_a_visual_mask_overrides_the_image_tokens() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    visual = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    visual[:, 6:16] = True
    case = reference.inference_case(model, inputs)
    case.visual = visual
    expected = reference.run(model, HALVES, case)
    with method_of(HALVES)(model, visual_mask=visual) as trace:
        output = model(**inputs)
    check_trace(trace, expected, HALVES)
    check_logits(output.logits, expected)


@torch.no_grad()
def test_a_visual_mask_may_cover_what_the_cache_holds() -> None:
    """Of a further turn: its own columns alone, or all columns so far."""
    model = tiny_model()
    first, second = make_batch(model, [[5, "image", 7]]), make_batch(model, [[3, "image", 4]], seed=2)
    visual = [inputs["input_ids"] == IMAGE_TOKEN for inputs in (first, second)]
    embeds, kept = reference.embed(model, **second), []
    for mask in (visual[1], torch.cat(visual, 1)):
        cache = DynamicCache(config=model.config.get_text_config())
        with method_of(HALVES)(model):
            model(**first, past_key_values=cache)
        with method_of(HALVES)(model, visual_mask=mask) as trace:
            model(inputs_embeds=embeds, past_key_values=cache)
        assert trace.visual_tokens == [16]
        kept.append([stage.kept[0].tolist() for stage in trace.stages])
    assert kept[0] == kept[1]


@torch.no_grad()
def test_a_query_mask_says_who_asks() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7], [8, "image", 3]])
    asked = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    asked[0, 22], asked[0, 25], asked[1, 27] = True, True, True
    case = reference.inference_case(model, inputs)
    case.turns[0].queries = [[22, 25], [27]]
    expected = reference.run(model, HALVES, case)
    with method_of(HALVES)(model, query_mask=asked) as trace:
        output = model(**inputs)
    check_trace(trace, expected, HALVES)
    check_logits(output.logits, expected)


# --- What one call leaves to the next --------------------------------------------------------------------------


@torch.no_grad()
def test_calls_of_all_kinds_in_one_block() -> None:
    """A plain forward after `generate` is a prompt of its own, also after a `generate` that failed."""
    model = tiny_model()
    one, two = make_batch(model, MIXED), make_batch(model, [[2, "image", 5]], seed=4)
    expected = reference.prefill(model, HALVES, two)

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with method_of(HALVES)(model) as trace:
        generated(model, one, 2)
        check_logits(model(**two).logits, expected)
        check_trace(trace, expected, HALVES)
        with pytest.raises(ZeroDivisionError):
            generated(model, one, 2, stopping_criteria=[fail])
        check_logits(model(**two).logits, expected)
        check_trace(trace, expected, HALVES)


@torch.no_grad()
def test_no_mask_is_made_where_there_was_none() -> None:
    """An unpadded prompt keeps the kernel's own causal path in every layer, and a decoded token needs no mask."""
    model = tiny_model()
    masks: list[Any] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in text_model(model).layers
    ]
    with method_of(HALVES)(model):
        generated(model, make_batch(model, [[5, "image", 7], [3, "image", 9]]), 3)
    for handle in handles:
        handle.remove()
    assert masks == [None] * 24


# --- The trace ------------------------------------------------------------------------------------------------------


def test_the_trace_is_empty_before_and_holds_the_last_prefill_after() -> None:
    model = tiny_model()
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        assert list(trace.visual_tokens) == list(trace.lengths) == list(trace.stages) == []
        generated(model, make_batch(model, MIXED), 3)
        assert trace.visual_tokens == [16, 32, 0]
        generated(model, make_batch(model, [[5, "image", 7]]), 3)
        assert trace.visual_tokens == [16]
    assert [len(stage.kept[0]) for stage in trace.stages] == [8, 4, 2]


def test_the_trace_of_a_text_only_call() -> None:
    model = tiny_model()
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        for _ in range(2):
            model(**make_batch(model, [[9], [12]]))
            assert list(trace.visual_tokens) == [0, 0]
            assert list(trace.lengths) == [12] * 8
            assert [[len(columns) for columns in stage.kept] for stage in trace.stages] == [[0, 0]] * 3
            assert trace.cost().flops_ratio == 1
            model(**make_batch(model, MIXED))
            assert trace.visual_tokens == [16, 32, 0]


def test_kept_sets_are_nested() -> None:
    model = tiny_model()
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        model(**make_batch(model, MIXED))
    for before, after in pairwise(trace.stages):
        for wide, narrow in zip(before.kept, after.kept, strict=True):
            assert set(narrow.tolist()) <= set(wide.tolist())
