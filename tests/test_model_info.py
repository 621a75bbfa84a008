"""What a model is made of, and what is refused by name before anything is hooked."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from pyramiddrop import PyramidDrop, UnsupportedModelError
from pyramiddrop.hf.model_info import inspect_model
from tiny import CROP, tiny_model


def test_images_of_llava_next_have_as_many_tokens_as_the_model_makes() -> None:
    model = tiny_model("next")
    info, generator = inspect_model(model), random.Random(0)
    for size in [(generator.randint(5, 200), generator.randint(5, 200)) for _ in range(60)]:
        crops = image_size_to_num_patches(size, model.config.image_grid_pinpoints, CROP)
        sizes = torch.tensor([size])
        with torch.no_grad():
            made = model.model.get_image_features(torch.zeros(1, crops, 3, CROP, CROP), sizes).pooler_output
        assert info.image_lengths({"image_sizes": sizes}, torch.zeros(1, 1, dtype=torch.bool)) == [len(made[0])]


def test_the_parts_of_a_wrapped_model_are_found() -> None:
    model = tiny_model()
    wrapper = nn.Sequential(model)
    info = inspect_model(wrapper)
    assert info.wrappers[0] is wrapper
    assert info.generator is model
    assert info.text is model.model.language_model
    assert info.shape.layers == len(info.layers) == 8


def refused(model: nn.Module, message: str, **settings: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message), PyramidDrop(**settings)(model):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules()), "refused, but half patched"


def test_an_unknown_family_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10))
    refused(model, "'gpt2' .* is not supported: it has no decoder with `layers` and `embed_tokens`")


def test_a_module_without_a_transformers_model_is_refused() -> None:
    refused(nn.Linear(2, 2), "Linear holds no Transformers model")


def test_flex_attention_is_refused() -> None:
    model = tiny_model()
    model.model.language_model.config._attn_implementation_internal = "flex_attention"
    refused(model, "'flex_attention' is not supported")


def test_compact_positions_are_refused_for_rope_that_depends_on_the_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model(rope_parameters=rope)
    refused(model, "undefined for 'dynamic' RoPE", positions="compact")
    with PyramidDrop()(model):
        pass
