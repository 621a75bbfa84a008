"""PaliGemma and the Gemmas: image tokens that see each other both ways, two kinds of layers, scaled embeddings."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4VisionConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    ShieldGemma2Config,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedVisionConfig

from zoo.pieces import IGNORED, Inputs, Member, Piece, without_types
from zoo.vision import END, FRAMES, IMAGE, SIDE, START, TOWER, VIDEO, joined, noise, square, wrapped
from zoo.weights import TEXT, drawn

NEWLINE = 10
SLIDING, FULL = "sliding_attention", "full_attention"
LAYERS = [SLIDING, SLIDING, SLIDING, FULL] * 2
VISION_3N, AUDIO_3N = 190, 200  # where the ids of Gemma 3n's hard vision and audio tokens begin
GRIDS = ((4, 4), (2, 4), (4, 2))  # of an image's tokens, for Gemma 4


class PatchesConfig(Gemma3nVisionConfig):
    """Of a tower that needs no timm."""

    model_type = "zoo_patches"


class Patches(PreTrainedModel):
    """Patches of 8 x 8 pixels through one convolution, with an output as timm's towers have it."""

    config: PatchesConfig
    config_class = PatchesConfig
    _supports_sdpa = True

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__(config)
        self.convolution = torch.nn.Conv2d(3, config.hidden_size, 8, stride=8)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """(images, channels, rows, columns)."""
        return BaseModelOutputWithPooling(last_hidden_state=self.convolution(pixel_values))


def typed(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """token_type_ids as Gemma 3's processor writes them: 1 at image tokens."""
    return without_types(model, inputs) | {"token_type_ids": inputs["mm_token_type_ids"]}


def prefixed(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """token_type_ids as PaliGemma's processor writes them: 0 in the prefix, 1 in the answer when training."""
    answer = inputs.get("labels", torch.full_like(inputs["input_ids"], IGNORED)) != IGNORED
    return without_types(model, inputs) | {"token_type_ids": answer.long()}


def patches(generator: torch.Generator, grid: tuple[int, int], pool: int, most: int, width: int) -> dict[str, Any]:
    """The flat patches of an image of so many tokens and their places, padded to the most patches of any image."""
    rows, columns = grid[0] * pool, grid[1] * pool
    pixels, places = torch.zeros(1, most, width), torch.full((1, most, 2), -1)
    pixels[:, : rows * columns] = noise(generator, 1, rows * columns, width)
    places[:, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    return {"pixels": pixels, "places": places}


def gemma4_image(
    model: PreTrainedModel, generator: torch.Generator, number: int, pool: int = 2, width: int = 48
) -> Piece:
    """An image of any shape: 2 x 2 patches a token."""
    grid = GRIDS[number % len(GRIDS)]
    piece = wrapped(grid[0] * grid[1], [START], [END])
    image = patches(generator, grid, pool, 16 * pool**2, width)
    piece.tensors.update(pixel_values=image["pixels"], image_position_ids=image["places"])
    return piece


def gemma4_video(
    model: PreTrainedModel, generator: torch.Generator, number: int, pool: int = 2, width: int = 48
) -> Piece:
    """Frames of 2 x 3 tokens, each behind its time."""
    piece = joined([wrapped(6, [2 + frame, 11, START], [END, 12], VIDEO, 2) for frame in range(FRAMES)])
    frames = [patches(generator, (2, 3), pool, 6 * pool**2, width) for _ in range(FRAMES)]
    piece.tensors.update(
        pixel_values_videos=torch.cat([frame["pixels"] for frame in frames]),
        video_position_ids=torch.cat([frame["places"] for frame in frames]),
        num_frames_per_video=torch.tensor([FRAMES]),
    )
    return piece.cut([6] * FRAMES)


def unified_image(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """An image whose merged patches are the tokens."""
    return gemma4_image(model, generator, number, pool=1, width=192)


def unified_video(model: PreTrainedModel, generator: torch.Generator, number: int) -> Piece:
    """The same for a video."""
    return gemma4_video(model, generator, number, pool=1, width=192)


def paligemma(seed: int, text: Any = None) -> PreTrainedModel:
    """PaliGemma: the whole prompt sees itself both ways."""
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text or GemmaConfig(**TEXT | {"num_key_value_heads": 1}, head_dim=16),
        image_token_index=IMAGE,
        vocab_size=TEXT["vocab_size"],
        projection_dim=64,
        hidden_size=64,
    )
    return drawn(lambda: PaliGemmaForConditionalGeneration(config), seed)


def paligemma2(seed: int) -> PreTrainedModel:
    """PaliGemma 2: Gemma 2's capped scores and sliding windows."""
    text = Gemma2Config(
        **TEXT,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    )
    return paligemma(seed, text)


def gemma3(seed: int, kind: type[PreTrainedConfig] = Gemma3Config) -> PreTrainedModel:
    """Gemma 3: two kinds of layers with a RoPE each, q and k norms, image tokens pooled 2 x 2."""
    text = Gemma3TextConfig(**TEXT, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, layer_types=LAYERS)
    config = kind(
        vision_config=SiglipVisionConfig(**TOWER | {"image_size": 2 * SIDE}, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=16,
    )
    return drawn(lambda: Gemma3ForConditionalGeneration(config), seed)


def shieldgemma2(seed: int) -> PreTrainedModel:
    """ShieldGemma 2: Gemma 3 under a configuration of its own."""
    return gemma3(seed, ShieldGemma2Config)


def gemma3n(seed: int) -> PreTrainedModel:
    """Gemma 3n: four streams, inputs per layer, last layers that share keys (its own tower needs timm)."""
    text = Gemma3nTextConfig(
        **TEXT | {"num_hidden_layers": 12},
        head_dim=16,
        sliding_window=16,
        layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 3,
        num_kv_shared_layers=4,
        vocab_size_per_layer_input=VISION_3N,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.5] * 3 + [0.0] * 9,
    )
    tower = PatchesConfig(hidden_size=32, vocab_offset=VISION_3N, vocab_size=AUDIO_3N - VISION_3N)
    audio = Gemma3nAudioConfig(
        vocab_size=8,
        vocab_offset=AUDIO_3N,
        input_feat_size=16,
        hidden_size=16,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=(4, 4),
    )
    config = Gemma3nConfig(
        text_config=text,
        vision_config=tower,
        audio_config=audio,
        vision_soft_tokens_per_image=16,
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=AUDIO_3N + 1,
    )
    AutoModel.register(PatchesConfig, Patches, exist_ok=True)
    return drawn(lambda: Gemma3nForConditionalGeneration(config), seed)


def gemma4(seed: int, **changes: Any) -> PreTrainedModel:
    """Gemma 4, the large ones: no values of their own in full layers, wider heads there, images that see both ways."""
    text: dict[str, Any] = {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "sliding_window": 16,
        "layer_types": LAYERS,
        "final_logit_softcapping": 10.0,
        "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": TEXT["vocab_size"],
        "attention_k_eq_v": True,
    }
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pooling_kernel_size=2,
        patch_size=4,
        position_embedding_size=16,
    )
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**TEXT | text | changes),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=180,
    )
    return drawn(lambda: Gemma4ForConditionalGeneration(config), seed)


def gemma4_moe(seed: int) -> PreTrainedModel:
    """Gemma 4, the mixture of experts."""
    return gemma4(seed, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)


def gemma4_edge(seed: int) -> PreTrainedModel:
    """Gemma 4, the small ones: inputs per layer, last layers that share keys, causal images."""
    return gemma4(
        seed,
        num_hidden_layers=12,
        layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 3,
        num_kv_shared_layers=4,
        use_bidirectional_attention=None,
        hidden_size_per_layer_input=8,
        attention_k_eq_v=False,
        num_global_key_value_heads=None,
        use_double_wide_mlp=True,
    )


def gemma4_unified(seed: int) -> PreTrainedModel:
    """Gemma 4 without a vision tower: patches go straight into the text model."""
    text = Gemma4UnifiedTextConfig(
        **TEXT,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        layer_types=LAYERS,
        final_logit_softcapping=10.0,
    )
    vision = Gemma4UnifiedVisionConfig(
        patch_size=4, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32
    )
    config = Gemma4UnifiedConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=180,
    )
    return drawn(lambda: Gemma4UnifiedForConditionalGeneration(config), seed)


BOTH_WAYS = {"second_turn": "the whole prompt sees itself both ways, a cached first turn did not see the second"}
CAPPED = {
    "sdpa": "Gemma 2 caps its scores, which scaled_dot_product_attention cannot",
    "static_cache": "PaliGemma's forward takes no dict of masks, which generate prepares for Gemma 2",
}
AROUND = (NEWLINE, START), (END, NEWLINE)

SHARED_KEYS = {"reentrant": "gradients of keys that later layers share are lost: the replay takes the first pass's"}

MEMBERS = [
    Member("paligemma", paligemma, square(SIDE, 16), finish=prefixed, cannot=BOTH_WAYS),
    Member("paligemma-2", paligemma2, square(SIDE, 16), finish=prefixed, cannot=BOTH_WAYS | CAPPED),
    Member("gemma3", gemma3, square(2 * SIDE, 16, *AROUND), finish=typed),
    Member("shieldgemma2", shieldgemma2, square(2 * SIDE, 16, *AROUND), finish=typed),
    Member("gemma3n", gemma3n, square(32, 16, *AROUND), finish=typed, cannot=SHARED_KEYS),
    Member("gemma4", gemma4, gemma4_image, gemma4_video),
    Member("gemma4-moe", gemma4_moe, gemma4_image, gemma4_video),
    Member("gemma4-edge", gemma4_edge, gemma4_image, gemma4_video, cannot=SHARED_KEYS),
    Member("gemma4_unified", gemma4_unified, unified_image, unified_video),
]
