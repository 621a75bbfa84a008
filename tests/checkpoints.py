"""Tiny random checkpoints on disk, with a processor each: what a command line is given as --model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tiny import CROP, IMAGE_TOKEN, VOCABULARY, tiny_model

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def save_checkpoint(
    folder: Path, family: str = "llava", layers: int = 8, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Write a checkpoint of `family` ("llava" or "next") into `folder`, and return the folder."""
    model = tiny_model(family, layers=layers)
    model.save_pretrained(folder)
    save_processor(folder, model, family, chat_template)
    return folder


def save_processor(folder: Path, model: Any, family: str, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write the processor of a `model` of `tiny.py` into `folder`."""
    _processor(model, family, chat_template).save_pretrained(folder)


def save_picture(path: Path, width: int = 90, height: int = 60) -> Path:
    """Write a picture whose colours change from place to place, and return its path."""
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], axis=-1)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def _processor(model: Any, family: str, chat_template: str | None) -> Any:
    shared: dict[str, Any] = {
        "tokenizer": word_tokenizer(),
        "patch_size": CROP // 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
        "chat_template": chat_template,
    }
    sizes: dict[str, Any] = {"size": {"shortest_edge": CROP}, "crop_size": {"height": CROP, "width": CROP}}
    if family == "next":
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=model.config.image_grid_pinpoints, **sizes)
        return LlavaNextProcessor(image_processor=images, **shared)
    return LlavaProcessor(image_processor=CLIPImageProcessorPil(**sizes), **shared)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The words w4, w5, ... of the tiny models, and `<image>`."""
    marks = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*marks, *(f"w{number}" for number in range(len(marks), VOCABULARY - 1))]
    vocabulary = {word: number for number, word in enumerate(words)} | {"<image>": IMAGE_TOKEN}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
