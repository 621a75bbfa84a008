"""Sizes of well-known models as plain numbers, so that costing them needs no download."""

from __future__ import annotations

from dataclasses import dataclass

from pyramiddrop.cost.shapes import DecoderShape, ModelShape, VisionShape


@dataclass(frozen=True)
class Preset:
    """A model's sizes, and the number of visual tokens in the paper (or of a usual picture)."""

    shape: ModelShape
    visual_tokens: int


# openai/clip-vit-large-patch14-336, config.json: 24 layers, width 1024, 336 pixels in patches of 14.
def _clip_large(hidden: int) -> VisionShape:
    """CLIP ViT-L/14-336 with LLaVA's two-layer projector to a decoder of width `hidden`."""
    return VisionShape(
        layers=24,
        hidden=1024,
        intermediate=4096,
        patch_values=3 * 14 * 14,
        projector=((1024, hidden), (hidden, hidden)),
        crop_tokens=576,
        extra_rows=1,
    )


def _qwen_tower(hidden: int, gated: bool) -> VisionShape:
    """Qwen2-VL's vision tower, or (gated) Qwen2.5-VL's, with windows of 8 x 8 patches in all but 4 layers.

    Qwen/Qwen2-VL-7B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct, config.json, vision_config.
    """
    return VisionShape(
        layers=32,
        hidden=1280,
        intermediate=3420 if gated else 5120,
        patch_values=3 * 2 * 14 * 14,
        projector=((5120, 5120), (5120, hidden)),
        rows_per_token=4,
        gated=gated,
        window=64 if gated else 0,
        full_layers=4 if gated else 0,
    )


def _intern_vit(hidden: int) -> VisionShape:
    """InternViT-300M on tiles of 448 x 448 pixels, 2 x 2 patches merged, with InternVL3's two-layer projector.

    OpenGVLab/InternVL3-8B-hf, config.json, vision_config.
    """
    return VisionShape(
        layers=24,
        hidden=1024,
        intermediate=4096,
        patch_values=3 * 14 * 14,
        projector=((4096, hidden), (hidden, hidden)),
        crop_tokens=256,
        rows_per_token=4,
        extra_rows=1,
    )


# lmsys/vicuna-7b-v1.5 and -13b-v1.5, config.json, with the 64 padded rows of the llava-hf checkpoints' head.
_VICUNA_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, vocabulary=32064)
_VICUNA_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, vocabulary=32064)
# mistralai/Mistral-7B-Instruct-v0.2, config.json: 8 key and value heads.
_MISTRAL_7B = DecoderShape(32, 4096, 14336, 32, 8, 128, vocabulary=32064)
# Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2(.5)-VL-7B-Instruct, config.json.
_QWEN_3B = DecoderShape(36, 2048, 11008, 16, 2, 128, vocabulary=151936)
_QWEN_7B = DecoderShape(28, 3584, 18944, 28, 4, 128, vocabulary=152064)
# OpenGVLab/InternVL3-8B-hf, config.json: Qwen2.5-7B with a vocabulary of its own.
_INTERNVL3_8B = DecoderShape(28, 3584, 18944, 28, 4, 128, vocabulary=151674)

PRESETS: dict[str, Preset] = {
    # 24 x 24 patches of one picture; the paper's Table 1.
    "llava-1.5-7b": Preset(ModelShape(_VICUNA_7B, _clip_large(4096)), 576),
    "llava-1.5-13b": Preset(ModelShape(_VICUNA_13B, _clip_large(5120)), 576),
    # 5 crops; the paper's Table 1.
    "llava-next-7b": Preset(ModelShape(_VICUNA_7B, _clip_large(4096)), 2880),
    "llava-next-13b": Preset(ModelShape(_VICUNA_13B, _clip_large(5120)), 2880),
    "llava-next-mistral-7b": Preset(ModelShape(_MISTRAL_7B, _clip_large(4096)), 2880),
    # 8 frames of 16 x 16 patches, LanguageBind/Video-LLaVA-7B; its tower attends over time too and is not counted.
    "video-llava-7b": Preset(ModelShape(_VICUNA_7B), 2048),
    # A picture of about 1000 x 1000 pixels: 36 x 36 tokens of 28 x 28 pixels.
    "qwen2-vl-7b": Preset(ModelShape(_QWEN_7B, _qwen_tower(3584, gated=False)), 1296),
    "qwen2.5-vl-3b": Preset(ModelShape(_QWEN_3B, _qwen_tower(2048, gated=True)), 1296),
    "qwen2.5-vl-7b": Preset(ModelShape(_QWEN_7B, _qwen_tower(3584, gated=True)), 1296),
    # The same picture: 3 x 3 tiles and a thumbnail, of 256 tokens each.
    "internvl3-8b": Preset(ModelShape(_INTERNVL3_8B, _intern_vit(3584)), 2560),
}
