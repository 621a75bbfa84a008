"""Families that cut an image into tiles, or keep its shape, and write tokens between the parts: Idefics to Cohere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaTextConfig,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LlamaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedModel,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.qianfan_ocr.configuration_qianfan_ocr import QianfanOCRVisionConfig

from zoo.pieces import Inputs, Member, Piece, without_types
from zoo.vision import END, FRAMES, IMAGE, LINE, SIDE, START, TOWER, Maker, joined, noise, square, wrapped
from zoo.weights import TEXT, drawn

TILE, GLOBAL = 190, 194  # TILE + n names the n-th tile
INDICATORS = (185, 186, 187, 188, 189)  # of Ovis2: start, grid, column, row, end

PIXTRAL_SIZES = ((56, 56), (28, 56), (56, 28))


def tiles_of(number: int) -> int:
    """How many tiles an image has beside the whole: 4, 2, 0, 4..."""
    return (4, 2, 0)[number % 3]


def rows_of_tiles(tokens: int) -> Callable[[PreTrainedModel, Inputs], Inputs]:
    """Makes the `finish` of Idefics: tiles as (rows, most tiles of a row, ...), the missing ones all zero."""

    def finish(model: PreTrainedModel, inputs: Inputs) -> Inputs:
        inputs = without_types(model, inputs)
        counts = (inputs["input_ids"] == IMAGE).sum(-1).div(tokens, rounding_mode="floor").tolist()
        return inputs | {name: _by_row(inputs[name], counts) for name in _TILED & inputs.keys()}

    return finish


_TILED = {"pixel_values", "pixel_attention_mask"}


def _by_row(tiles: Tensor, counts: list[int]) -> Tensor:
    rows = tiles.new_zeros(len(counts), max(counts), *tiles.shape[1:])
    for row, part in zip(rows, tiles.split(counts), strict=True):
        row[: len(part)] = part
    return rows


def idefics3_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Tiles of 4 tokens, each behind its name, and the whole image last."""
    tiles = tiles_of(number)
    parts = [wrapped(4, [START, TILE + tile], []) for tile in range(tiles)]
    piece = joined([*parts, wrapped(4, [LINE, START, GLOBAL], [START])])
    piece.tensors["pixel_values"] = noise(generator, tiles + 1, 3, SIDE, SIDE)
    piece.tensors["pixel_attention_mask"] = torch.ones(tiles + 1, SIDE, SIDE, dtype=torch.long)
    return piece


def smolvlm_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Frames of 4 tokens, each behind its time; the model sees them as images."""
    piece = joined([wrapped(4, [2 + frame, 9, START, GLOBAL], [START], kind=2) for frame in range(FRAMES)])
    piece.tensors["pixel_values"] = noise(generator, FRAMES, 3, SIDE, SIDE)
    piece.tensors["pixel_attention_mask"] = torch.ones(FRAMES, SIDE, SIDE, dtype=torch.long)
    return piece.cut([4] * FRAMES)


def idefics2_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """An image of its own shape, padded with zeros, resampled to 16 tokens."""
    height, width = ((28, 28), (14, 28), (28, 21))[number % 3]
    piece = wrapped(16, [START], [START])
    pixels, mask = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, SIDE, SIDE, dtype=torch.long)
    pixels[..., :height, :width] = noise(generator, 1, 3, height, width)
    mask[..., :height, :width] = 1
    piece.tensors.update(pixel_values=pixels, pixel_attention_mask=mask)
    return piece


def pixtral_image(line: list[int], end: list[int]) -> Maker:
    """Makes images of any shape: a token for 14 x 14 pixels, lines of them between other tokens."""

    def image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
        height, width = PIXTRAL_SIZES[number % len(PIXTRAL_SIZES)]
        lines = height // 14
        piece = joined([wrapped(width // 14, [], end if row == lines - 1 else line) for row in range(lines)])
        pixels = torch.zeros(1, 3, 56, 56)
        pixels[..., :height, :width] = noise(generator, 1, 3, height, width)
        piece.tensors.update(pixel_values=pixels, image_sizes=torch.tensor([[height, width]]))
        return piece

    return image


def internvl_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Tiles of 4 tokens without anything between them."""
    tiles = tiles_of(number) + 1
    piece = wrapped(4 * tiles, [START], [END])
    piece.tensors["pixel_values"] = noise(generator, tiles, 3, SIDE, SIDE)
    return piece


def internvl_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Frames of 4 tokens, each behind its number; the model sees them as images."""
    piece = joined([wrapped(4, [2 + frame, 9, START], [END, 3], kind=2) for frame in range(FRAMES)])
    piece.tensors["pixel_values"] = noise(generator, FRAMES, 3, SIDE, SIDE)
    return piece.cut([4] * FRAMES)


def ovis2_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """The whole image, then its tiles in a grid; the model embeds the tokens between them from its visual table."""
    start, grid, column, row, end = INDICATORS
    tiles = tiles_of(number)
    ids = [start, *[IMAGE] * 4, grid]
    for tile in range(tiles):
        ids += [*[IMAGE] * 4, row if tile % 2 else column]
    ids.append(end)
    types = [int(token == IMAGE) for token in ids]
    return Piece(ids, types, {"pixel_values": noise(generator, tiles + 1, 3, SIDE, SIDE)})


def aya_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Tiles of 4 tokens, each behind its name, and the whole image last."""
    tiles = tiles_of(number)
    parts = [wrapped(4, [TILE + tile], []) for tile in range(tiles)]
    piece = joined([wrapped(0, [START], []), *parts, wrapped(4, [GLOBAL], [END])])
    piece.tensors["pixel_values"] = noise(generator, tiles + 1, 3, SIDE, SIDE)
    return piece


def cohere_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Tiles of 4 tokens, each with a line break behind it."""
    tiles = tiles_of(number) + 1
    piece = joined([wrapped(0, [START], []), *[wrapped(4, [], [LINE])] * tiles, wrapped(0, [], [END])])
    piece.tensors["pixel_values"] = noise(generator, tiles, 3, SIDE, SIDE)
    return piece


def idefics3(seed: int) -> PreTrainedModel:
    """Idefics3: patches shuffled 2 x 2 into a token."""
    config = Idefics3Config(
        vision_config=TOWER, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return drawn(lambda: Idefics3ForConditionalGeneration(config), seed)


def smolvlm(seed: int) -> PreTrainedModel:
    """SmolVLM."""
    config = SmolVLMConfig(
        vision_config=TOWER, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return drawn(lambda: SmolVLMForConditionalGeneration(config), seed)


def idefics2(seed: int, window: int | None = None) -> PreTrainedModel:
    """Idefics2: Mistral behind a perceiver."""
    config = Idefics2Config(
        vision_config=TOWER,
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 16,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        text_config=MistralConfig(**TEXT, sliding_window=window),
        image_token_id=IMAGE,
    )
    return drawn(lambda: Idefics2ForConditionalGeneration(config), seed)


def idefics2_sliding(seed: int) -> PreTrainedModel:
    """Idefics2 on Mistral 0.1: a sliding window in every layer."""
    return idefics2(seed, window=16)


def mistral3(seed: int) -> PreTrainedModel:
    """Mistral 3: images of any shape through Pixtral."""
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**TOWER | {"image_size": 56}, head_dim=16),
        text_config=MistralConfig(**TEXT, sliding_window=None, head_dim=24),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return drawn(lambda: Mistral3ForConditionalGeneration(config), seed)


def lighton_ocr(seed: int) -> PreTrainedModel:
    """LightOnOCR: Pixtral and Qwen3 (q and k norms)."""
    config = LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**TOWER | {"image_size": 56}, head_dim=16),
        text_config=Qwen3Config(**TEXT, head_dim=24),
        image_token_id=IMAGE,
        tie_word_embeddings=True,
    )
    return drawn(lambda: LightOnOcrForConditionalGeneration(config), seed)


def internvl(seed: int) -> PreTrainedModel:
    """InternVL: Qwen2."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**TOWER),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return drawn(lambda: InternVLForConditionalGeneration(config), seed)


def qianfan_ocr(seed: int) -> PreTrainedModel:
    """Qianfan-OCR: InternVL's tower and Qwen3."""
    config = QianfanOCRConfig(
        vision_config=QianfanOCRVisionConfig(**TOWER, drop_path_rate=0.0),
        text_config=Qwen3Config(**TEXT, head_dim=24),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return drawn(lambda: QianfanOCRForConditionalGeneration(config), seed)


def ovis2(seed: int) -> PreTrainedModel:
    """Ovis2: a tile is a softmax over a visual vocabulary."""
    config = Ovis2Config(
        vision_config=TOWER | {"vocab_size": 37, "num_visual_indicator_tokens": 5, "hidden_stride": 2},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(INDICATORS),
        vocab_size=TEXT["vocab_size"],
        hidden_size=64,
        tie_word_embeddings=False,
    )
    return drawn(lambda: Ovis2ForConditionalGeneration(config), seed)


def got_ocr2(seed: int) -> PreTrainedModel:
    """GOT-OCR2: SAM's tower, 16 x 16 patches halved twice."""
    tower = GotOcr2VisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
        window_size=8,
        global_attn_indexes=[1],
        mlp_dim=64,
    )
    config = GotOcr2Config(
        vision_config=tower,
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=True,
    )
    return drawn(lambda: GotOcr2ForConditionalGeneration(config), seed)


def cohere_text() -> Cohere2Config:
    """Parallel attention and MLP; three layers with a sliding window, then one without RoPE that sees all."""
    return Cohere2Config(**TEXT, sliding_window=16, sliding_window_pattern=4)


def aya_vision(seed: int) -> PreTrainedModel:
    """Aya Vision."""
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=cohere_text(),
        image_token_index=IMAGE,
        downsample_factor=2,
    )
    return drawn(lambda: AyaVisionForConditionalGeneration(config), seed)


def cohere2_vision(seed: int) -> PreTrainedModel:
    """Command A Vision."""
    config = Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=cohere_text(),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return drawn(lambda: Cohere2VisionForConditionalGeneration(config), seed)


def aria(seed: int) -> PreTrainedModel:
    """Aria: a mixture of experts behind cross-attention with learned queries."""
    text = AriaTextConfig(**TEXT | {"intermediate_size": 32}, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    config = AriaConfig(
        vision_config=Idefics3VisionConfig(**TOWER),
        text_config=text,
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 12},
    )
    return drawn(lambda: AriaForConditionalGeneration(config), seed)


MEMBERS = [
    Member("idefics3", idefics3, idefics3_image, finish=rows_of_tiles(4)),
    Member("smolvlm", smolvlm, idefics3_image, smolvlm_video, finish=rows_of_tiles(4)),
    Member("idefics2", idefics2, idefics2_image, finish=rows_of_tiles(16)),
    Member("idefics2-sliding", idefics2_sliding, idefics2_image, finish=rows_of_tiles(16)),
    Member("mistral3", mistral3, pixtral_image([LINE], [END]), finish=without_types),
    Member("internvl", internvl, internvl_image, internvl_video, without_types),
    Member("ovis2", ovis2, ovis2_image, finish=without_types),
    Member("got_ocr2", got_ocr2, square(64, 16, (START,), (END,)), finish=without_types),
    Member("lighton_ocr", lighton_ocr, pixtral_image([], []), finish=without_types),
    Member("qianfan_ocr", qianfan_ocr, internvl_image, finish=without_types),
    Member("aya_vision", aya_vision, aya_image, finish=without_types),
    Member("cohere2_vision", cohere2_vision, cohere_image, finish=without_types),
    Member("aria", aria, square(SIDE, 12), finish=without_types),
]
