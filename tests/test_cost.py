"""The cost model: the paper's printed figures, and true FLOPs held against PyTorch's own counter on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from pyramiddrop import FastV, Method, PyramidDrop, RandomDrop
from pyramiddrop.cost import (
    PRESETS,
    Account,
    DecoderShape,
    Experts,
    ModelShape,
    Prompt,
    account,
    activation_bytes,
    fastv_layer_flops,
    kv_bytes,
    paper_layer_flops,
)
from pyramiddrop.hf.shapes import model_shape, visual_tokens_of
from pyramiddrop.schedule import Schedule, powers
from tiny import make_batch, tiny_model

SHAPE = DecoderShape(layers=8, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocabulary=200)
SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}


def _fused(query: Any, key: Any, *shapes: Any, out_shape: Any = None, **settings: Any) -> int:
    """All pairs, causal or not, as the counter has it for CUDA's kernels: queries by keys, and weights by values."""
    batch, heads, rows, width = query
    return 4 * batch * heads * rows * key[2] * width


#: The counter knows the fused kernels of CUDA, not that of the CPU, which would pass for free.
FUSED_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused}


def counted(model: PreTrainedModel, inputs: dict[str, Any], method: Method | None = None, **given: Any) -> int:
    """FLOPs of a prefill as `generate` runs it, by PyTorch's counter."""
    if method is not None:
        with method(model, **given):
            return counted(model, inputs)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        model(**inputs, use_cache=True, logits_to_keep=1)
    return int(counter.get_total_flops())


def predicted(model: PreTrainedModel, prompt: Prompt, method: Method | None = None) -> Account:
    """The account of the model's own configuration."""
    shape = model_shape(model.config)
    schedule = method.schedule(shape.decoder.layers) if method else None
    return account(shape, prompt, schedule, ranks=not isinstance(method, RandomDrop))


@pytest.mark.parametrize("method", [None, PyramidDrop(lam=0.6), FastV(layer=2, keep=0.5), RandomDrop()])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "llava-gqa"])
def test_a_llava_prefill_is_what_the_counter_says(family: str, attention: str, method: Method | None) -> None:
    model = tiny_model(family, attention)
    inputs = make_batch(model, [[7, "image", "image", 9]])
    cost = predicted(model, Prompt(32, 16), method)
    assert cost.full.total == pytest.approx(counted(model, inputs, method), rel=0.001)


@pytest.mark.parametrize("method", [None, PyramidDrop()])
def test_a_llava_next_prefill_is_what_the_counter_says(method: Method | None) -> None:
    model = tiny_model("next")
    inputs = make_batch(model, [[7, "image", "image", 9]])
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    crops = inputs["pixel_values"].shape[0] * inputs["pixel_values"].shape[1]
    # The first image has one padded crop, which the tower does not see.
    cost = predicted(model, Prompt(visual, 16, crops - 2), method)
    assert cost.full.total == pytest.approx(counted(model, inputs, method), rel=0.001)


@pytest.mark.parametrize("method", [None, PyramidDrop(layers=[1, 2], keep=[0.5, 0.25])])
def test_a_text_model_with_grouped_queries_is_what_the_counter_says(method: Method | None) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    visual = torch.zeros(1, 60, dtype=torch.bool)
    visual[:, 5:45] = True
    given = {} if method is None else {"visual_mask": visual}
    cost = predicted(model, Prompt(40, 20), method)
    assert cost.full.total == pytest.approx(counted(model, {"inputs_embeds": torch.randn(1, 60, 64)}, method, **given))


@pytest.mark.parametrize(
    "model_of",
    [
        lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **MIXTURE, num_local_experts=4)),
        lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **SMALL,
                **MIXTURE,
                num_experts=6,
                moe_intermediate_size=48,
                shared_expert_intermediate_size=40,
                decoder_sparse_step=2,
                mlp_only_layers=[3],
            )
        ),
    ],
    ids=["mixtral", "qwen2-moe"],
)
def test_a_mixture_counts_the_active_experts(model_of: Any) -> None:
    torch.manual_seed(0)
    model = model_of().eval()
    cost = predicted(model, Prompt(40, 20))
    assert cost.full.total == pytest.approx(counted(model, {"input_ids": torch.randint(1, 200, (1, 60))}))


@pytest.mark.parametrize("merged", [8, 12])
@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5"])
def test_a_qwen_vision_tower_is_what_the_counter_says(kind: str, merged: int) -> None:
    torch.manual_seed(0)
    model = (_qwen2_vl() if kind == "qwen2" else _qwen25_vl()).eval()
    tokens = merged * merged
    inputs = {
        "input_ids": torch.tensor([[5, 6, *[190] * tokens, 7]]),
        "mm_token_type_ids": torch.tensor([[0, 0, *[1] * tokens, 0]]),
        "pixel_values": torch.randn(4 * tokens, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2 * merged, 2 * merged]]),
    }
    cost = predicted(model, Prompt(tokens, 3))
    assert cost.full.total == pytest.approx(counted(model, inputs), rel=0.01)


@pytest.mark.parametrize("method", [None, PyramidDrop()])
def test_a_decode_step_is_what_the_counter_says(method: Method | None) -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, [[7, "image", "image", 9]])
    if method is not None:
        with method(model):
            found = _counted_step(model, inputs)
    else:
        found = _counted_step(model, inputs)
    assert predicted(model, Prompt(32, 16), method).step_flops == pytest.approx(found, rel=0.001)


def _counted_step(model: PreTrainedModel, inputs: dict[str, Any]) -> int:
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
            model(input_ids=torch.tensor([[5]]), past_key_values=cache, cache_position=torch.tensor([48]))
    return int(counter.get_total_flops())


def _qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4}
    config = Qwen2VLConfig(text_config=_qwen_text(), vision_config=vision, image_token_id=190)
    return Qwen2VLForConditionalGeneration(config)


def _qwen25_vl() -> PreTrainedModel:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision, image_token_id=190)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_text() -> dict[str, Any]:
    return SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
