"""A random LLaVA of medium size, whose prefill is bound by arithmetic and still runs on any CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pyramiddrop import Method
from pyramiddrop.inference.prefill_stats import Usage, usage, vanilla_usage
from pyramiddrop.inference.timing import PrefillTime, time_prefills

VISUAL_TOKENS, TEXT_TOKENS = 576, 24  # LLaVA-1.5's picture, and a short question
LAYERS, HIDDEN = 12, 384
VOCABULARY, IMAGE_ID = 256, 255


@dataclass(frozen=True)
class PrefillRatio:
    """The prefill of one prompt without and with a method, as predicted and as measured."""

    vanilla: Usage
    pruned: Usage
    vanilla_time: PrefillTime
    pruned_time: PrefillTime
    parameters: int

    @property
    def predicted(self) -> float:
        """Pruned FLOPs / vanilla FLOPs."""
        return self.pruned.flops / self.vanilla.flops

    @property
    def measured(self) -> float:
        """Pruned wall time / vanilla wall time."""
        return self.pruned_time.wall / self.vanilla_time.wall


def midsize_prefill(method: Method, runs: int = 3) -> PrefillRatio:
    """Time a prefill of 576 visual tokens in a random decoder of 12 layers, without and with `method`."""
    model, inputs = random_llava(), random_inputs()
    with torch.inference_mode(), method(model) as trace:
        model(**inputs, logits_to_keep=1)
    times = time_prefills(model, inputs, {"vanilla": None, "pruned": method}, runs)
    parameters = sum(weights.numel() for weights in model.model.language_model.parameters())
    return PrefillRatio(vanilla_usage(model, inputs), usage(trace), times["vanilla"], times["pruned"], parameters)


def random_llava() -> Any:
    """LLaVA-1.5's build with a thin vision tower and a small decoder, all weights random."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64,
        max_position_embeddings=1024,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        image_seq_length=VISUAL_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


def random_inputs() -> dict[str, torch.Tensor]:
    """One picture of noise, and a question of random words after it."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, IMAGE_ID, (TEXT_TOKENS,), generator=generator)
    ids = torch.cat([torch.full((VISUAL_TOKENS,), IMAGE_ID), words])[None]
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
