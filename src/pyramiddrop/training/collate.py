"""Collate samples to a batch: encoded, padded to the longest one, with labels on their answers alone.

By these labels `hf/prompt_masks.py` finds the query tokens of training: those just before an answer.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import ExifTags, Image
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from pyramiddrop.hf.prompt_masks import IGNORED_LABEL
from pyramiddrop.inference import InputError
from pyramiddrop.inference.prompt import open_picture, opened, to_rgb
from pyramiddrop.training.samples import BrokenSampleError, Message, Sample, image_places, listed, located, message_text

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: The chunks of a PNG that may hold Exif data.
PNG_TELLING = frozenset((b"eXIf", b"tEXt", b"zTXt", b"iTXt"))

Span = tuple[int, int]


class AnswerCollator:
    """Collates samples for any trainer: `Trainer(data_collator=AnswerCollator(processor), ...)`.

    The model's processor must have a chat template.
    Rows are padded on the right to the longest one; a sample may have any number of images, or none. The tokens are
    those of inference: the beginning-of-sequence token is there if the processor adds it.

    Answers are those that the template marks with `{% generation %}`. Without such marks, an answer is everything after
    the generation prompt: the words and the end of the turn.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.template: str = processor.chat_template
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The model's inputs for `rows`, each with `messages` and `images` (files or pictures) as in `Sample`.

        Returns:
            `input_ids`, `attention_mask` and `labels`, (B, L), with -100 outside of answers; `pixel_values` and the
            processor's other outputs for images.
        """
        texts, answers = zip(*(self.write(plain_messages(row["messages"])) for row in rows), strict=True)
        offsets_too = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        inputs = dict(self._encode(texts, [_pictures(row) for row in rows], **offsets_too))
        offsets = inputs.pop("offset_mapping")
        expansions = inputs.pop("text_replacement_offsets", None) or [[] for _ in rows]
        labels = inputs["input_ids"].clone()
        for row, spans in enumerate(answers):
            labels[row, ~_answer_mask(offsets[row], spans, expansions[row])] = IGNORED_LABEL
        return {**inputs, "labels": labels}

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The inputs of `generate` that ask for the answer to the last message of each row, padded on the left.

        Rows are those of a call; pictures behind their last message are left out.
        """
        texts = [self._render(plain_messages(row["messages"]), prompt=True)[0] for row in rows]
        pictures = [_pictures(row)[: image_places(row["messages"])] for row in rows]
        return dict(self._encode(texts, pictures, padding_side="left"))

    @property
    def ends_answers(self) -> bool:
        """True if the template ends an answer with a special token, from which the model learns to stop."""
        content = [{"type": "text", "text": "a"}]
        turns = [{"role": role, "content": content} for role in ("user", "assistant", "user", "assistant")]
        batch = self([{"messages": turns, "images": []}])
        answers = batch["labels"][0][batch["labels"][0] != IGNORED_LABEL].tolist()
        tokenizer = self.processor.tokenizer
        return bool(set(answers) & set(tokenizer.get_added_vocab().values()) - set(tokenizer("a")["input_ids"]))

    def length(self, sample: Sample) -> int:
        """The number of tokens of a sample, including visual tokens.

        BrokenSampleError if an image cannot be opened, the template refuses the conversation, or the processor would
        read a text as an image or a video.
        """
        for name in ("image_token", "video_token"):
            token = getattr(self.processor, name, None)
            if token and any(token in message_text(message) for message in sample.messages):
                raise BrokenSampleError(f"a text holds {token}, which stands for an image or a video in this model")
        text, _ = self.write(sample.messages)
        tokens = self.processor.tokenizer(text, add_special_tokens=self._adds_special(text))["input_ids"]
        return len(tokens) + sum(_visual_tokens(self.processor, image_size(image)) - 1 for image in sample.images)

    def _encode(self, texts: Sequence[str], pictures: list[list[Any]], **more: Any) -> Any:
        return self.processor(
            text=list(texts),
            images=pictures if any(pictures) else None,
            padding=True,
            add_special_tokens=self._adds_special(texts[0]),
            return_tensors="pt",
            **{"padding_side": "right"} | more,
        )

    def _adds_special(self, text: str) -> bool:
        """True if the tokenizer should add its special tokens; False if the template wrote the first one itself."""
        first = self.processor.tokenizer.bos_token
        return first is None or not text.startswith(first)

    def write(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of a conversation, and the character ranges of its answers, which the model learns to write.

        BrokenSampleError if the template refuses it, or rewrites earlier turns when one is added.
        """
        text, answers = self._render(messages, marked=self._marked)
        if self._marked:
            return text, answers
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, _ = self._render(messages[:number], prompt=True)
                until, _ = self._render(messages[: number + 1])
                if not (until.startswith(prompt) and text.startswith(until)):
                    raise BrokenSampleError(
                        "the chat template writes earlier turns anew when a further one is added; use one that marks "
                        "its answers with {% generation %}"
                    )
                answers.append((len(prompt), len(until)))
        return text, answers

    def _render(
        self, messages: Sequence[Message], prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of messages, and the ranges that the template marks; a `prompt` ends where an answer begins."""
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self.processor.tokenizer.special_tokens_map,
            )
        except Exception as error:  # templates raise any error; Jinja's own have no common class
            raise BrokenSampleError(f"the chat template refuses it: {error}") from error
        return texts[0], [(start, stop) for start, stop in spans[0]] if marked else []


def _pictures(row: Mapping[str, Any]) -> list[Image.Image]:
    return [_open_image(image) for image in listed(row["images"])]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the empty fields that a table of `datasets` adds to every part."""
    found = []
    for message in messages:
        parts = [{name: value for name, value in part.items() if value is not None} for part in message["content"]]
        found.append({"role": message["role"], "content": parts})
    return found


def _open_image(image: Any) -> Image.Image:
    found = located(image)
    with _broken():
        if isinstance(found, Image.Image):
            return to_rgb(found)
        return open_picture(found if isinstance(found, bytes) else Path(found))


def image_size(image: Any) -> tuple[int, int]:
    """(width, height) of a picture or a file, of which only the header is decoded; BrokenSampleError if it is none."""
    found = located(image)
    if isinstance(found, Image.Image):
        return found.size
    with _broken(), opened(found if isinstance(found, bytes) else Path(found)) as picture:
        width, height = picture.size
        # Pillow decodes a whole PNG for its Exif data, which is only needed if data follows the pixels.
        leading = picture.format == "PNG" and PNG_TELLING.isdisjoint(_chunks_behind_pixels(picture.fp))  # type: ignore[attr-defined]
        exif = Image.Image.getexif(picture) if leading else picture.getexif()
        return (height, width) if exif.get(ExifTags.Base.Orientation, 1) >= 5 else (width, height)


def _chunks_behind_pixels(file: BinaryIO) -> list[bytes]:
    """The names of a PNG's chunks from the first one with pixels on; the position in the file is restored."""
    place, names = file.tell(), list[bytes]()
    file.seek(len(PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        if names or head[4:] == b"IDAT":
            names.append(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)
    return names


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise BrokenSampleError(str(error)) from error


@lru_cache(maxsize=4096)
def _visual_tokens(processor: Any, size: tuple[int, int]) -> int:
    """The number of the processor's tokens for an image of `size` (width, height)."""
    inputs = processor(images=[Image.new("RGB", size)], text=[processor.image_token], add_special_tokens=False)
    return len(inputs["input_ids"][0])


def _answer_mask(offsets: Tensor, answers: Sequence[Span], expansions: Sequence[dict[str, Any]]) -> Tensor:
    """(L,) bool: the tokens that overlap an answer, given as character ranges in the text before images are expanded.

    Args:
        offsets: (L, 2), the characters of each token in the expanded text; begin and end of padding are equal.
        expansions: the processor's expansions, with the `span` of each image before and its `new_span` after.
    """
    ends = [expansion["span"][1] for expansion in expansions]
    moved = [0, *(expansion["new_span"][1] - expansion["span"][1] for expansion in expansions)]
    mask = torch.zeros(len(offsets), dtype=torch.bool)
    for span in answers:
        start, stop = (character + moved[bisect_right(ends, character)] for character in span)
        mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return mask & (offsets[:, 0] < offsets[:, 1])
