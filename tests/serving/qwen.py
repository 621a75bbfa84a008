"""Tiny checkpoints of Qwen's families for vLLM, and the masked reference's answers: three-axis positions, pictures of
any size, and (Qwen3-VL) visual features that are added once more after the first layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from served import Question, picture
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from masked import Prompt, masked
from reference import Rule

VOCABULARY, WORDS = 200, 180
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>")
START, END, IMAGE, VIDEO, STOP = range(WORDS, WORDS + len(MARKS))
FILM = {"total_num_frames": 4, "fps": 2.0, "duration": 2.0, "frames_indices": [0, 1, 2, 3], "video_backend": "opencv"}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": STOP,
    "eos_token_id": STOP,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}
VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _qwen2_vl() -> Any:
    vision = VISION | {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT, vision_config=vision, **IDS))


def _qwen2_5_vl() -> Any:
    vision = VISION | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "window_size": 112,
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **IDS))


def _qwen3_vl() -> Any:
    text = TEXT | {"head_dim": 32, "rope_parameters": TEXT["rope_parameters"] | {"mrope_interleaved": True}}
    vision = VISION | {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **IDS))


FAMILIES = {
    "qwen2_vl": (_qwen2_vl, Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": (_qwen2_5_vl, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (_qwen3_vl, Qwen3VLProcessor, Qwen3VLVideoProcessor),
}


def save_qwen(folder: Path, family: str) -> Path:
    """A tiny random checkpoint of `family`, with its processor."""
    build, processor, videos = FAMILIES[family]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
        model.get_output_embeddings().weight[WORDS:] = 0  # no special token is ever the likeliest
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    pixels = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 36, "patch_size": 14, "merge_size": 2}
    processor(
        image_processor=Qwen2VLImageProcessorPil(**pixels), tokenizer=_tokenizer(), video_processor=videos(**pixels)
    ).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{number}": number for number in range(WORDS)} | dict(
        zip(MARKS, range(WORDS, VOCABULARY), strict=False)
    )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="w0",
        additional_special_tokens=list(MARKS[:-1]),
    )


def with_pictures(question: Question) -> Question:
    """The same question, its pictures marked as Qwen's processors want them."""
    return Question(question.prompt.replace("<image>", PICTURE), question.images, question.tokens)


@dataclass(frozen=True)
class Film(Question):
    """A question about a video, (frames, height, width, 3) of bytes, with its pictures before it."""

    frames: Any = None

    @property
    def inputs(self) -> dict[str, Any]:
        film = (self.frames, FILM | {"do_sample_frames": False})
        return {"prompt": self.prompt, "multi_modal_data": {"video": [film], "image": list(self.images)}}


def films(count: int) -> list[Film]:
    """Each one video and one picture."""
    draw = np.random.default_rng(3)
    return [
        Film(
            f"w{number} {PICTURE} w9 <|vision_start|><|video_pad|><|vision_end|> w{number + 7} w3",
            (picture(number),),
            6 + number,
            draw.integers(0, 255, (4, 56, 84, 3), dtype=np.uint8),
        )
        for number in range(count)
    ]


@torch.inference_mode()
def masked_answers(folder: Path, asked: Sequence[Question], rule: Rule) -> list[list[int]]:
    """What Transformers answers where dropped tokens are only masked; one request at a time."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    return [_answer(model, processor, question, rule) for question in asked]


def _answer(model: Any, processor: Any, question: Question, rule: Rule) -> list[int]:
    film = {}
    if isinstance(question, Film):
        film = {"videos": [question.frames], "video_metadata": [FILM], "do_sample_frames": False}
    inputs = processor(text=[question.prompt], images=list(question.images) or None, return_tensors="pt", **film)
    ids = inputs["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    queries = [[ids.shape[1] - 1]] if bool(visual.any()) else [[]]
    prompt = Prompt(visual, queries, torch.zeros_like(ids), torch.zeros_like(visual))
    with masked(model, rule, prompt):
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=question.tokens, min_new_tokens=question.tokens, pad_token_id=STOP
        )
    return out[0, ids.shape[1] :].tolist()
