"""A tiny random LLaVA-OneVision on disk, with its processor."""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

from checkpoints import CHAT_TEMPLATE, word_tokenizer
from zoo.llava_like import PINPOINTS, llava_onevision
from zoo.vision import SIDE, VIDEO


def save_onevision(folder: Path) -> Path:
    """Write it into `folder`, and return the folder."""
    llava_onevision(0).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(image_grid_pinpoints=PINPOINTS, size=size),
        tokenizer=word_tokenizer(),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        video_token=f"w{VIDEO}",
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder
