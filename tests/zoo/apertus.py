"""Images as tokens of a codebook in a text model of its own (Apertus 1.5, since Transformers 5.24)."""

from __future__ import annotations

import torch
from transformers import (
    Apertus1p5Config,
    Apertus1p5ForConditionalGeneration,
    Apertus1p5TextConfig,
    Apertus1p5VisionTokenizerConfig,
    PreTrainedModel,
)

from zoo.pieces import Member, Piece, without_types
from zoo.token_image import CODES, FIRST_CODE
from zoo.vision import END, IMAGE, LINE, START, VIDEO, joined, noise, wrapped
from zoo.weights import TEXT, drawn


def apertus_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Lines of codes with a break between two of them."""
    height, width = ((16, 16), (8, 16), (16, 8))[number % 3]
    rows = [wrapped(width // 4, [LINE] if row else [], []) for row in range(height // 4)]
    piece = joined([wrapped(0, [START, 2 + height, 2 + width], []), *rows, wrapped(0, [END], [])])
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., :height, :width] = noise(generator, 1, 3, height, width)
    piece.tensors.update(pixel_values=pixels, image_sizes=torch.tensor([[height, width]]))
    return piece


def apertus1p5(seed: int) -> PreTrainedModel:
    """Apertus 1.5: MLPs without a gate, norms of q and k; its audio is left alone."""
    coder = Apertus1p5VisionTokenizerConfig(
        codebook_size=CODES,
        embed_dim=4,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[2],
    )
    config = Apertus1p5Config(
        vision_config=coder,
        text_config=Apertus1p5TextConfig(**TEXT),
        audio_config={"model_type": "wavtokenizer_encoder", "num_filters": 4, "hidden_size": 8, "codebook_dim": 8}
        | {"codebook_size": 4, "num_lstm_layers": 1},
        image_token_id=IMAGE,
        audio_token_id=VIDEO,
        image_token_offset=FIRST_CODE,
        audio_token_offset=FIRST_CODE + CODES,
    )
    return drawn(lambda: Apertus1p5ForConditionalGeneration(config), seed)


MEMBERS = [
    Member(
        "apertus1p5",
        apertus1p5,
        apertus_image,
        finish=without_types,
        cannot={"sdpa": "its vision tokenizer knows eager attention alone"},
    )
]
