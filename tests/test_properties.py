"""Models, schedules, batches and calls drawn at random, each held against the specification and the slow reference.

A failure prints the smallest scene that fails. `make test` draws a few, always the same; `make test-all` thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import reference
import scorer_oracle
from checks import (
    CLOSE,
    check_logits,
    check_trace,
    generated,
    kept_columns,
    method_of,
    new_tokens,
    same_gradients,
    stacked,
)
from pyramiddrop import naive
from reference import Result, Rule
from tiny import FAMILIES, IMAGE_TOKEN, IMPLEMENTATIONS, Answer, collate, make_rows, text_model, tiny_model

settings.register_profile(
    "few",
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("many", settings.get_profile("few"), max_examples=500, derandomize=False, print_blob=True)

DEPTH = 6
RATIOS = [1.0, 0.9, 0.7, 0.5, 0.29, 0.25, 0.125, 0.01]


@dataclass(frozen=True)
class Scene:
    """What is drawn. `rows` are specs, as `tiny.make_rows` takes them."""

    family: str
    attention: str
    rule: Rule
    rows: list[list[Any]]
    side: str
    seed: int

    @property
    def model(self) -> PreTrainedModel:
        return model_of(self.family, self.attention)

    def inputs(self, labels: bool = False) -> dict[str, Tensor]:
        return collate(make_rows(self.model, self.rows, self.seed), self.side, labels)


@cache
def model_of(family: str, attention: str) -> PreTrainedModel:
    """One model for all scenes, for making it takes longer than a scene."""
    return tiny_model(family, attention, layers=DEPTH)


# --- What is drawn ----------------------------------------------------------------------------------------------------


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    layers = sorted(draw(st.sets(st.integers(1, DEPTH - 1), min_size=1, max_size=3)))
    keep = sorted(draw(st.lists(st.sampled_from(RATIOS), min_size=len(layers), max_size=len(layers))), reverse=True)
    if draw(st.booleans()):
        keep[-1] = draw(st.sampled_from([keep[-1], 0.0]))  # early exit
    positions, rank_layer = draw(st.sampled_from(["original", "compact"])), draw(st.sampled_from(["next", "last"]))
    return Rule(layers, keep, positions, rank_layer, draw(st.booleans()))


@st.composite
def prompts(draw: st.DrawFn) -> list[Any]:
    """Text, images and text in turn; the prompt may begin with an image, end with one, or have none."""
    images, row = draw(st.integers(0, 2)), [draw(st.integers(0, 5))]
    for _ in range(images):
        row += ["image", draw(st.integers(1, 5))]
    if images and draw(st.booleans()):
        row.pop()
    return [part for part in row if part] or [3]


@st.composite
def lessons(draw: st.DrawFn) -> list[Any]:
    """A prompt with answers anywhere behind its text and images, or without one."""
    row: list[Any] = []
    for part in draw(prompts()):
        row.append(part)
        if draw(st.booleans()):
            row.append(Answer(draw(st.integers(1, 3))))
    return row


def scenes(rows: st.SearchStrategy[list[list[Any]]], sides: list[str]) -> st.SearchStrategy[Scene]:
    family, attention = st.sampled_from(FAMILIES), st.sampled_from(IMPLEMENTATIONS)
    return st.builds(Scene, family, attention, rules(), rows, st.sampled_from(sides), st.integers(1, 50))


def batches(row: st.SearchStrategy[list[Any]]) -> st.SearchStrategy[list[list[Any]]]:
    return st.lists(row, min_size=1, max_size=3)


# --- What must hold ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a scene is called: by ids or embeddings, with or without a mask, with full logits or those kept."""

    embeddings: bool
    logits: str


def check_prompt(scene: Scene, way: Way) -> None:
    """Kept sets and logits are the specification's and the reference's, and those of each sample alone."""
    inputs, model = scene.inputs(), scene.model
    expected = reference.prefill(model, scene.rule, inputs)
    assume(separated(expected))
    case = reference.inference_case(model, inputs)
    hidden, kept = naive.forward(text_model(model), *told(scene.rule, case), **in_words(scene.rule))
    with torch.no_grad():
        if way.embeddings:
            call = {"inputs_embeds": case.embeds, "attention_mask": inputs["attention_mask"]}
            with method_of(scene.rule)(model, visual_mask=inputs["input_ids"] == IMAGE_TOKEN) as trace:
                logits = model(**call).logits
        else:
            with method_of(scene.rule)(model) as trace:
                logits = model(**inputs).logits
        check_trace(trace, expected, scene.rule)
        check_logits(logits, expected)
        assert as_columns(kept) == kept_columns(trace)
        left = expected.alive[-1]
        torch.testing.assert_close(logits[left], model.lm_head(hidden)[left], **CLOSE)
        for number, row in enumerate(make_rows(model, scene.rows, scene.seed)):
            with method_of(scene.rule)(model) as alone:
                single = model(**collate([row])).logits
            start = inputs["attention_mask"][number].argmax()
            for stage, mine in zip(trace.stages, alone.stages, strict=True):
                assert (stage.kept[number] - start).tolist() == mine.kept[0].tolist()
            last = int(inputs["attention_mask"][number].nonzero()[-1])
            torch.testing.assert_close(logits[number, last], single[0, -1], **CLOSE)


def check_lesson(scene: Scene, way: Way) -> None:
    """Kept sets, the loss and every gradient."""
    inputs, model = scene.inputs(labels=True), scene.model
    assume(bool((inputs["labels"][:, 1:] != reference.IGNORED).any()))
    expected = reference.train(model, scene.rule, inputs)
    assume(separated(expected))
    wanted = gradients(model, expected.loss)
    case = reference.training_case(model, inputs)
    hidden, kept = naive.forward(
        text_model(model), *told(scene.rule, case), labels=inputs["labels"], **in_words(scene.rule)
    )
    loss = reference.next_token_loss(model.lm_head(hidden), inputs["labels"])
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    same_gradients(gradients(model, loss), wanted)
    with method_of(scene.rule, logits=way.logits)(model) as trace:
        output = model(**inputs)
        check_trace(trace, expected, scene.rule)
        assert as_columns(kept) == kept_columns(trace)
        torch.testing.assert_close(output.loss, expected.loss, **CLOSE)
        same_gradients(gradients(model, output.loss), wanted)


@dataclass(frozen=True)
class Turns:
    """A conversation: the further prompts, which all samples get in turn, and the cache that it is held in."""

    cache: str
    further: list[list[Any]]


def check_conversation(scene: Scene, turns: Turns) -> None:
    """Tokens, logits and kept sets, turn by turn on one cache, are those of the whole sequence computed anew."""
    steps, model, inputs = 2, scene.model, scene.inputs()
    options: dict[str, Any] = {"use_cache": False} if turns.cache == "none" else {}
    if turns.cache == "static":
        options["past_key_values"] = StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    talk = reference.greedy(model, scene.rule, inputs, steps)
    check_turn(scene, talk, 0)
    mask, call = inputs["attention_mask"], inputs
    with method_of(scene.rule)(model) as trace:
        output = generated(model, call, steps, **options)
        same_turn(talk, output, call, trace, 0, steps)
    if turns.cache == "none":
        return
    for number, spec in enumerate(turns.further, 1):
        new = collate(make_rows(model, [spec] * len(scene.rows), scene.seed + number))
        reference.further_turn(model, scene.rule, talk, new, steps)
        check_turn(scene, talk, number)
        ids = torch.cat([output.sequences, new["input_ids"]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
        pictures = {name: new[name] for name in ("pixel_values", "image_sizes") if name in new}
        call = {"input_ids": ids, "attention_mask": mask, "past_key_values": output.past_key_values} | pictures
        with method_of(scene.rule)(model) as trace:
            output = generated(model, call, steps)
            same_turn(talk, output, call, trace if pictures else None, number, steps)


def check_turn(scene: Scene, talk: reference.Talk, number: int) -> None:
    """No two scores and no two tokens of this turn are so near that rounding would choose."""
    assert talk.first is not None
    assume(separated(talk.first))
    for logits in talk.logits[-2:]:
        best = logits.topk(2).values
        assume(bool((best[:, 0] - best[:, 1] > 1e-3).all()))


def same_turn(talk: reference.Talk, output: Any, call: Any, trace: Any, number: int, steps: int) -> None:
    """The last turn of the talk is what `generate` gave."""
    first = number * steps
    assert new_tokens(output, call) == stacked(talk.tokens[first:])
    for ours, wanted in zip(output.logits, talk.logits[first:], strict=True):
        torch.testing.assert_close(ours, wanted, **CLOSE)
    if trace is not None and talk.first is not None:
        start = talk.case.turns[-1].start
        for stage, kept in zip(trace.stages, talk.first.kept, strict=True):
            assert [row.tolist() for row in stage.kept] == [row[row >= start].tolist() for row in kept]


def check_scorer(scene: Scene, score: str) -> None:
    """What a scorer gives each visual token at each drop is what its rule says in plain loops."""
    method = method_of(scene.rule, score=score, positions="original", rank_layer="next")
    for look, scores, _ in scorer_oracle.looks(scene.model, method, scene.inputs()):
        expected = torch.tensor(scorer_oracle.SCORES[score](look), dtype=torch.float32)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-3)


def separated(result: Result) -> bool:
    """Whether no two scores of visual tokens are so near that rounding would choose between them."""
    for scores in result.scores:
        for row in scores:
            mine = row[row > 0].sort().values
            if len(mine) > 1 and float((mine.diff() / mine[1:]).min()) < 1e-5:
                return False
    return True


def told(rule: Rule, case: reference.Case) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, and who is valid and visual, as the specification takes them."""
    assert case.images is not None
    return case.embeds, case.valid, case.images if rule.per_image else case.visual


def in_words(rule: Rule) -> dict[str, Any]:
    return {name: getattr(rule, name) for name in ("layers", "keep", "positions", "rank_layer")}


def as_columns(kept: list[Tensor]) -> list[list[list[int]]]:
    return [[row.nonzero()[:, 0].tolist() for row in stays] for stays in kept]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# --- Few and many -----------------------------------------------------------------------------------------------------

WAYS = st.builds(Way, st.booleans(), st.sampled_from(["full", "kept"]))
TURNS = st.builds(Turns, st.sampled_from(["dynamic", "static", "none"]), st.lists(prompts(), max_size=2))
PICTURES = prompts().filter(lambda row: "image" in row and row[-1] != "image")
PROPERTIES: dict[str, tuple[Callable[..., None], tuple[st.SearchStrategy[Any], ...]]] = {
    "prompt": (check_prompt, (scenes(batches(prompts()), ["left", "right"]), WAYS)),
    "lesson": (check_lesson, (scenes(batches(lessons()), ["left", "right"]), WAYS)),
    "conversation": (check_conversation, (scenes(batches(prompts()), ["left"]), TURNS)),
    "scorer": (
        check_scorer,
        (scenes(batches(PICTURES), ["left", "right"]), st.sampled_from(sorted(scorer_oracle.SCORES))),
    ),
}


def draw(name: str, profile: str) -> None:
    check, strategies = PROPERTIES[name]
    settings.get_profile(profile)(given(*strategies)(check))()


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_few(name: str) -> None:
    draw(name, "few")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_many(name: str) -> None:
    draw(name, "many")
