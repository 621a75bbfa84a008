"""Images as tokens of a codebook (Chameleon, Emu3), and patches that go straight into the text model (Fuyu)."""

from __future__ import annotations

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonVQVAEConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    FuyuConfig,
    FuyuForCausalLM,
    PersimmonConfig,
    PreTrainedModel,
)

from zoo.pieces import Member, Piece, without_types
from zoo.vision import END, IMAGE, LINE, START, joined, noise, square, wrapped
from zoo.weights import TEXT, drawn

CODES = 32
FIRST_CODE = 155  # the codebook's ids in the vocabulary of the text
FUYU_GRIDS = ((4, 4), (2, 8), (8, 2))


def emu3_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Lines of codes that each end in a newline which the model scatters too."""
    height, width = ((16, 16), (8, 16), (16, 8))[number % 3]
    piece = wrapped(height // 4 * (width // 4 + 1), [START, 2 + height, 2 + width, LINE], [END])
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., :height, :width] = noise(generator, 1, 3, height, width)
    piece.tensors.update(pixel_values=pixels, image_sizes=torch.tensor([[height, width]]))
    return piece


def fuyu_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """Lines of patches with a newline behind each."""
    rows, columns = FUYU_GRIDS[number % len(FUYU_GRIDS)]
    piece = joined([wrapped(columns, [], [LINE]) for _ in range(rows)])
    piece.tensors["pixel_values"] = noise(generator, 1, rows * columns, 48)
    return piece


def chameleon(seed: int) -> PreTrainedModel:
    """Chameleon: one model for both, norms of q and k with weights for each head."""
    names = {f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z": FIRST_CODE + code for code in range(CODES)}
    coder = ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODES,
        latent_channels=8,
        resolution=8,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
    )
    config = ChameleonConfig(**TEXT, vq_config=coder, vocabulary_map=names | {"<image>": IMAGE})
    model = drawn(lambda: ChameleonForConditionalGeneration(config), seed)
    for name, parameter in model.named_parameters():
        if "q_norm.weight" in name or "k_norm.weight" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # a norm, though its weight is a matrix
    return model


def emu3(seed: int) -> PreTrainedModel:
    """Emu3: images of any shape."""
    names = {f"<|visual token {code:06d}|>": FIRST_CODE + code for code in range(CODES)}
    coder = Emu3VQVAEConfig(
        codebook_size=CODES,
        embed_dim=4,
        latent_channels=4,
        temporal_downsample_factor=1,
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[2],
        hidden_size=32,
    )
    config = Emu3Config(
        vq_config=coder,
        text_config=Emu3TextConfig(**TEXT, attention_dropout=0.0),
        vocabulary_map=names | {"<image>": IMAGE, "<|extra_200|>": LINE - 1},
    )
    return drawn(lambda: Emu3ForConditionalGeneration(config), seed)


def fuyu(seed: int) -> PreTrainedModel:
    """Fuyu: Persimmon, with one matrix for q, k and v, and RoPE on half of each head."""
    text = PersimmonConfig(
        **{name: value for name, value in TEXT.items() if name != "num_key_value_heads"},
        qk_layernorm=True,
        partial_rotary_factor=0.5,
    )
    config = FuyuConfig(text_config=text, image_size=16, patch_size=4, image_token_id=IMAGE)
    return drawn(lambda: FuyuForCausalLM(config), seed)


FUYU = {"beams": "generate encodes the images once and does not repeat Fuyu's features for the beams"}

MEMBERS = [
    Member("chameleon", chameleon, square(8, 16, (START,), (END,)), finish=without_types),
    Member("emu3", emu3, emu3_image, finish=without_types),
    Member("fuyu", fuyu, fuyu_image, finish=without_types, cannot=FUYU),
]
