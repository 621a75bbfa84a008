"""Llama 4: chunks of attention and layers without RoPE. Molmo 2: images that see all images of their row."""

from __future__ import annotations

import torch
import transformers
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
    Molmo2AdapterConfig,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2TextConfig,
    Molmo2VisionConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from zoo.pieces import Inputs, Member, Piece, without_types
from zoo.vision import END, FRAMES, IMAGE, LINE, SIDE, START, joined, noise, wrapped
from zoo.weights import TEXT, drawn

if transformers.__version__ == "5.24.0":
    # Its Llama 4 reads an output that its text model does not give: no forward ends, with a method or without.
    MoeCausalLMOutputWithPast.image_outputs = None

TILE_X, TILE_Y, WHOLE = 190, 191, 192  # Llama 4's separators, and what stands before the whole image
LOW, FRAME, FRAME_END = 190, 191, 192  # Molmo 2's start of a small image, start and end of a frame
TILINGS = ((1, 2), (1, 1), (2, 1))
PATCHES = 16  # a crop of Molmo 2, four of which are pooled into a token


def llama4_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Tiles of 4 tokens with separators, then the whole image."""
    rows, columns = TILINGS[number % len(TILINGS)]
    tiles = rows * columns if rows * columns > 1 else 0
    ends = [TILE_Y if tile % columns == columns - 1 else TILE_X for tile in range(tiles)]
    piece = joined([wrapped(0, [START], []), *[wrapped(4, [], [end]) for end in ends], wrapped(4, [WHOLE], [END])])
    piece.tensors["pixel_values"] = noise(generator, tiles + 1, 3, SIDE, SIDE)
    return piece


def windows(crops: int) -> torch.Tensor:
    """Which patches each token of some crops pools: 2 x 2 of a crop's 4 x 4."""
    places = torch.arange(crops * PATCHES).view(crops, 2, 2, 2, 2)
    return places.transpose(2, 3).reshape(-1, 4)


def molmo2_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """The whole image as 2 x 2 tokens, then its crops, with a column token behind each line."""
    columns = (2, 1, 3)[number % 3]
    low = joined([wrapped(0, [LOW], []), *[wrapped(2, [], [LINE])] * 2, wrapped(0, [], [END])])
    high = joined([wrapped(0, [START], []), *[wrapped(2 * columns, [], [LINE])] * 2, wrapped(0, [], [END])])
    piece = joined([low, high])
    piece.tensors.update(
        pixel_values=noise(generator, 1 + columns, PATCHES, 147),
        image_token_pooling=windows(1 + columns),
        image_grids=torch.tensor([[2, 2, 2, 2 * columns]]),
        image_num_crops=torch.tensor([1 + columns]),
    )
    return piece


def molmo2_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Frames of 2 x 2 tokens, each behind its time."""
    piece = joined([wrapped(4, [2 + frame, 9, FRAME], [FRAME_END], kind=2) for frame in range(FRAMES)])
    piece.tensors.update(
        pixel_values_videos=noise(generator, FRAMES, PATCHES, 147),
        video_token_pooling=windows(FRAMES),
        video_grids=torch.tensor([[FRAMES, 2, 2]]),
    )
    return piece.cut([4] * FRAMES)


def molmo2_inputs(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Types as the processor writes them, and windows counted over all crops of the batch."""
    marks = torch.tensor([START, END, IMAGE, LINE, LOW, FRAME, FRAME_END])
    inputs = inputs | {"mm_token_type_ids": torch.isin(inputs["input_ids"], marks).long()}
    if "image_grids" in inputs:
        grids = inputs["image_grids"]
        tokens = grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
        inputs["image_token_pooling"] = _shifted(inputs["image_token_pooling"], tokens, inputs["image_num_crops"])
    if "video_grids" in inputs:
        grids = inputs["video_grids"]
        inputs["video_token_pooling"] = _shifted(inputs["video_token_pooling"], grids.prod(-1), grids[:, 0])
    return inputs


def _shifted(pooling: torch.Tensor, tokens: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    before = (crops.cumsum(0) - crops) * PATCHES
    return pooling + before.repeat_interleave(tokens)[:, None]


def llama4(seed: int, floor_scale: int = 8192) -> PreTrainedModel:
    """Llama 4: a mixture of experts in every second layer."""
    text = Llama4TextConfig(
        **TEXT | {"intermediate_size": 48},
        intermediate_size_mlp=96,
        head_dim=16,
        num_experts_per_tok=1,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=4,
        attention_chunk_size=16,
        floor_scale=floor_scale,
    )
    vision = Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        vision_output_dim=32,
        image_size=SIDE,
        patch_size=SIDE // 4,
        projector_input_dim=32,
        projector_output_dim=32,
    )
    config = Llama4Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END
    )
    return drawn(lambda: Llama4ForConditionalGeneration(config), seed)


def llama4_long(seed: int) -> PreTrainedModel:
    """Llama 4 in a long context: layers without RoPE scale a query by its slot."""
    return llama4(seed, floor_scale=16)


def molmo2(seed: int, **changes: object) -> PreTrainedModel:
    """Molmo 2: one matrix for q, k and v; features are added to the placeholders' own embeddings."""
    vision = Molmo2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        image_size=[SIDE, SIDE],
        patch_size=SIDE // 4,
    )
    adapter = Molmo2AdapterConfig(
        vision_feature_layer=[1, 0],
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        text_hidden_size=64,
    )
    config = Molmo2Config(
        vision_config=vision,
        adapter_config=adapter,
        text_config=Molmo2TextConfig(**TEXT | {"head_dim": 16, "additional_vocab_size": 8} | changes),
        image_start_token_id=START,
        low_res_image_start_token_id=LOW,
        image_end_token_id=END,
        image_patch_id=IMAGE,
        frame_start_token_id=FRAME,
        frame_end_token_id=FRAME_END,
    )
    return drawn(lambda: Molmo2ForConditionalGeneration(config), seed)


def molmo2_olmo(seed: int) -> PreTrainedModel:
    """Molmo 2 on OLMo: norms of all heads at once, and behind attention and MLP."""
    return molmo2(seed, qk_norm_type="olmo", norm_after=True)


LLAMA4 = {
    "beams": "generate encodes the images once and does not repeat Llama 4's features for the beams",
    "reentrant": "no gradient reaches the vision tower, whose first layer gets nothing that needs one",
}
LONG = {"left_padding": "queries are scaled by their slots, padding included"}
MOLMO2 = {"mixed": "the forward takes images or videos, not both"}

MEMBERS = [
    Member("llama4", llama4, llama4_image, finish=without_types, cannot=LLAMA4),
    Member("llama4-long", llama4_long, llama4_image, finish=without_types, cannot=LLAMA4 | LONG),
    Member("molmo2", molmo2, molmo2_image, molmo2_video, molmo2_inputs, cannot=MOLMO2),
    Member("molmo2-olmo", molmo2_olmo, molmo2_image, molmo2_video, molmo2_inputs, cannot=MOLMO2),
]
