"""The cost model: the paper's printed figures, and true FLOPs held against PyTorch's own counter on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaNextConfig,
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
    CostBreakdown,
    DecoderShape,
    Experts,
    ModelShape,
    Prompt,
    activation_bytes,
    attention_ranking_flops,
    estimate_cost,
    fastv_layer_flops,
    kv_bytes,
    paper_layer_flops,
)
from pyramiddrop.cost.model_sizes import model_shape, visual_tokens_of
from pyramiddrop.evaluation.paper import Figure, paper_figures
from pyramiddrop.hf.versions import cache_argument, output_cache
from pyramiddrop.schedule import Schedule, powers
from pyramiddrop.scoring import SCORERS
from pyramiddrop.scoring.attention import InstructionScorer
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
# Older Transformers make the angles of the rotation by a matrix product, which is counted by PyTorch and not by us.
ROTARY = 1e-4
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
    with torch.no_grad():
        model(**inputs, use_cache=True, logits_to_keep=1)  # the first prefill finds out how each layer may be asked
        with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
            model(**inputs, use_cache=True, logits_to_keep=1)
    return int(counter.get_total_flops())


def predicted(model: PreTrainedModel, prompt: Prompt, method: Method | None = None) -> CostBreakdown:
    """The account of the model's own configuration."""
    shape = model_shape(model.config, bytes_per_value=4)
    schedule = method.schedule(shape.decoder.layers) if method else None
    return estimate_cost(shape, prompt, schedule, method.ranking_flops if method else attention_ranking_flops)


@pytest.mark.fast_cases(4)
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
    flops = counted(model, {"inputs_embeds": torch.randn(1, 60, 64)}, method, **given)
    assert cost.full.total == pytest.approx(flops, rel=ROTARY)


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
    flops = counted(model, {"input_ids": torch.randint(1, 200, (1, 60))})
    assert cost.full.total == pytest.approx(flops, rel=ROTARY)


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


@pytest.mark.parametrize("method", [None, PyramidDrop(layers=[1, 2], keep=[0.5, 0.25])])
def test_an_internvl_prefill_is_what_the_counter_says(method: Method | None) -> None:
    torch.manual_seed(0)
    vision = {
        "image_size": [56, 56],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text = SMALL | {"model_type": "qwen2"}
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=190)
    model = InternVLForConditionalGeneration(config).eval()
    tiles = 3
    inputs = {
        "input_ids": torch.tensor([[5, 6, *[190] * 4 * tiles, 7]]),
        "pixel_values": torch.randn(tiles, 3, 56, 56),
    }
    cost = predicted(model, Prompt(4 * tiles, 3), method)
    assert cost.full.total == pytest.approx(counted(model, inputs, method), rel=0.001)


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
        cache = output_cache(model(**inputs, use_cache=True))
        with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
            model(input_ids=torch.tensor([[5]]), **cache_argument(cache), cache_position=torch.tensor([48]))
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


@pytest.mark.parametrize("method", [PyramidDrop(lam=0.6), FastV(layer=2, keep=0.5), RandomDrop()])
def test_the_account_is_what_the_trace_says(method: Method) -> None:
    model = tiny_model("llava-gqa")
    with method(model) as trace, torch.no_grad():
        cache = output_cache(model(**make_batch(model, [[7, "image", "image", 9]]), use_cache=True))
    cost, traced = predicted(model, Prompt(32, 16), method), trace.cost()
    assert cost.full.decoder + cost.full.ranking == traced.flops
    assert cost.kv_bytes == traced.kv_bytes
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert list(cost.kv_by_layer) == held
    assert [tokens + 16 for tokens in cost.visual_by_layer] == trace.lengths
    assert cost.average_tokens == sum(trace.lengths) / 8 - 16


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("score", [name for name in SCORERS if name != "vision"])
def test_what_choosing_costs_is_what_the_counter_says(score: str, merge: bool) -> None:
    model = tiny_model()
    inputs = make_batch(model, [[9, "image", 7, "image", 8]])
    method = PyramidDrop(layers=[2, 4], keep=[0.5, 0.25], score=score, merge=merge)
    with method(model) as trace:
        found = counted(model, inputs)
    full = predicted(model, Prompt(32, 24)).full
    assert found == pytest.approx(trace.cost().flops + full.head + full.vision + full.projector, rel=0.001)


@pytest.mark.parametrize("figure", paper_figures(), ids=lambda one: f"{one.table}-{one.preset}-{one.method}")
def test_the_paper_to_the_printed_digit(figure: Figure) -> None:
    assert figure.ours == figure.printed


def test_the_paper_figures_are_all_there() -> None:
    printed = {(figure.preset, figure.visual_tokens, figure.printed) for figure in paper_figures()}
    assert printed >= {
        *(("llava-1.5-7b", 576, text) for text in ("3.82", "1.54", "1.78", "2.06", "2.01")),
        *(("llava-next-7b", 2880, text) for text in ("20.8", "8.22", "9.46", "11.0", "10.6", "9.5")),
        *(("llava-next-7b", 5184, text) for text in ("40.6", "18.1")),
        *(("video-llava-7b", 2048, text) for text in ("14.4", "7.4", "6.6")),
    }


def test_a_figure_that_does_not_agree_says_so() -> None:
    figure = Figure("Table 1", "llava-1.5-7b", 576, "vanilla", "3.83", 3.8172)
    assert figure.ours == "3.82"
    assert not figure.agrees


def test_the_published_conventions_are_their_formulas() -> None:
    shape, n, d, m = PRESETS["llava-1.5-7b"].shape.decoder, 576, 4096, 11008
    assert paper_layer_flops(shape, n) == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    assert fastv_layer_flops(shape, n) == 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    plain = estimate_cost(ModelShape(shape), Prompt(n))
    assert (plain.paper, plain.fastv) == (32 * paper_layer_flops(shape, n), 32 * fastv_layer_flops(shape, n))
    assert estimate_cost(ModelShape(shape), Prompt(n, text_tokens=500)).paper == plain.paper  # visual tokens alone


def test_kv_bytes_by_dtype_and_heads() -> None:
    halves = Schedule.equal(8, 4, powers(0.5, 3))
    cost = estimate_cost(ModelShape(SHAPE), Prompt(32, 16), halves)
    per_row = 2 * 2 * 16 * 2  # keys and values, two heads of 16, two bytes
    assert cost.kv_by_layer == tuple(per_row * rows for rows in (48, 48, 32, 32, 24, 24, 20, 20))
    assert cost.kv_bytes == kv_bytes(SHAPE, [48, 48, 32, 32, 24, 24, 20, 20])
    wide = ModelShape(replace(SHAPE, bytes_per_value=4))
    assert estimate_cost(wide, Prompt(32, 16), halves).kv_bytes == 2 * cost.kv_bytes


def test_a_score_of_the_instruction_asks_with_what_stands_behind_the_pictures() -> None:
    model, once = ModelShape(SHAPE), Schedule.of([2], [0.5])
    ranking_cost = InstructionScorer().flops
    part, whole = (
        estimate_cost(model, Prompt(32, 16, None, asking), once, ranking_cost).full.ranking for asking in (5, None)
    )
    # A token that asks needs its query and its products with the 48 keys.
    assert whole - part == (16 - 5) * 2 * (64 * 64 + 48 * 64)
    assert Prompt(32, 16, instruction_tokens=0).num_queries == 1  # where there is none, the last token asks


def test_a_stage_that_drops_nothing_ranks_nothing() -> None:
    twice = Schedule.of([2, 4], [0.5, 0.5])
    once = Schedule.of([2], [0.5])
    model, prompt = ModelShape(SHAPE), Prompt(32, 16)
    assert estimate_cost(model, prompt, twice).full == estimate_cost(model, prompt, once).full
    assert estimate_cost(model, prompt, once).full.ranking > 0
    assert estimate_cost(model, prompt, once, RandomDrop().ranking_flops).full.ranking == 0


def test_the_activations_are_those_of_the_widest_layer() -> None:
    layer = LlamaForCausalLM(LlamaConfig(**SMALL | {"intermediate_size": 176})).model.layers[0]
    rows = 200
    shape = DecoderShape(1, 64, 176, 4, 2, 16, bytes_per_value=4)
    cos = torch.ones(1, rows, 16)
    most = _peak_bytes(lambda: layer(torch.randn(1, rows, 64), position_embeddings=(cos, cos), attention_mask=None))
    assert activation_bytes(shape, [rows]) == pytest.approx(most, rel=0.1)
    assert activation_bytes(shape, [rows, 10]) == activation_bytes(shape, [10, rows])


def test_a_schedule_beyond_the_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers must be in 1\.\.7"):
        estimate_cost(ModelShape(SHAPE), Prompt(32), Schedule.of([8], [0.5]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0,), "visual_tokens"),
        ((5, -1), "text_tokens"),
        ((5, 5, 0), "crops"),
        ((5, 5, None, 6), "instruction_tokens must be from 0 to the 5 text tokens; got 6"),
    ],
)
def test_bad_prompts_name_the_argument(values: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(*values)


def test_presets_are_what_a_configuration_says() -> None:
    config = LlavaConfig()  # whose defaults are those of llava-1.5-7b, but for the vocabulary
    config.text_config.vocab_size = 32064
    assert model_shape(config) == PRESETS["llava-1.5-7b"].shape
    assert visual_tokens_of(config) == 576
    assert visual_tokens_of(LlavaNextConfig()) is None
    qwen = Qwen2_5_VLConfig(
        text_config={
            "num_hidden_layers": 28,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={"hidden_size": 1280},
    )
    assert model_shape(qwen) == PRESETS["qwen2.5-vl-7b"].shape
    sizes = {"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    text = {"model_type": "qwen2", "vocab_size": 151674, **sizes, **heads}
    assert model_shape(InternVLConfig(text_config=text)) == PRESETS["internvl3-8b"].shape


def test_the_cache_has_the_dtype_of_the_checkpoint() -> None:
    assert model_shape(LlavaConfig(dtype="float32")).decoder.bytes_per_value == 4
    assert model_shape(LlavaConfig(dtype="float32"), bytes_per_value=1).decoder.bytes_per_value == 1


def test_experts_stand_where_the_configuration_puts_them() -> None:
    config = Qwen2MoeConfig(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3], num_experts=6)
    shape = model_shape(config).decoder
    assert shape.experts == Experts(6, config.num_experts_per_tok, 1408, 5632, (1, 5))
    assert shape.mlp_width(1) == config.num_experts_per_tok * 1408 + 5632
    assert shape.mlp_width(3) == config.intermediate_size


def test_an_unknown_text_model_is_named() -> None:
    with pytest.raises(ValueError, match="text model 'gpt2'"):
        model_shape(GPT2Config())


def _peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of what `work` allocates that are alive at once, by PyTorch's profiler."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        work()
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())))
