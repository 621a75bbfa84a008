"""Another prompt that is asked inside `generate` is ranked and dropped by its own tokens, and the generation goes on as
if nobody had asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

from pyramiddrop import FastV, Method, PyramidDrop, VisionDrop
from pyramiddrop.trace import Trace
from tiny import make_batch, text_model, tiny_model

LAYERS = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]}
METHODS: dict[str, Method] = {
    "pyramiddrop": PyramidDrop(**LAYERS),
    "compact": PyramidDrop(**LAYERS, positions="compact"),
    "fastv": FastV(layer=2, keep=0.5),
    "vision": VisionDrop(keep=0.25),
    "keep=1": PyramidDrop(layers=[2, 4, 6], keep=[1.0] * 3),
}
OTHERS: dict[str, list[list[Any]]] = {
    "text": [[30]],
    "as long": [[28]],
    "image elsewhere": [[12, "image", 4]],
    "two images": [[3, "image", 2, "image", 4]],
    "two samples": [[30], [9, "image"]],
}
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llava-gqa")


@pytest.fixture(scope="module")
def prompt(model: PreTrainedModel) -> dict[str, Tensor]:
    return make_batch(model, [[5, "image", 7]])


class Ask(LogitsProcessor, StoppingCriteria):
    """Asks in each step, as a verifier does, and leaves the scores as they are."""

    def __init__(self, question: Callable[[], Any]) -> None:
        self.question, self.answers = question, []

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.answers.append(self.question())
        return scores if isinstance(scores, Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)


def same_trace(trace: Trace, wanted: Trace) -> bool:
    kept = zip(trace.stages, wanted.stages, strict=True)
    return trace.lengths == wanted.lengths and all(
        torch.equal(a, b) for stage, other in kept for a, b in zip(stage.kept, other.kept, strict=True)
    )


def answered(
    model: PreTrainedModel, method: Method, prompt: dict[str, Tensor], **options: Any
) -> tuple[list[Tensor], Tensor, Trace]:
    """Logits, ids and trace of a generation with a method."""
    with method(model) as trace:
        output = model.generate(**prompt, **(OPTIONS | options))
    return output.logits, output.sequences, trace


def asks(model: PreTrainedModel, other: dict[str, Tensor], how: str) -> Callable[[], Tensor]:
    def question() -> Tensor:
        config = model.config.get_text_config()
        given: dict[str, Any] = {
            "uncached": {"use_cache": False},
            "cached": {"use_cache": True},
            "own cache": {"past_key_values": DynamicCache(config=config)},
            "static cache": {"past_key_values": StaticCache(config=config, max_cache_len=64)},
        }[how]
        logits: Tensor = model(**other, **given).logits[:, -1]
        return logits

    return question


HOW = ("uncached", "cached", "own cache", "static cache")
ASKED = [
    *(("pyramiddrop", other, how) for other in OTHERS for how in HOW),
    *((name, other, how) for name in METHODS for other in ("text", "two images") for how in ("uncached", "own cache")),
]


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize(("name", "other", "how"), sorted(set(ASKED)))
def test_a_prompt_inside_generate_is_its_own(
    model: PreTrainedModel, prompt: dict[str, Tensor], name: str, other: str, how: str
) -> None:
    method, batch = METHODS[name], make_batch(model, OTHERS[other], seed=9)
    with method(model):
        wanted = model(**batch).logits[:, -1]
    ask = Ask(asks(model, batch, how))
    for use_cache in (True, False):
        alone = answered(model, method, prompt, use_cache=use_cache)
        asked = answered(model, method, prompt, use_cache=use_cache, logits_processor=LogitsProcessorList([ask]))
        assert torch.equal(alone[1], asked[1])
        assert all(torch.equal(a, b) for a, b in zip(alone[0], asked[0], strict=True))
        assert same_trace(asked[2], alone[2])
    assert len(ask.answers) == 6
    assert all(torch.allclose(answer, wanted, atol=1e-5) for answer in ask.answers)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [9, 28, 60])
@pytest.mark.parametrize("beams", [1, 2])
def test_guidance_asks_its_negative_prompt_alone(
    model: PreTrainedModel, prompt: dict[str, Tensor], length: int, use_cache: bool, beams: int
) -> None:
    negative = torch.randint(2, 190, (beams, length), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "output_scores": True}
    with METHODS["pyramiddrop"](model):
        output = model.generate(**prompt, **OPTIONS, **options, use_cache=use_cache, num_beams=beams)
        unguided = model(input_ids=negative, use_cache=False).logits[:, -1].log_softmax(-1)
    guided = 1.5 * (output.logits[0].log_softmax(-1) - unguided) + unguided
    if beams == 1:
        assert torch.allclose(output.scores[0], guided, atol=1e-5)
    # The steps after it, against guidance that asks the untouched model: the negative prompt holds text alone.
    other = tiny_model("llava-gqa")
    guide = Guidance(1.5, other, negative, use_cache=use_cache)
    with METHODS["pyramiddrop"](model):
        wanted = model.generate(
            **prompt, **OPTIONS, use_cache=use_cache, num_beams=beams, logits_processor=LogitsProcessorList([guide])
        )
    assert torch.equal(output.sequences, wanted.sequences)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("name", ["pyramiddrop", "vision"])
def test_a_generation_inside_another_is_its_own(
    model: PreTrainedModel, prompt: dict[str, Tensor], name: str, where: str, use_cache: bool
) -> None:
    method, inner = METHODS[name], make_batch(model, OTHERS["image elsewhere"], seed=9)
    wanted = answered(model, method, inner)[1]
    alone = answered(model, method, prompt, use_cache=use_cache)
    ask = Ask(lambda: model.generate(**inner, max_new_tokens=3, do_sample=False))
    asking = {where: (LogitsProcessorList if where == "logits_processor" else StoppingCriteriaList)([ask])}
    asked = answered(model, method, prompt, use_cache=use_cache, **asking)
    assert torch.equal(alone[1], asked[1])
    assert same_trace(asked[2], alone[2])
    assert all(torch.equal(answer, wanted) for answer in ask.answers)


@pytest.mark.parametrize("name", ["pyramiddrop", "compact"])
def test_the_model_assists_itself(model: PreTrainedModel, prompt: dict[str, Tensor], name: str) -> None:
    alone = answered(model, METHODS[name], prompt, max_new_tokens=8)
    assisted = answered(model, METHODS[name], prompt, max_new_tokens=8, assistant_model=model)
    looked_up = answered(model, METHODS[name], prompt, max_new_tokens=8, prompt_lookup_num_tokens=3)
    for other in (assisted, looked_up):
        assert torch.equal(other[1], alone[1])
        assert other[2].stages[0].kept[0].tolist() == alone[2].stages[0].kept[0].tolist()


def test_a_further_turn_of_one_token_is_no_other_prompt(model: PreTrainedModel, prompt: dict[str, Tensor]) -> None:
    """The generation's first forward is a single token on a cache: what is asked inside is not its prompt."""
    other = make_batch(model, OTHERS["image elsewhere"], seed=9)
    config = model.config.get_text_config()
    ids = torch.cat([prompt["input_ids"], torch.tensor([[11]])], 1)
    for ask in (None, Ask(asks(model, other, "cached"))):
        cache = DynamicCache(config=config)
        with METHODS["pyramiddrop"](model) as trace:
            wanted = model(**other).logits[:, -1]
            model(**prompt, past_key_values=cache)
            lengths = list(trace.lengths)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                logits_processor=LogitsProcessorList([ask] if ask else []),
                **OPTIONS,
            )
            assert list(trace.lengths) == lengths
        if ask is None:
            alone = output.sequences
        else:
            assert torch.equal(output.sequences, alone)
            assert all(torch.allclose(answer, wanted, atol=1e-5) for answer in ask.answers)


def test_text_inside_the_generation_of_embeddings_needs_no_mask(
    model: PreTrainedModel, prompt: dict[str, Tensor]
) -> None:
    """The user's mask is the prompt's; the ids of a negative prompt are text, to a model that knows no image."""
    text = LlamaForCausalLM(text_model(model).config).eval()
    embeddings = text.get_input_embeddings()(torch.randint(2, 190, (1, 28), generator=torch.Generator().manual_seed(3)))
    visual = torch.zeros(1, 28, dtype=torch.bool)
    visual[:, 5:21] = True
    negative = torch.randint(2, 190, (1, 28), generator=torch.Generator().manual_seed(1))
    with METHODS["pyramiddrop"](text, visual_mask=visual) as trace:
        output = text.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(1, 28, dtype=torch.long),
            guidance_scale=1.5,
            negative_prompt_ids=negative,
            output_scores=True,
            **OPTIONS,
        )
        assert trace.lengths[-1] == 28 - 14
    unguided = text(input_ids=negative).logits[:, -1].log_softmax(-1)
    guided = 1.5 * (output.logits[0].log_softmax(-1) - unguided) + unguided
    assert torch.allclose(output.scores[0], guided, atol=1e-5)


@pytest.mark.parametrize("sequences", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_and_samples_are_steps_of_their_prompt(
    model: PreTrainedModel, sequences: dict[str, Any], use_cache: bool
) -> None:
    """Rows that `generate` repeats and reorders are never taken for another prompt: cached and uncached agree."""
    batch = make_batch(model, [[5, "image", 7], [20], [2, "image", 1, "image"]])
    options = {"max_new_tokens": 4, "do_sample": False, **sequences}
    found = []
    for cached in (use_cache, True):
        torch.manual_seed(0)
        with METHODS["pyramiddrop"](model):
            found.append(model.generate(**batch, use_cache=cached, **options))
    assert torch.equal(*found)
