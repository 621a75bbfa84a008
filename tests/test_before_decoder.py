"""Dropping before the decoder: against the untouched model that is fed without the dropped rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from pyramiddrop import Downsample, PyramidDrop, UnsupportedModelError, VisionDrop, apply, remove
from pyramiddrop.hf.before_decoder import DownsampledEncoder
from pyramiddrop.inference.prefill_stats import usage
from pyramiddrop.schedule import PreLLMSchedule
from tiny import CROP, Answer, collate, make_batch, make_rows, tiny_model

SPECS = [[5, "image", 7], [3, "image", 2, "image", 4], [6]]
CONTROLS = [VisionDrop(keep=0.4), VisionDrop(keep=0.5, score="diversity"), Downsample(keep=0.3)]


@torch.no_grad()
def fed_without(model: Any, row: dict[str, Tensor], kept: Tensor, embeds: Tensor, steps: int, compact: bool) -> Any:
    """Logits at the prompt's end, and greedy tokens, of the untouched model on one sample's remaining rows."""
    ids = row["input_ids"][0]
    stays = [c for c in range(len(ids)) if ids[c] != model.config.image_token_id or c in kept.tolist()]
    places = torch.arange(len(stays)) if compact else torch.tensor(stays)
    rows, next_place, tokens, first = embeds[0, stays], len(stays) if compact else len(ids), [], None
    for _ in range(steps):
        mask = torch.ones(1, len(rows), dtype=torch.long)  # or else gaps would be taken for packed sequences
        output = model.model.language_model(
            inputs_embeds=rows[None], attention_mask=mask, position_ids=places[None], use_cache=False
        )
        logits = model.lm_head(output.last_hidden_state[0, -1])
        first = logits if first is None else first
        tokens.append(int(logits.argmax()))
        rows = torch.cat([rows, model.get_input_embeddings()(logits.argmax()[None])])
        places = torch.cat([places, torch.tensor([next_place])])
        next_place += 1
    return first, tokens


def embeddings(model: Any, method: Any, row: dict[str, Tensor]) -> Tensor:
    """What the decoder would be fed with; a smaller picture changes it."""
    if not isinstance(method, Downsample):
        return reference.embed(model, **row)
    full: list[Tensor] = []
    with method(model):
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: full.append(kwargs["inputs_embeds"]), with_kwargs=True, prepend=True
        )
        model(**row)
        hook.remove()
    return full[0]


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", CONTROLS, ids=lambda method: f"{type(method).__name__}-{method.keep}")
def test_a_prefill_is_the_untouched_model_on_what_stays(method: Any, side: str, positions: str) -> None:
    model = tiny_model("llava-gqa")
    method = type(method)(**_with(method, positions))
    rows = make_rows(model, SPECS)
    inputs = collate(rows, side)
    with torch.no_grad(), method(model) as trace:
        output = model(**inputs)
    for number, row in enumerate(rows):
        alone = collate([row])
        shift = inputs["input_ids"].shape[1] - alone["input_ids"].shape[1] if side == "left" else 0
        kept = trace.stages[0].kept[number] - shift
        with torch.no_grad():
            embeds = embeddings(model, method, alone)
        expected, _ = fed_without(model, alone, kept, embeds, 1, positions == "compact")
        last = int(inputs["attention_mask"][number].nonzero()[-1])
        torch.testing.assert_close(output.logits[number, last], expected, atol=1e-4, rtol=1e-4)


def _with(method: Any, positions: str) -> dict[str, Any]:
    settings = {name: getattr(method, name) for name in ("keep", "score") if hasattr(method, name)}
    return {**settings, "positions": positions}


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", CONTROLS, ids=lambda method: f"{type(method).__name__}-{method.keep}")
def test_generation_goes_on_from_what_stays(method: Any, positions: str) -> None:
    model = tiny_model()
    method = type(method)(**_with(method, positions))
    rows = make_rows(model, SPECS)
    inputs = collate(rows)
    with method(model) as trace:
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        uncached = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(ids, uncached)
    length = inputs["input_ids"].shape[1]
    for number, row in enumerate(rows):
        alone = collate([row])
        kept = trace.stages[0].kept[number] - (length - alone["input_ids"].shape[1])
        with torch.no_grad():
            embeds = embeddings(model, method, alone)
        _, tokens = fed_without(model, alone, kept, embeds, 5, positions == "compact")
        assert ids[number, length:].tolist() == tokens


def test_the_class_token_says_what_matters_in_the_picture() -> None:
    """Of the layer whose output is taken: here the last of two."""
    model = tiny_model(attention="eager")
    inputs = make_batch(model, [[5, "image", 7, "image", 2]])
    with torch.no_grad():
        tower = model.model.vision_tower
        seen = tower(inputs["pixel_values"], output_attentions=True).attentions[-1].mean(1)[:, 0, 1:]
        with VisionDrop(keep=0.5)(model) as trace:
            model(**inputs)
    assert trace.stages[0].scores is not None
    torch.testing.assert_close(trace.stages[0].scores[0], seen.flatten())
    assert trace.lengths == [14 + 16] * 8
    assert trace.length == 14 + 32
    used = usage(trace)
    assert (used.visual_tokens, used.text_tokens, used.tokens_by_stage) == (32, 14, [32, 16])
    cost = trace.cost()
    assert cost.kv_ratio == pytest.approx(30 / 46)


def test_a_smaller_picture_is_what_the_tower_sees_of_a_smaller_picture() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    small = torch.nn.functional.interpolate(
        inputs["pixel_values"], (CROP // 2, CROP // 2), mode="bicubic", antialias=True, align_corners=False
    )
    with torch.no_grad():
        features = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
        expected = model.model.multi_modal_projector(features.hidden_states[-1][:, 1:])
        with Downsample(keep=0.3)(model) as trace:
            model(**inputs)
            fed = reference.embed(model, **inputs)
    kept = trace.stages[0].kept[0]
    assert (kept - 5).tolist() == [0, 2, 8, 10]  # 2 x 2 of 4 x 4: the first of each four
    torch.testing.assert_close(fed[0, kept], expected[0])  # the text model is fed all, and drops before its first layer


@pytest.mark.parametrize("side", [14, 24, 27, 37])
def test_a_smaller_picture_has_all_its_patches_for_any_number_of_pictures(side: int) -> None:
    """The share is a fraction whose float product with the patches can fall below the whole number."""
    for small in range(1, side):
        [stage] = PreLLMSchedule.keeping(DownsampledEncoder(SimpleNamespace(side=side), small).share).stages
        for pictures in (1, 2, 3, 5):
            assert stage.count(pictures * side**2) == pictures * small**2


def test_nothing_is_left_behind() -> None:
    model = tiny_model()
    inputs = make_batch(model, SPECS)
    with torch.no_grad():
        before = model(**inputs).logits
        for method in CONTROLS:
            with pytest.raises(KeyError), method(model):
                raise KeyError
            apply(model, method)
            model(**inputs)
            remove(model)
            assert torch.equal(model(**inputs).logits, before)


def test_keep_one_changes_no_bit() -> None:
    model = tiny_model()
    inputs = make_batch(model, SPECS)
    with torch.no_grad():
        before = model(**inputs).logits
        with VisionDrop(keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, before)


def test_training_on_what_stays() -> None:
    model = tiny_model().train()
    inputs = make_batch(model, [[5, "image", 4, Answer(3)], [2, "image", 3, Answer(4)]], labels=True)
    with torch.no_grad():
        losses = []
        for logits in ("full", "kept"):
            with VisionDrop(keep=0.5, logits=logits)(model):
                losses.append(model(**inputs).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("next", VisionDrop(), "which patch of the vision tower a visual token is"),
        ("next", Downsample(), "which patch of the vision tower a visual token is"),
        ("llava", PyramidDrop(score="vision"), "ranks before the decoder alone; use VisionDrop"),
    ],
)
def test_what_cannot_work_is_refused_by_name(family: str, method: Any, words: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=words), method(model):
        pass
    assert not any("generate" in module.__dict__ for module in model.modules())


def test_other_scores_need_no_tower() -> None:
    model = tiny_model("next")
    inputs = make_batch(model, SPECS)
    with torch.no_grad(), VisionDrop(keep=0.5, score="uniform")(model) as trace:
        model(**inputs)
    assert [len(kept) for kept in trace.stages[0].kept] == [n // 2 for n in trace.visual_tokens]


@pytest.mark.parametrize("settings", [{"score": "attention"}, {"score": "variation"}, {"keep": 0}, {"keep": 1.5}])
def test_bad_arguments_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(settings)):
        VisionDrop(**settings)


@pytest.mark.parametrize("method", CONTROLS, ids=lambda method: f"{type(method).__name__}-{method.keep}")
def test_hidden_states_and_attention_come_at_full_length(method: Any) -> None:
    model = tiny_model(attention="eager")
    inputs = make_batch(model, SPECS)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), method(model) as trace:
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    kept = trace.stages[0].kept[0].tolist()
    gone = [column for column in trace.visual_columns[0].tolist() if column not in kept]
    fed, *states = output.hidden_states
    assert fed.shape[1] == length
    assert all(state.shape[1] == length and not state[0, gone].any() for state in states)
    assert all(
        weights.shape[-2:] == (length, length) and not weights[0, :, :, gone].any() for weights in output.attentions
    )
