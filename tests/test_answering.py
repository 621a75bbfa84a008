"""Answers in batches: those of single samples, on every kind of checkpoint; and the cost of each for itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from checkpoints import save_checkpoint
from pyramiddrop import Downsample, FastV, Method, PyramidDrop, RandomDrop, VisionDrop
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.budgets import decoder_flops
from pyramiddrop.evaluation.prefill_replay import PrefillReplay
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.inference import InputError
from pyramiddrop.inference.answer import ask
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.prefill_stats import usage, vanilla_usage
from pyramiddrop.inference.prompt import build_inputs

METHODS = [
    None,
    PyramidDrop(),
    FastV(layer=2, keep=0.3),
    RandomDrop(),
    PyramidDrop(score="instruction", merge=True),
    PyramidDrop(score="diversity"),
]


def picture(seed: int) -> Image.Image:
    noise = torch.randint(256, (30, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


SAMPLES = [
    Sample((picture(0),), "w7"),
    Sample((picture(1), picture(2)), "w8 w9 w10 w11 w12"),
    Sample((picture(3),), "w9 w3 w4"),
]


@pytest.fixture(scope="module")
def tiny(llava_folder: Path) -> Checkpoint:
    return load_checkpoint(llava_folder, "cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Without a chat template: asked in the format of the first LLaVA models."""
    return load_checkpoint(save_checkpoint(tmp_path_factory.mktemp("plain"), chat_template=None), "cpu")


@pytest.fixture(scope="module")
def tiles(next_folder: Path) -> Checkpoint:
    return load_checkpoint(next_folder, "cpu")


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["tiny", "plain", "tiles"])
def test_a_batch_replies_as_single_samples_do(name: str, method: Method | None, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(name)
    together = Answerer(checkpoint, batch=3, max_new_tokens=3).answers(SAMPLES, method)
    alone = Answerer(checkpoint, batch=1, max_new_tokens=3).answers(SAMPLES, method)
    assert together == alone
    assert len({reply.usage.visual_tokens for reply in together}) > 1


#: Methods that go on with the untouched model's first layers, and such that cannot.
SHARING = [*METHODS[1:], PyramidDrop(layers=[1, 5], keep=[0.5, 0.1]), FastV(layer=1), PyramidDrop(rank_layer="last")]
ALONE = [PyramidDrop(score="variation"), VisionDrop(), Downsample(keep=0.3)]


@pytest.mark.parametrize("vanilla", [True, False])
@pytest.mark.parametrize("name", ["tiny", "tiles"])
def test_methods_that_share_a_prefill_reply_as_they_do_alone(
    name: str, vanilla: bool, request: pytest.FixtureRequest
) -> None:
    answerer = Answerer(request.getfixturevalue(name), batch=3, max_new_tokens=3)
    methods = [*([None] if vanilla else []), *SHARING, *(ALONE if name == "tiny" else [])]
    together = list(answerer.answers_by_method(SAMPLES, methods))
    assert together == [answerer.answers(SAMPLES, method) for method in methods]


@pytest.mark.parametrize(
    ("methods", "layers"),
    [
        ([None], [8]),
        ([PyramidDrop()], [8]),
        ([None, PyramidDrop()], [8, 6]),  # the drop is before layer 2
        ([None, PyramidDrop(), FastV(layer=3)], [8, 6, 6]),  # layer 2 ranks
        ([FastV(layer=1), PyramidDrop(layers=[6], keep=[0.5])], [8 + 8, 2]),  # and one prefill for both
        ([None, PyramidDrop(score="variation")], [8, 8]),
    ],
)
def test_layers_that_methods_share_run_once(
    tiny: Checkpoint, methods: list[Method | None], layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = Answerer(tiny, batch=1, max_new_tokens=1)
    list(answerer.answers_by_method(SAMPLES[:1], [None, FastV()]))  # tries once whether the model can
    ran: list[int] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(inspect_model(tiny.model).layers)
    ]
    try:
        counts = []
        for _ in answerer.answers_by_method(SAMPLES[:1], methods):
            counts.append(len(ran))
            ran.clear()
    finally:
        for handle in handles:
            handle.remove()
    assert counts == layers


def test_a_model_that_cannot_share_answers_each_method_alone(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = PrefillReplay._replay
    monkeypatch.setattr(PrefillReplay, "_replay", lambda *args, **kwargs: replay(*args, **kwargs) * 1.5)
    answerer = Answerer(tiny, batch=3, max_new_tokens=3)
    assert list(answerer.answers_by_method(SAMPLES, METHODS)) == [answerer.answers(SAMPLES, one) for one in METHODS]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["tiny", "plain", "tiles"])
def test_what_answers_will_cost_is_known_before_they_are_given(
    name: str, method: Method | None, request: pytest.FixtureRequest
) -> None:
    answerer = Answerer(request.getfixturevalue(name), batch=2, max_new_tokens=1)
    prompts, replies = answerer.prompts(SAMPLES), answerer.answers(SAMPLES, method)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert (prompt.visual_tokens, prompt.text_tokens) == (reply.usage.visual_tokens, reply.usage.text_tokens)
        assert 0 < prompt.num_queries < prompt.text_tokens  # something stands before the pictures, too
    shape = inspect_model(answerer.checkpoint.model).shape
    assert decoder_flops(method, shape, Counter(prompts)) == sum(reply.usage.flops for reply in replies)


@pytest.mark.parametrize("method", METHODS)
def test_a_reply_is_what_a_user_gets_and_pays(tiny: Checkpoint, method: Method | None) -> None:
    for reply, sample in zip(Answerer(tiny, max_new_tokens=3).answers(SAMPLES, method), SAMPLES, strict=True):
        inputs = build_inputs(tiny.processor, sample.images, sample.question)
        answer = ask(tiny, inputs, method, max_new_tokens=3)
        assert reply.text == answer.text
        assert reply.vanilla == vanilla_usage(tiny.model, inputs)
        assert reply.usage == (usage(answer.trace) if answer.trace else reply.vanilla)


def test_progress_is_told_and_the_model_left_alone(tiny: Checkpoint) -> None:
    done: list[int] = []
    Answerer(tiny, batch=2, max_new_tokens=1).answers(SAMPLES, PyramidDrop(), done.append)
    assert done == [2, 1]
    with PyramidDrop()(tiny.model):  # refused where a method had been left on it
        pass


def test_a_bad_question_stops_it_and_leaves_the_model_alone(tiny: Checkpoint) -> None:
    bad = Sample((picture(0),), "w7 <image>")
    with pytest.raises(InputError, match="must not hold <image>"):
        Answerer(tiny, batch=2).answers([*SAMPLES, bad], PyramidDrop())
    with PyramidDrop()(tiny.model):
        pass


def test_padding_leaves_the_processor_as_it_was(plain: Checkpoint) -> None:
    tokenizer = plain.processor.tokenizer
    before = tokenizer.padding_side, tokenizer.pad_token = "right", None
    Answerer(plain, batch=3, max_new_tokens=1).answers(SAMPLES)
    assert (tokenizer.padding_side, tokenizer.pad_token) == before
