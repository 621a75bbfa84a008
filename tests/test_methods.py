"""The front door: every method's choice, its file, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

import reference
from checks import HALVES, check_logits, check_trace, generated, kept_columns, method_of, new_tokens, stacked
from pyramiddrop import FastV, Method, PyramidDrop, RandomDrop, UniformDrop, UnsupportedModelError
from pyramiddrop.scoring import AttentionScorer, TopHeadsScorer
from reference import Result, Rule
from tiny import (
    IMPLEMENTATIONS,
    Answer,
    collate,
    image_tokens,
    make_batch,
    make_rows,
    text_config,
    text_model,
    tiny_model,
)

MIXED = [[5, "image", 7], [3, "image", 2, "image", 1], [9]]
STAGES = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]}
METHODS = [
    PyramidDrop(),
    PyramidDrop(lam=0.6, stages=3, positions="compact", rank_layer="last", per_image=True, logits="kept"),
    PyramidDrop(layers=[1, 5], keep=[0.7, 0.3]),
    FastV(layer=3, keep=0.25),
    RandomDrop(**STAGES, seed=7),
    RandomDrop(seed=None),
    UniformDrop(lam=0.3, stages=2),
    PyramidDrop(score="rope_free", reserve=0.5, random_from=6, merge=True),
    FastV(layer=3, keep=0.25, score=TopHeadsScorer(share=0.5)),
]


@torch.no_grad()
def kept_by(method: Any, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[list[list[int]]]:
    """Kept columns, stage by stage, sample by sample."""
    with method(model) as trace:
        model(**inputs)
    return kept_columns(trace)


def check_given_sets(method: Any, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Result:
    """Whatever the method chose: the model's output is that of the reference with the same choice."""
    rule = Rule(STAGES["layers"], STAGES["keep"], positions=method.positions)
    with torch.no_grad(), method(model) as trace:
        output = model(**inputs)
    expected = reference.prefill(model, rule, inputs, forced=[stage.kept for stage in trace.stages])
    check_trace(trace, expected, rule)
    check_logits(output.logits, expected)
    return expected


# --- PyramidDrop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (PyramidDrop(), [(2, 0.5), (4, 0.25), (6, 0.125)]),
        (PyramidDrop(lam=0.6), [(2, 0.6), (4, 0.36), (6, 0.216)]),
        (PyramidDrop(stages=2), [(4, 0.5)]),
        (PyramidDrop(layers=[1, 3]), [(1, 0.5), (3, 0.25)]),
        (PyramidDrop(keep=[0.4, 0.3, 0.2]), [(2, 0.4), (4, 0.3), (6, 0.2)]),
        (PyramidDrop(layers=[3, 7], keep=[0.4, 0.4]), [(3, 0.4), (7, 0.4)]),
        (RandomDrop(), [(2, 0.5), (4, 0.25), (6, 0.125)]),
        (UniformDrop(), [(2, 0.5), (4, 0.25), (6, 0.125)]),
        (FastV(layer=3, keep=0.25), [(3, 0.25)]),
    ],
)
def test_schedules(method: Any, stages: list[tuple[int, float]]) -> None:
    schedule = method.schedule(8)
    assert list(schedule.layers) == [layer for layer, _ in stages]
    assert list(schedule.keep) == pytest.approx([keep for _, keep in stages])


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("rank_layer", ["next", "last"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["llava-gqa", "next"])
@torch.no_grad()
def test_per_image(family: str, attention: str, rank_layer: str) -> None:
    model = tiny_model(family, attention)
    rule = Rule(HALVES.layers, HALVES.keep, rank_layer=rank_layer, per_image=True)
    inputs = make_batch(model, [[2, "image", 3, "image", 1, "image", 4], [5, "image", 7], [9]])
    expected = reference.prefill(model, rule, inputs)
    with method_of(rule)(model) as trace:
        output = model(**inputs)
    check_trace(trace, expected, rule)
    check_logits(output.logits, expected)
    together = kept_by(method_of(rule, per_image=False), model, inputs)
    assert [[columns.tolist() for columns in stage.kept] for stage in trace.stages] != together
    numbers = reference.image_numbers(inputs["input_ids"] == model.config.image_token_id)[0]
    for stage in trace.stages:
        for image in (1, 2, 3):
            original = int((numbers == image).sum())
            assert int((numbers[stage.kept[0]] == image).sum()) == int(original * stage.keep)


def test_per_image_in_training() -> None:
    model = tiny_model()
    rule = Rule(HALVES.layers, HALVES.keep, per_image=True)
    inputs = make_batch(model, [[2, "image", Answer(3), 2, "image", 4, Answer(2)]], "right", labels=True)
    expected = reference.train(model, rule, inputs)
    with method_of(rule)(model) as trace:
        loss = model.train()(**inputs).loss
    check_trace(trace, expected, rule)
    torch.testing.assert_close(loss, expected.loss)


@pytest.mark.parametrize("family", ["llava", "next"])
def test_per_image_of_images_that_touch(family: str) -> None:
    """Two images without a token between them are still two, and each row of a batch has its own."""
    model = tiny_model(family)
    [first, second] = make_rows(model, [[2, "image", "image", 4], [2, "image", 4]])
    sizes = [image_tokens(model, pixels, size) for pixels, size in zip(first.pixels, first.sizes, strict=True)]
    inputs = collate([second, first], "right")
    for keep, kept in zip(HALVES.keep, kept_by(method_of(HALVES, per_image=True), model, inputs), strict=True):
        assert len(kept[0]) == int(sizes[0] * keep)
        assert sum(column < 2 + sizes[0] for column in kept[1]) == int(sizes[0] * keep)
        assert len(kept[1]) == int(sizes[0] * keep) + int(sizes[1] * keep)


# --- FastV ----------------------------------------------------------------------------------------------------------


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("layer", [1, 2, 5])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["llava-gqa", "next"])
def test_fastv(family: str, attention: str, layer: int) -> None:
    """It ranks by the attention of the layer before, of the last row, and prunes before its layer."""
    model = tiny_model(family, attention)
    rule = Rule([layer], [0.3], rank_layer="last")
    inputs = make_batch(model, MIXED)
    expected = reference.greedy(model, rule, inputs, steps=3)
    with FastV(layer=layer, keep=0.3)(model) as trace:
        output = generated(model, inputs, 3)
    check_trace(trace, expected.first, rule)
    assert new_tokens(output, inputs) == stacked(expected.tokens)


def test_the_ranking_layers_differ() -> None:
    """Else the tests of rank_layer would prove nothing."""
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    following = kept_by(PyramidDrop(layers=[3], keep=[0.5]), model, inputs)
    before = kept_by(PyramidDrop(layers=[3], keep=[0.5], rank_layer="last"), model, inputs)
    assert before == kept_by(FastV(layer=3, keep=0.5), model, inputs)
    assert before != following


# --- RandomDrop and UniformDrop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("make", [RandomDrop, UniformDrop])
def test_controls_drop_as_many_and_compute_the_same(make: Any, positions: str) -> None:
    model = tiny_model()
    expected = check_given_sets(make(**STAGES, positions=positions), model, make_batch(model, MIXED))
    assert [[len(columns) for columns in kept] for kept in expected.kept] == [[8, 16, 0], [4, 8, 0], [2, 4, 0]]
    for wide, narrow in pairwise(expected.kept):
        assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("method", [RandomDrop(**STAGES, seed=3), UniformDrop(**STAGES), PyramidDrop(**STAGES)])
def test_a_row_chooses_alike_alone_and_in_a_batch(method: Any) -> None:
    model = tiny_model()
    rows = make_rows(model, [[5, "image", 7], [3, "image", 2, "image", 1], [9], [2, "image", 1]])
    width = max(len(row.ids) for row in rows)
    together = kept_by(method, model, collate(rows))
    for b, row in enumerate(rows):
        alone = kept_by(method, model, collate([row]))
        offset = width - len(row.ids)
        assert [stage[b] for stage in together] == [[column + offset for column in stage[0]] for stage in alone]


def test_random_drop_is_reproducible_by_its_seed() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[3, "image", 2, "image", 1]])
    torch.manual_seed(1)
    first = kept_by(RandomDrop(seed=3), model, inputs)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert kept_by(RandomDrop(seed=3), model, inputs) == first
    assert kept_by(RandomDrop(seed=4), model, inputs) != first
    torch.random.set_rng_state(state)
    kept_by(RandomDrop(seed=3), model, inputs)
    assert torch.equal(torch.random.get_rng_state(), state), "the user's own random numbers were used up"


def test_random_drop_without_a_seed_is_fresh_each_call() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[3, "image", 2, "image", 1]])
    method = RandomDrop(seed=None)
    assert kept_by(method, model, inputs) != kept_by(method, model, inputs)


def test_random_drop_chooses_from_everywhere() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[3, "image", 2]])
    chosen = {column for seed in range(20) for column in kept_by(RandomDrop(seed=seed), model, inputs)[-1][0]}
    assert len(chosen) >= 12  # 40 draws of 16 columns


@pytest.mark.parametrize("keep", [0.5, 0.3, 0.9, 0.11])
def test_uniform_drop_is_evenly_spaced(keep: float) -> None:
    model = tiny_model("next")  # one image of 52 tokens
    inputs = make_batch(model, [[5, "image", 7]])
    [[kept]] = kept_by(UniformDrop(layers=[2], keep=[keep]), model, inputs)
    assert len(kept) == int(52 * keep)
    gaps = [after - before for before, after in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1
    assert kept[0] - 5 < max(gaps)
    assert 57 - kept[-1] <= max(gaps) + 1


def test_uniform_drop_covers_the_image_at_every_stage() -> None:
    model = tiny_model("next")
    inputs = make_batch(model, [[5, "image", 7]])
    for [kept] in kept_by(UniformDrop(), model, inputs):
        gaps = [after - before for before, after in pairwise(kept)]
        assert max(gaps) <= 2 * 52 / len(kept)


@pytest.mark.parametrize("make", [RandomDrop, UniformDrop])
def test_controls_keep_what_predicts_an_answer(make: Any) -> None:
    model = tiny_model().train()
    inputs = make_batch(model, [["image", Answer(2)], [2, "image", 3]], "right", labels=True)
    kept = kept_by(make(**STAGES), model, inputs)
    assert all(15 in stage[0] for stage in kept)
    assert [[len(columns) for columns in stage] for stage in kept] == [[8, 16], [4, 16], [2, 16]]


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_method_is_saved_and_loaded(method: Any, tmp_path: Path) -> None:
    method.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pyramiddrop.json"]
    json.loads((tmp_path / "pyramiddrop.json").read_text())
    for loaded in (Method.from_pretrained(tmp_path), type(method).from_pretrained(str(tmp_path))):
        assert type(loaded) is type(method)
        assert loaded == method
        assert loaded.schedule(8) == method.schedule(8)


def test_a_folder_is_made(tmp_path: Path) -> None:
    PyramidDrop().save_pretrained(tmp_path / "new" / "folder")
    assert Method.from_pretrained(tmp_path / "new" / "folder") == PyramidDrop()


def test_a_class_insists_on_its_own_file(tmp_path: Path) -> None:
    FastV().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FastV"):
        PyramidDrop.from_pretrained(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pyramiddrop\.json"):
        PyramidDrop.from_pretrained(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    PyramidDrop().save_pretrained(tmp_path)
    path = tmp_path / "pyramiddrop.json"
    good = json.loads(path.read_text())
    [name] = [key for key, value in good.items() if value == "PyramidDrop" or str(value).lower() == "pyramiddrop"]
    damaged = ["{", "[]", json.dumps(good | {name: "NoSuchMethod"}), json.dumps(good | {"lam": 7})]
    for text in [*damaged, json.dumps(good | {"lamb": 0.5})]:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"pyramiddrop\.json|NoSuchMethod|lam"):
            Method.from_pretrained(tmp_path)


def test_a_score_is_written_by_its_name_and_settings_only_where_there_are_some(tmp_path: Path) -> None:
    assert PyramidDrop(score="diversity").settings()["score"] == "diversity"
    assert PyramidDrop(score={"name": "top_heads", "share": 0.5}).score == TopHeadsScorer(share=0.5)
    assert PyramidDrop(score=TopHeadsScorer(share=0.5)).settings()["score"] == {"name": "top_heads", "share": 0.5}


def test_a_file_without_a_score_ranks_by_attention() -> None:
    """As all files did that were written before there was another."""
    assert Method.from_settings({"method": "PyramidDrop", "lam": 0.6}, "here") == PyramidDrop(lam=0.6)


def test_a_scorer_that_has_no_name_cannot_be_saved(tmp_path: Path) -> None:
    class Mine(AttentionScorer):
        pass

    with pytest.raises(ValueError, match="Mine is not in SCORERS"):
        PyramidDrop(score=Mine()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# --- Refusals -------------------------------------------------------------------------------------------------------

BAD: list[tuple[type, dict[str, Any], str]] = [
    (PyramidDrop, {"lam": 0}, "lam"),
    (PyramidDrop, {"lam": 1.5}, "lam"),
    (PyramidDrop, {"lam": "half"}, "lam"),
    (PyramidDrop, {"stages": 1}, "stages"),
    (PyramidDrop, {"stages": 9}, "stages"),
    (PyramidDrop, {"stages": 2.5}, "stages"),
    (PyramidDrop, {"layers": []}, "layers|stage"),
    (PyramidDrop, {"layers": [0, 2]}, "layers"),
    (PyramidDrop, {"layers": [4, 2]}, "layers"),
    (PyramidDrop, {"layers": [2, 8]}, "layers"),
    (PyramidDrop, {"layers": [2, 4], "keep": [0.5]}, "layers and keep"),
    (PyramidDrop, {"keep": [0.25, 0.5]}, "keep"),
    (PyramidDrop, {"keep": [0.5, 0, 0]}, "keep"),
    (PyramidDrop, {"keep": [1.5]}, "keep"),
    (PyramidDrop, {"positions": "renumbered"}, "positions"),
    (PyramidDrop, {"rank_layer": "first"}, "rank_layer"),
    (PyramidDrop, {"logits": "some"}, "logits"),
    (PyramidDrop, {"per_image": "yes"}, "per_image"),
    (FastV, {"layer": 0}, "layer"),
    (FastV, {"layer": 8}, "layer"),
    (FastV, {"keep": -0.1}, "keep"),
    (FastV, {"keep": 1.01}, "keep"),
    (FastV, {"logits": "some"}, "logits"),
    (RandomDrop, {"lam": -1}, "lam"),
    (RandomDrop, {"seed": "seven"}, "seed"),
    (RandomDrop, {"positions": "none"}, "positions"),
    (UniformDrop, {"stages": 0}, "stages"),
    (PyramidDrop, {"score": "best"}, "score must be one of attention, instruction"),
    (PyramidDrop, {"score": {"name": "top_heads", "share": 2}}, "share"),
    (FastV, {"score": {"name": "top_heads", "heads": 2}}, "top_heads"),
    (PyramidDrop, {"reserve": 1.5}, "reserve"),
    (PyramidDrop, {"reserve": True}, "reserve"),
    (PyramidDrop, {"random_from": 0}, "random_from"),
    (FastV, {"random_from": 2.5}, "random_from"),
    (RandomDrop, {"merge": "yes"}, "merge"),
    (FastV, {"layer": 1, "score": "variation"}, "compares layer 0 with the one before"),
    (UniformDrop, {"layers": [3, 3]}, "layers"),
]


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize(("kind", "arguments", "name"), BAD, ids=lambda value: getattr(value, "__name__", str(value)))
def test_bad_arguments_are_named(kind: type, arguments: dict[str, Any], name: str) -> None:
    """At the latest when the method meets the model; never in the middle of a forward pass."""
    model = tiny_model()

    def use() -> None:
        with kind(**arguments)(model):
            pass

    with pytest.raises(ValueError, match=name):
        use()


@pytest.mark.parametrize("kind", [PyramidDrop, FastV, RandomDrop, UniformDrop])
def test_methods_are_plain_dataclasses(kind: type) -> None:
    assert dataclasses.is_dataclass(kind)
    assert kind() == kind()
    assert issubclass(kind, Method)


@pytest.mark.parametrize(
    "make",
    [lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)), lambda: nn.Linear(2, 2)],
    ids=["gpt2", "linear"],
)
def test_unsupported_models_are_refused(make: Any) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=r"(?i)gpt2|linear"), PyramidDrop()(model):
        pass
    assert issubclass(UnsupportedModelError, ValueError)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_ranking_layer_that_does_not_see_every_visual_token_is_refused() -> None:
    """What it does not see would rank last, whatever it shows. 21 tokens back is where the image begins."""
    model = tiny_model("llava-mistral", sliding_window=20)
    inputs = make_batch(model, [[3, "image", 5]])
    with PyramidDrop()(model), pytest.raises(ValueError, match=r"layer 2, .* sees 20 tokens, but they begin 21 tokens"):
        model(**inputs)
    with RandomDrop()(model) as trace:
        model(**inputs)
    assert len(trace.stages[0].kept[0]) == 8
    model = tiny_model("llava-mistral", sliding_window=21)
    with PyramidDrop()(model) as trace:
        model(**inputs)
    assert len(trace.stages[0].kept[0]) == 8


@torch.no_grad()
def test_a_bare_text_model_fed_with_embeddings() -> None:
    """A visual mask makes any supported text model a vision-language model."""
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, MIXED)
    text = LlamaForCausalLM(text_config("llava-gqa")).eval()
    text.model.load_state_dict(text_model(model).state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    expected = reference.prefill(model, HALVES, inputs)
    embeds = reference.embed(model, **inputs)
    visual = inputs["input_ids"] == model.config.image_token_id
    with method_of(HALVES)(text, visual_mask=visual) as trace:
        output = text(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    check_trace(trace, expected, HALVES)
    check_logits(output.logits, expected)
