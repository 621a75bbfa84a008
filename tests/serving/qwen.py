"""What the tests of serving ask Qwen's families, and the masked reference's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from served import Question, processed
from transformers import AutoModelForImageTextToText, AutoProcessor

from masked_oracle import Prompt, masked
from qwen_checkpoints import IMAGE, PICTURE, STOP, VIDEO
from reference import Rule


def with_pictures(question: Question) -> Question:
    """The same question, its pictures marked as Qwen's processors want them."""
    return Question(question.prompt.replace("<image>", PICTURE), question.images, question.tokens)


@torch.inference_mode()
def masked_answers(folder: Path, asked: Sequence[Question], rule: Rule) -> list[list[int]]:
    """What Transformers answers where dropped tokens are only masked; one request at a time."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    return [_answer(model, processor, question, rule) for question in asked]


def _answer(model: Any, processor: Any, question: Question, rule: Rule) -> list[int]:
    inputs = processed(processor, question)
    ids = inputs["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    queries = [[ids.shape[1] - 1]] if bool(visual.any()) else [[]]
    prompt = Prompt(visual, queries, torch.zeros_like(ids), torch.zeros_like(visual))
    with masked(model, rule, prompt):
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=question.tokens, min_new_tokens=question.tokens, pad_token_id=STOP
        )
    return out[0, ids.shape[1] :].tolist()
