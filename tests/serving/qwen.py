"""What the tests of serving ask Qwen's families, and the masked reference's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from served import Question, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from masked import Prompt, masked
from qwen_checkpoints import IMAGE, PICTURE, STOP, VIDEO
from reference import Rule

FILM = {"total_num_frames": 4, "fps": 2.0, "duration": 2.0, "frames_indices": [0, 1, 2, 3], "video_backend": "opencv"}


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
