"""Transformers whose next version renames or loses what dropping relies on: fakes of it are errors by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: F401 (by which a module of layers is known)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from pyramiddrop import Downsample, FastV, PyramidDrop, UniformDrop, UnsupportedModelError, VisionDrop
from pyramiddrop.hf.versions import CACHE_NAME, cache_argument, cache_of
from tiny import make_batch, text_model, tiny_model

METHODS = [PyramidDrop(layers=[2, 5], keep=[0.5, 0.25]), FastV(), UniformDrop()]
RUN = "pyramiddrop_forward"


def with_layers(kind: type[LlamaDecoderLayer]) -> PreTrainedModel:
    """The tiny model, whose decoder layers are of this class."""
    model = tiny_model()
    for layer in text_model(model).layers:
        layer.__class__ = kind
    return model


def with_text(kind: type[LlamaModel]) -> PreTrainedModel:
    model = tiny_model()
    text_model(model).__class__ = kind
    return model


def called_with(rename: dict[str, str], **changes: Callable[..., Any]) -> type[LlamaDecoderLayer]:
    """A layer that its text model calls with other names, and that takes them."""

    class Renamed(LlamaDecoderLayer):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **{rename.get(name, name): value for name, value in kwargs.items()})

        @wraps(LlamaDecoderLayer.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            back = {new: old for old, new in rename.items()}
            return super().forward(*args, **{back.get(name, name): value for name, value in kwargs.items()})

    return Renamed


def prefill(model: PreTrainedModel, method: Any, **options: Any) -> Any:
    with method(model), torch.no_grad():
        return model(**make_batch(model, [[5, "image", 7]]), **options)


# --- Names in signatures, when a method is applied ------------------------------------------------------------------


class OtherLayer(LlamaDecoderLayer):
    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None, state: Any = None
    ) -> Tensor: ...


class OtherMask(LlamaDecoderLayer):
    def forward(
        self, hidden_states: Tensor, mask: Any = None, position_embeddings: Any = None, cache: Any = None
    ) -> Tensor: ...


class OtherPositions(LlamaDecoderLayer):
    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, rotary: Any = None, cache: Any = None
    ) -> Any: ...


class OtherText(LlamaModel):
    def forward(self, embeddings: Any = None, attention_mask: Any = None, cache: Any = None, **kwargs: Any) -> Any: ...


class OtherLabels(LlavaForConditionalGeneration):
    __module__ = "transformers.models.llava.modeling_llava"

    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None, **k: Any
    ) -> Any: ...


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("method", [*METHODS, VisionDrop()])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherLayer, "OtherLayer.forward has no argument 'cache' or 'past_key_values'"),
        (OtherMask, "OtherMask.forward has no argument 'attention_mask'"),
        (OtherPositions, "OtherPositions.forward has no argument 'position_embeddings' or 'position_ids'"),
        (OtherText, "OtherText.forward has no argument 'inputs_embeds'"),
        (OtherLabels, "OtherLabels.forward has no argument 'labels'"),
    ],
)
def test_a_renamed_argument_is_named_when_a_method_is_applied(kind: Any, message: str, method: Any) -> None:
    model = with_layers(kind) if issubclass(kind, LlamaDecoderLayer) else tiny_model()
    if kind is OtherText:
        model = with_text(kind)
    if kind is OtherLabels:
        model.__class__ = kind
    with pytest.raises(UnsupportedModelError, match=f"{message}. Transformers 5"), method(model):
        pass


def test_a_subclass_may_name_less_than_its_transformers_model() -> None:
    class Mine(LlavaForConditionalGeneration):
        def forward(self, input_ids: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)

    model = tiny_model()
    expected = prefill(model, METHODS[0]).logits
    model.__class__ = Mine
    assert torch.equal(prefill(model, METHODS[0]).logits, expected)


# --- Names in calls, at the first prefill ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_that_layers_are_given_under_another_name(method: Any) -> None:
    model = with_layers(called_with({CACHE_NAME: "state"}))
    with pytest.raises(UnsupportedModelError, match="Renamed is given its KV cache as 'state', not as 'cache'"):
        prefill(model, method, use_cache=True)


@pytest.mark.parametrize("method", METHODS)
def test_position_tables_that_layers_are_given_under_another_name(method: Any) -> None:
    model = with_layers(called_with({"position_embeddings": "rotary"}))
    with pytest.raises(UnsupportedModelError, match="Renamed is given 'rotary', tensors of all 28 tokens"):
        prefill(model, method)


@pytest.mark.parametrize("method", [*METHODS, VisionDrop(), Downsample()])
def test_a_cache_that_the_model_is_given_under_another_name(method: Any) -> None:
    class State(LlavaForConditionalGeneration):
        def forward(self, input_ids: Any = None, state: Any = None, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids, **kwargs, **cache_argument(state))

    model = tiny_model()
    model.__class__ = State
    with pytest.raises(UnsupportedModelError, match="State is given its KV cache as 'state'"):
        prefill(model, method, state=DynamicCache())


def test_a_layer_that_finds_its_cache_elsewhere() -> None:
    class Remembers(LlamaDecoderLayer):
        @wraps(LlamaDecoderLayer.forward)
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            held = cache_of(kwargs) or self.__dict__.get("held")
            return super().forward(hidden_states, **kwargs | cache_argument(held))

    model = with_layers(Remembers)
    held = DynamicCache(config=model.config.get_text_config())
    for layer in text_model(model).layers:
        layer.__dict__["held"] = held
    with pytest.raises(UnsupportedModelError, match="ranking by Remembers 2 wrote to the KV cache"):
        prefill(model, METHODS[0], **cache_argument(held))


# --- Hooks that are not called --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_text_model_that_does_not_pass_keywords_on(method: Any) -> None:
    class Keeps(LlamaModel):
        @wraps(LlamaModel.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **{name: kwargs[name] for name in kwargs if name != RUN})

    with pytest.raises(UnsupportedModelError, match="Keeps ran without the drop before layer 2"):
        prefill(with_text(Keeps), method)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("past", [range(8), range(2, 8), range(2, 3)])
def test_layers_that_are_called_past_their_hooks(past: range, method: Any) -> None:
    class Past(LlamaDecoderLayer):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.self_attn.layer_idx not in past:
                return super().__call__(*args, **kwargs)
            return self.forward(*args, **{name: kwargs[name] for name in kwargs if name != RUN})

    with pytest.raises(UnsupportedModelError, match="LlamaModel ran without the drop before layer 2"):
        prefill(with_layers(Past), method)


@pytest.mark.parametrize("method", [*METHODS, VisionDrop(), Downsample()])
def test_a_text_model_that_is_called_past_its_hooks(method: Any) -> None:
    class Past(LlamaModel):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

    with pytest.raises(UnsupportedModelError, match="LlavaModel did not pass its keyword arguments on to Past, or"):
        prefill(with_text(Past), method)


def test_a_model_that_does_not_pass_keywords_on_to_its_text_model() -> None:
    class Keeps(LlavaModel):
        @wraps(LlavaModel.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **{name: kwargs[name] for name in kwargs if name != RUN})

    model = tiny_model()
    inputs = make_batch(model, [[5, "image", 7]])
    expected = prefill(model, METHODS[0]).logits
    model.model.__class__ = Keeps
    with pytest.raises(ValueError, match="visual_mask is needed"):
        prefill(model, METHODS[0])
    # The text model opens a run of its own where the user says which tokens are visual.
    with METHODS[0](model, visual_mask=inputs["input_ids"] == 199), torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


# --- What dropping does not rely on ---------------------------------------------------------------------------------


def test_a_cache_whose_update_has_another_name() -> None:
    class Appends(DynamicCache):
        def append(self, *args: Any, **kwargs: Any) -> Any:
            return super().update(*args, **kwargs)

        def update(self, *args: Any, **kwargs: Any) -> Any:
            return self.append(*args, **kwargs)

    model = tiny_model()
    config = model.config.get_text_config()
    expected, found = (
        prefill(model, METHODS[0], **cache_argument(kind(config=config))) for kind in (DynamicCache, Appends)
    )
    assert torch.equal(found.logits, expected.logits)
