"""Dropping before the decoder and inside it, held against the slow reference, which masks what both have dropped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import reference
from checks import CLOSE, check_kept, check_logits, generated, new_tokens, same_gradients, stacked
from pyramiddrop import Compose, Downsample, FastV, Method, PyramidDrop, RandomDrop, VisionDrop, apply, current_method
from pyramiddrop.cost import PRESETS, ModelShape, Prompt, estimate_cost
from pyramiddrop.hf.versions import output_cache
from pyramiddrop.methods import remove
from pyramiddrop.schedule import PreLLMSchedule, Schedule
from reference import Case, Rule
from tiny import IMPLEMENTATIONS, Answer, collate, make_batch, make_rows, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MIXED = [[5, "image", 7], [3, "image", 2, "image", 4], [9]]
LESSONS = [[3, "image", 4, Answer(3), 2, Answer(2)], [4, Answer(3)], [2, "image", 3, "image", 2, Answer(2)]]
STAGES: dict[str, Any] = {"layers": [2, 4], "keep": [0.5, 0.25]}
METHODS: dict[str, Method] = {
    "vision": VisionDrop(keep=0.5) | PyramidDrop(**STAGES),
    "compact": VisionDrop(keep=0.5, positions="compact") | PyramidDrop(**STAGES, positions="compact"),
    "per image": VisionDrop(keep=0.7, per_image=True) | PyramidDrop(**STAGES, per_image=True),
    "fastv": VisionDrop(keep=0.5) | FastV(layer=1, keep=0.5),
    "exit": VisionDrop(keep=0.5) | PyramidDrop(layers=[2, 4], keep=[0.5, 0.0]),
    "downsample": Downsample(keep=0.3) | PyramidDrop(**STAGES),
    "keeps all inside": VisionDrop(keep=0.5) | PyramidDrop(layers=[2, 4], keep=[1.0, 0.5]),
}


# --- The reference ----------------------------------------------------------------------------------------------------


def parts(method: Method) -> tuple[Method, Method]:
    assert isinstance(method, Compose)
    return method.parts


def share(before: Any) -> float:
    """The share that is left before the decoder: of 4 x 4 patches a smaller picture has 2 x 2."""
    return 0.25 if isinstance(before, Downsample) else before.keep


def rule_of(method: Method) -> Rule:
    before, inside = parts(method)
    schedule = inside.schedule(8)
    keep = [share(before) * ratio for ratio in schedule.keep]
    return Rule(schedule.layers, keep, inside.positions, inside.rank_layer, inside.per_image)


@torch.no_grad()
def gone_before(model: PreTrainedModel, before: Any, inputs: dict[str, Tensor], case: Case) -> Tensor:
    """(B, L) the visual tokens that the first method drops, by the tower's own attention or the grid."""
    gone = torch.zeros_like(case.visual)
    if not bool(case.visual.any()):
        return gone
    if isinstance(before, Downsample):
        one = torch.tensor([[row % 2 == 0 and column % 2 == 0 for column in range(4)] for row in range(4)])
        received = one.flatten().float().repeat(len(inputs["pixel_values"]))
    else:
        with reference.eager(model.model.vision_tower):
            seen = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
        received = seen.mean(1)[:, 0, 1:].flatten()
    scores = torch.zeros(case.visual.shape).masked_scatter(case.visual, received)
    assert case.images is not None
    for sample in range(len(scores)):
        columns = case.visual[sample].nonzero()[:, 0].tolist()
        groups = {int(case.images[sample, c]) if before.per_image else 0 for c in columns}
        for group in groups:
            mine = [c for c in columns if not before.per_image or int(case.images[sample, c]) == group]
            count = max(1, math.floor(len(mine) * share(before)))
            held = [c for c in mine if case.protected is not None and case.protected[sample, c]]
            kept = sorted(mine, key=lambda c: (c not in held, -float(scores[sample, c]), c))[: max(count, len(held))]
            gone[sample, [c for c in mine if c not in kept]] = True
    return gone


def embedded(model: PreTrainedModel, before: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the decoder is fed with: features of the smaller picture, if that is the method."""
    if not isinstance(before, Downsample):
        return reference.embed(model, **inputs)
    with before(model):
        return reference.embed(model, **inputs)


def case_of(model: PreTrainedModel, method: Method, inputs: dict[str, Tensor], training: bool = False) -> Case:
    before, _ = parts(method)
    given = dict(inputs)
    case = reference.training_case(model, given) if training else reference.inference_case(model, given)
    given.pop("labels", None)
    case.embeds = embedded(model, before, given)
    case.gone = gone_before(model, before, given, case)
    return case


def check_trace(trace: Any, method: Method, case: Case, expected: reference.Result) -> None:
    rule = rule_of(method)
    assert case.gone is not None
    assert [stage.layer for stage in trace.stages] == [0, *rule.layers]
    first = case.visual & ~case.gone
    assert [kept.tolist() for kept in trace.stages[0].kept] == [row.nonzero()[:, 0].tolist() for row in first]
    for stage, kept in zip(trace.stages[1:], expected.kept, strict=True):
        assert [columns.tolist() for columns in stage.kept] == [columns.tolist() for columns in kept]
    assert trace.lengths == expected.lengths


# --- One forward ------------------------------------------------------------------------------------------------------


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_prefill(attention: str, name: str) -> None:
    model, method = tiny_model("llava-gqa", attention), METHODS[name]
    for specs, side in ([MIXED[0]], "left"), (MIXED, "left"), (MIXED, "right"):
        inputs = make_batch(model, specs, side)
        case = case_of(model, method, inputs)
        expected = reference.run(model, rule_of(method), case)
        with method(model) as trace:
            logits = model(**inputs).logits
        check_trace(trace, method, case, expected)
        check_logits(logits, expected)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_mates() -> None:
    model, method = tiny_model(), METHODS["vision"]
    rows = make_rows(model, MIXED)
    batch = collate(rows, "left")
    with method(model):
        together = model(**batch).logits[:, -1]
        alone = torch.cat([model(**collate([row])).logits[:, -1] for row in rows])
    torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.parametrize(
    "method",
    [
        VisionDrop(keep=1.0) | PyramidDrop(layers=[2, 4], keep=[1.0, 1.0]),
        VisionDrop(keep=1.0, positions="compact") | FastV(keep=1.0, positions="compact"),
    ],
    ids=repr,
)
@torch.no_grad()
def test_keep_one_in_both_changes_no_bit(method: Method) -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, MIXED)
    logits, tokens = model(**inputs).logits, generated(model, inputs, 3)
    with method(model):
        assert torch.equal(model(**inputs).logits, logits)
        patched = generated(model, inputs, 3)
    assert torch.equal(patched.sequences, tokens.sequences)
    assert all(torch.equal(a, b) for a, b in zip(patched.logits, tokens.logits, strict=True))


@torch.no_grad()
def test_keep_one_in_one_is_the_other_alone() -> None:
    model = tiny_model()
    inputs = make_batch(model, MIXED)
    pairs = (
        (VisionDrop(keep=1.0) | PyramidDrop(**STAGES), PyramidDrop(**STAGES)),
        (VisionDrop(keep=0.5) | PyramidDrop(layers=[2], keep=[1.0]), VisionDrop(keep=0.5)),
    )
    for both, one in pairs:
        with both(model):
            logits = model(**inputs).logits
        with one(model):
            torch.testing.assert_close(logits, model(**inputs).logits, **CLOSE)


# --- Generation and caches --------------------------------------------------------------------------------------------


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_generation(name: str, options: dict[str, Any]) -> None:
    model, method = tiny_model("llava-gqa"), METHODS[name]
    inputs = make_batch(model, MIXED)
    expected = reference.answer(model, rule_of(method), reference.Talk(case_of(model, method, inputs)), 4)
    with method(model) as trace:
        output = generated(model, inputs, 4, **options)
    assert expected.first is not None
    check_kept_inside(trace, expected.first)
    assert new_tokens(output, inputs) == stacked(expected.tokens)
    for logits, wanted in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, **CLOSE)


def check_kept_inside(trace: Any, expected: reference.Result) -> None:
    inside = type(trace)(stages=trace.stages[1:])
    check_kept(inside, expected)


@torch.no_grad()
def test_every_layer_s_cache_is_shorter_and_tells_the_columns_so_far() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    with METHODS["vision"](model) as trace:
        cache = output_cache(generated(model, inputs, 3))
    assert trace.lengths == [20, 20, 16, 16, 14, 14, 14, 14]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [length + 2 for length in trace.lengths]
    assert cache.get_seq_length() == 28 + 2


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", ["vision", "compact", "exit", "downsample"])
@torch.no_grad()
def test_further_turns_with_and_without_a_picture(name: str) -> None:
    model, method = tiny_model("llava-gqa"), METHODS[name]
    rule = rule_of(method)
    first = make_batch(model, [[5, "image", 7]])
    talk = reference.answer(model, rule, reference.Talk(case_of(model, method, first)), 3)
    turns = [make_batch(model, [[4]], seed=3), make_batch(model, [[3, "image", 4]], seed=2)]
    for turn in turns:
        next_turn(model, method, talk, turn)
    expected = [talk.tokens[start : start + 3] for start in (0, 3, 6)]
    with method(model):
        output = generated(model, first, 3)
        assert new_tokens(output, first) == stacked(expected[0])
        for turn, wanted in zip(turns, expected[1:], strict=True):
            ids = torch.cat([output.sequences, turn["input_ids"]], 1)
            further = {**turn, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            output = generated(model, further, 3, past_key_values=output_cache(output))
            assert new_tokens(output, further) == stacked(wanted)


def next_turn(model: PreTrainedModel, method: Method, talk: reference.Talk, turn: dict[str, Tensor]) -> None:
    """`reference.further_turn`, whose picture goes through the first method too."""
    own = case_of(model, method, turn)
    assert own.gone is not None
    start = talk.case.embeds.shape[1]
    talk.append(own.embeds, own.visual)
    stop = talk.case.embeds.shape[1]
    assert talk.case.gone is not None
    talk.case.gone[:, start:] = own.gone
    talk.case.turns.append(reference.Turn(start, stop, [[stop - 1]]))
    reference.answer(model, rule_of(method), talk, 3)


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("logits", ["full", "kept"])
@pytest.mark.parametrize("name", ["vision", "compact", "per image", "exit"])
def test_training(name: str, logits: str) -> None:
    given = {"logits": logits}
    before, inside = parts(METHODS[name])
    method = type(before)(**vars_of(before) | given) | type(inside)(**vars_of(inside) | given)
    model = tiny_model("llava-gqa").train()
    inputs = make_batch(model, LESSONS, "right", labels=True)
    case = case_of(model, method, inputs, training=True)
    expected = reference.run(model, rule_of(method), case)
    labels = reference.answers(case, inputs["labels"])
    loss = reference.next_token_loss(expected.logits, labels)
    wanted = gradients(model, loss)
    with method(model) as trace:
        ours = model(**inputs).loss
        check_trace(trace, method, case, expected)
        torch.testing.assert_close(ours, loss, **CLOSE)
        same_gradients(gradients(model, ours), wanted)


def vars_of(method: Any) -> dict[str, Any]:
    settings = {name: value for name, value in method.settings().items() if name != "method"}
    return {name: value for name, value in settings.items() if name not in method._fixed()}


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- A method like any other ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_it_travels_with_a_checkpoint(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    method.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "pyramiddrop.json").read_text())
    assert (told["method"], told["before"]["method"]) == ("Compose", type(parts(method)[0]).__name__)
    assert Method.from_pretrained(tmp_path) == Compose.from_pretrained(tmp_path) == method
    assert eval(repr(method)) == method


@torch.no_grad()
def test_apply_view_and_remove() -> None:
    model, method = tiny_model(), METHODS["vision"]
    inputs = make_batch(model, MIXED)
    before = model(**inputs).logits
    with method(model):
        expected = model(**inputs).logits
    view = method.view(model)
    assert torch.equal(view(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, before)
    apply(model, "vision:keep=0.5 | pyramiddrop:layers=2/4,keep=0.5/0.25")
    assert current_method(model) == method
    assert torch.equal(model(**inputs).logits, expected)
    remove(model)
    assert torch.equal(model(**inputs).logits, before)


def test_one_cost_over_all_stages() -> None:
    """The drop before the decoder ranks for nothing; those inside rank fewer rows."""
    llava, prompt = PRESETS["llava-1.5-7b"].shape, Prompt(576, 64)
    method = VisionDrop(keep=0.5) | PyramidDrop()
    schedule = method.schedule(32)
    assert schedule == PreLLMSchedule.keeping(0.5).inside(Schedule.of([8, 16, 24], [0.5, 0.25, 0.125]))
    cost = estimate_cost(llava, prompt, schedule, method.ranking_flops)
    assert cost.visual_by_layer == (288,) * 8 + (144,) * 8 + (72,) * 8 + (36,) * 8
    inside = estimate_cost(llava, Prompt(288, 64), PyramidDrop().schedule(32), PyramidDrop().ranking_flops)
    assert (cost.full.decoder, cost.full.ranking) == (inside.full.decoder, inside.full.ranking)


@torch.no_grad()
def test_the_trace_costs_what_the_cost_model_says() -> None:
    model, method = tiny_model(), METHODS["vision"]
    with method(model) as trace:
        model(**make_batch(model, [[5, "image", 7]]))
    shape = trace._shape
    assert shape is not None
    cost = estimate_cost(ModelShape(shape), Prompt(16, 12), method.schedule(8), method.ranking_flops)
    assert trace.cost().flops == cost.full.decoder + cost.full.ranking
    assert trace.cost().kv_bytes == cost.kv_bytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PyramidDrop() | VisionDrop(), r"comes first: VisionDrop\(\) \| PyramidDrop\(\)"),
        (lambda: PyramidDrop() | FastV(), "both drop inside the decoder: give all layers to one"),
        (lambda: VisionDrop() | Downsample(), "both drop before the decoder: use one of them"),
        (lambda: VisionDrop() | PyramidDrop() | FastV(), "a composition has two methods"),
        (lambda: VisionDrop() | (VisionDrop() | PyramidDrop()), "a composition has two methods"),
        (lambda: VisionDrop() | PyramidDrop(positions="compact"), "positions holds for a whole forward"),
        (lambda: VisionDrop(per_image=True) | RandomDrop(), "per_image holds for a whole forward"),
        (lambda: Compose(before={"method": "PyramidDrop"}), "both drop inside the decoder"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_anything_else_is_no_part_of_a_composition() -> None:
    with pytest.raises(TypeError):
        VisionDrop() | "pyramiddrop"  # type: ignore[operator]
