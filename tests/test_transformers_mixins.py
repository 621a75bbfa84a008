"""What Transformers' own test classes ask of a model (ModelTesterMixin, GenerationTesterMixin), asked of patched ones.

The package does not ship those classes; here are their generic checks, written small. With keep = 1 each must come out
as on the untouched model, to the last bit. Not here: what looks at a class and not at an object (initialisation, tied
weights, feed-forward chunking, quantisation), which hooks cannot change.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pyramiddrop import PyramidDrop, apply, remove
from pyramiddrop.hf.versions import cache_argument, output_cache
from zoo import MEMBERS, Answer, make_batch

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "internvl")
KEEP_ALL = PyramidDrop(layers=[2, 4, 6], keep=[1.0, 1.0, 1.0])
ROWS = [[5, "image", 7], [3, "image", 2]]
LESSON = [[3, "image", 4, Answer(3)], [2, "image", Answer(5)]]

Inputs = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, about its own new names


@cache
def built(family: str) -> PreTrainedModel:
    return MEMBERS[family].build(0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """The test's own."""
    return copy.deepcopy(built(family))


def batch(family: str, labels: bool = False) -> Inputs:
    side = "right" if labels else "left"
    return make_batch(MEMBERS[family], built(family), LESSON if labels else ROWS, side, labels=labels)


def identical(ours: Any, expected: Any) -> None:
    """Tensors, and lists and dicts of tensors, are equal to the last bit."""
    torch.testing.assert_close(ours, expected, atol=0, rtol=0, equal_nan=True)


def same(family: str, call: Callable[[PreTrainedModel, Inputs], Any], labels: bool = False) -> Any:
    """A patched model gives what the untouched one does; each has inputs of its own. Returns it."""
    results = []
    for method in (None, KEEP_ALL):
        model, inputs = copy.deepcopy(built(family)), batch(family, labels)
        if method is not None:
            apply(model, method)
        torch.manual_seed(0)
        results.append(call(model, inputs))
    identical(results[1], results[0])
    return results[1]


# --- ModelTesterMixin: a forward ------------------------------------------------------------------------------------


def details(output: Any) -> list[Any]:
    return [output.logits, *output.hidden_states, *output.attentions]


@torch.no_grad()
def all_outputs(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
    model.set_attn_implementation("eager")
    return details(model(**inputs, output_hidden_states=True, output_attentions=True))


@torch.no_grad()
def as_tuple(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    output = model(**inputs, return_dict=False, use_cache=False)
    assert type(output) is tuple
    return [output[0]]


@torch.no_grad()
def positional(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    return model(inputs.pop("input_ids"), **inputs).logits


@torch.no_grad()
def last_logits_alone(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    logits: Tensor = model(**inputs, logits_to_keep=1).logits
    assert logits.shape[1] == 1
    return logits


@torch.no_grad()
def with_positions(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    shape = inputs["input_ids"].shape
    return model(**inputs, position_ids=torch.arange(shape[1]).expand(shape)).logits


@torch.no_grad()
def whole_mask(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """A mask of four dimensions, made by the caller."""
    padding = inputs.pop("attention_mask").bool()
    length = padding.shape[1]
    seen = padding[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen | torch.eye(length, dtype=torch.bool)
    own = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return model(**inputs, attention_mask=own).logits


@torch.no_grad()
def text_alone(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    return model(input_ids=inputs["input_ids"][:, -2:]).logits


@torch.no_grad()
def in_bfloat16(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    return model.to(torch.bfloat16)(**cast(inputs, torch.bfloat16)).logits


@torch.no_grad()
def in_float64(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    return model.double()(**cast(inputs, torch.float64)).logits


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@torch.no_grad()
def resized(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """New rows of the embeddings and of the head; then fewer."""
    found = []
    for size in (210, 200):
        model.resize_token_embeddings(size)
        assert model.get_input_embeddings().num_embeddings == size
        logits = model(**inputs).logits
        assert logits.shape[-1] == size
        found.append(logits)
    return found


@torch.no_grad()
def with_other_embeddings(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    embeddings = torch.nn.Embedding(200, 64)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings
    return model(**inputs).logits


FORWARDS = (
    all_outputs,
    as_tuple,
    positional,
    last_logits_alone,
    with_positions,
    whole_mask,
    text_alone,
    in_bfloat16,
    in_float64,
    resized,
    with_other_embeddings,
)


@pytest.mark.fast_cases(9)
@pytest.mark.parametrize("call", FORWARDS, ids=lambda call: call.__name__)
def test_forward(family: str, call: Callable[[PreTrainedModel, Inputs], Any]) -> None:
    if (family, call) == ("qwen2_5_vl", whole_mask):
        pytest.skip("the untouched model makes its positions by a mask of two dimensions")
    same(family, call)


def test_hidden_states_and_attentions_have_the_shapes_of_the_full_length(family: str) -> None:
    model, inputs = copy.deepcopy(built(family)), batch(family)
    model.set_attn_implementation("eager")
    with torch.no_grad(), KEEP_ALL(model):
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    rows, length = inputs["input_ids"].shape
    assert [state.shape for state in output.hidden_states] == [(rows, length, 64)] * 9
    assert [weights.shape for weights in output.attentions] == [(rows, 4, length, length)] * 8


def test_embeddings_instead_of_ids(family: str) -> None:
    model, inputs = copy.deepcopy(built(family)), batch(family)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    visual = ids == model.config.image_token_id
    with torch.no_grad():
        expected = model(**inputs).logits
        with KEEP_ALL(model, visual_mask=visual) as trace:
            identical(model(**inputs).logits, expected)
    assert trace.visual_tokens == visual.sum(1).tolist()


def test_a_forward_twice_is_the_same(family: str, model: PreTrainedModel) -> None:
    inputs = batch(family)
    with torch.no_grad(), KEEP_ALL(model):
        identical(model(**inputs).logits, model(**inputs).logits)


def test_signatures_of_forward_stay(model: PreTrainedModel) -> None:
    def seen() -> list[inspect.Signature]:
        return [inspect.signature(module.forward) for module in model.modules()]

    before = seen()
    with KEEP_ALL(model):
        assert seen() == before
        assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"


def test_the_signature_of_generate_stays(model: PreTrainedModel) -> None:
    before = inspect.signature(model.generate)
    with KEEP_ALL(model):
        assert inspect.signature(model.generate) == before


# --- ModelTesterMixin: saving and copying ---------------------------------------------------------------------------


def test_a_round_trip_to_disk_while_patched(family: str, model: PreTrainedModel, tmp_path: Path) -> None:
    inputs = batch(family)
    with torch.no_grad():
        expected, names = model(**inputs).logits, list(model.state_dict())
        apply(model, KEEP_ALL)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert list(loaded.state_dict()) == names
        identical(loaded(**inputs).logits, expected)
        with PyramidDrop.from_pretrained(tmp_path)(loaded):
            identical(loaded(**inputs).logits, expected)


def test_the_state_dict_is_pickled_and_loaded_while_patched(
    family: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    inputs, vanilla = batch(family), built(family)
    apply(model, KEEP_ALL)
    identical(dict(model.state_dict()), dict(vanilla.state_dict()))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for state in (pickle.loads(pickle.dumps(model.state_dict())), torch.load(tmp_path / "weights.pt")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            assert not model.load_state_dict(state).missing_keys
            identical(model(**inputs).logits, vanilla(**inputs).logits)


def test_a_copy_of_a_patched_model_is_a_patched_model_of_its_own(family: str, model: PreTrainedModel) -> None:
    inputs = batch(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        apply(model, PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125]))
        other = copy.deepcopy(model)
        dropped = model(**inputs).logits
        remove(model)
        identical(model(**inputs).logits, expected)
        identical(other(**inputs).logits, dropped)
        identical(other.generate(**inputs, max_new_tokens=2, do_sample=False), generated_pruned(model, inputs))
        remove(other)
        identical(other(**inputs).logits, expected)


def generated_pruned(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    with PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])(model):
        tokens: Tensor = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return tokens


# --- ModelTesterMixin: training -------------------------------------------------------------------------------------


def learned(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
    """The loss, every gradient, and the weights after a step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    optimizer.step()
    return [loss.detach(), gradients, dict(model.state_dict())]


def checkpointed(reentrant: bool) -> Callable[[PreTrainedModel, Inputs], Any]:
    def learn(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        return learned(model, inputs)

    return learn


def input_gradients(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
    model.enable_input_require_grads()
    return learned(model, inputs)


def frozen(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
    """The text model alone learns."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" not in name and "visual" not in name)
    return learned(model, inputs)


def retained(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Gradients of hidden states and attentions."""
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    kept = [*output.hidden_states[1:], *output.attentions]
    for tensor in kept:
        tensor.retain_grad()
    output.logits[:, -1].sum().backward()
    gradients = [tensor.grad for tensor in kept]
    assert all(gradient is not None for gradient in gradients[:-9])
    return [gradient for gradient in gradients if gradient is not None]


TRAININGS: dict[str, Callable[[PreTrainedModel, Inputs], Any]] = {
    "plain": learned,
    "reentrant": checkpointed(True),
    "not reentrant": checkpointed(False),
    "input gradients": input_gradients,
    "frozen tower": frozen,
    "retained": retained,
}


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize("way", TRAININGS)
def test_training(family: str, way: str) -> None:
    same(family, TRAININGS[way], labels=True)


# --- GenerationTesterMixin ------------------------------------------------------------------------------------------

GENERATIONS: dict[str, Inputs] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams sampled": {"num_beams": 2, "do_sample": True},
    "several of each": {"do_sample": True, "num_return_sequences": 3},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "processed": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
}


def generated(model: PreTrainedModel, inputs: Inputs, **options: Any) -> list[Any]:
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    output = model.generate(**inputs, max_new_tokens=4, **options)
    return [output.sequences, *output.logits]


@pytest.mark.fast_cases(7)
@pytest.mark.parametrize("way", GENERATIONS)
def test_generation(family: str, way: str) -> None:
    same(family, lambda model, inputs: generated(model, inputs, **GENERATIONS[way]))


def alone(inputs: Inputs, family: str) -> Inputs:
    return make_batch(MEMBERS[family], built(family), ROWS[:1])


def test_generation_with_guesses(family: str) -> None:
    """Prompt lookup, and a copy of the model as its own assistant."""

    def assisted(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
        return generated(model, alone(inputs, family), assistant_model=copy.deepcopy(built(family)))

    def lookup(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
        return generated(model, alone(inputs, family), prompt_lookup_num_tokens=2)

    same(family, lookup)
    if family == "llava":
        same(family, assisted)


def test_all_outputs_of_a_generation(family: str) -> None:
    def call(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
        model.set_attn_implementation("eager")
        wanted = ("output_scores", "output_hidden_states", "output_attentions", "return_dict_in_generate")
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, **dict.fromkeys(wanted, True))
        assert len(output.hidden_states) == len(output.attentions) == 3
        steps = zip(output.scores, output.hidden_states, output.attentions, strict=True)
        return [output.sequences, *([score, *hidden, *weights] for score, hidden, weights in steps)]

    same(family, call)


def test_a_generation_goes_on_from_a_cache(family: str) -> None:
    """All at once, or some tokens and then more: the same, and as untouched."""

    def call(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
        single = alone(inputs, family)
        first = model.generate(**single, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        ids = first.sequences
        mask = torch.ones_like(ids)
        more = model.generate(
            input_ids=ids, attention_mask=mask, **cache_argument(output_cache(first)), max_new_tokens=2, do_sample=False
        )
        whole = model.generate(**single, max_new_tokens=4, do_sample=False)
        assert more.tolist() == whole.tolist()
        return [more, output_cache(first).layers[5].keys]

    same(family, call)


def test_a_cache_of_the_callers(family: str) -> None:
    @torch.no_grad()
    def call(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
        cache = DynamicCache(config=model.config.get_text_config())
        logits = model(**inputs, **cache_argument(cache)).logits
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return [logits, *held, cache.get_seq_length()]

    same(family, call)


def test_generation_from_embeddings(family: str) -> None:
    model, inputs = copy.deepcopy(built(family)), alone({}, family)
    ids = inputs.pop("input_ids")
    inputs = {"attention_mask": inputs["attention_mask"], "inputs_embeds": model.get_input_embeddings()(ids).detach()}
    expected = generated(model, inputs)
    with KEEP_ALL(model, visual_mask=ids == model.config.image_token_id):
        identical(generated(model, inputs), expected)


def test_generation_in_half_precision(family: str) -> None:
    def call(model: PreTrainedModel, inputs: Inputs) -> list[Any]:
        return generated(model.to(torch.bfloat16), cast(inputs, torch.bfloat16))

    same(family, call)
