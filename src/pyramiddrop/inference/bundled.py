"""Remarks on questions and pictures that the bundled model cannot know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

KNOWS = "the bundled model knows only its own kind of scenes, documents and charts"


def bundled_remarks(processor: Any, prompt: str, pictures: Sequence[Image.Image]) -> list[str]:
    """Why the bundled model's answer may mean nothing; empty if nothing is seen that is foreign to it.

    A picture is told by its size alone: a photograph of the size that the model was trained on is not noticed.
    """
    remarks = []
    tokens = processor.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    unknown = [
        prompt[start:end]
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        if token == processor.tokenizer.unk_token_id
    ]
    if unknown:
        words = ", ".join(map(repr, dict.fromkeys(unknown)))
        remarks.append(f"not in the bundled model's vocabulary: {words}; its answer may mean nothing")
    elif not tokens["input_ids"]:
        remarks.append(f"no word of {prompt!r} means anything to the bundled model; its answer means nothing")
    size = processor.image_processor.size
    own = size["width"], size["height"]
    foreign = [picture.size for picture in pictures if picture.size != own]
    if foreign:
        wide, high = foreign[0]
        remarks.append(f"a picture of {wide} x {high} is resized to {own[0]} x {own[1]}: {KNOWS}")
    return remarks
