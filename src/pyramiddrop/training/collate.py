"""Collate samples to a batch: encoded, padded to the longest one, with labels on their answers alone."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import ExifTags, Image
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from pyramiddrop.inference import InputError
from pyramiddrop.inference.prompt import open_picture, opened, to_rgb
from pyramiddrop.training.samples import BrokenSampleError, Message, Sample, located

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: The chunks of a PNG that may hold Exif data.
PNG_TELLING = frozenset((b"eXIf", b"tEXt", b"zTXt", b"iTXt"))


class AnswerCollator:
    """Collates samples for any trainer: `Trainer(data_collator=AnswerCollator(processor), ...)`.

    Rows are padded on the right to the longest one; a sample may have any number of images, or none. The tokens are
    those of inference: the beginning-of-sequence token is there if the processor adds it.

    Args:
        processor: the model's processor, with a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.writer = ConversationWriter(processor)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The model's inputs for `rows`, each with `messages` and `images` (files or pictures) as in `Sample`.

        Returns:
            `input_ids`, `attention_mask` and `labels`, (B, L), with -100 outside of answers; `pixel_values` and the
            processor's other outputs for images.
        """
        written = [self.writer.write(plain_messages(row["messages"])) for row in rows]
        offsets_too = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        inputs = dict(self._encode(written, [_pictures(row) for row in rows], **offsets_too))
        offsets = inputs.pop("offset_mapping")
        expansions = inputs.pop("text_replacement_offsets", None) or [[] for _ in rows]
        labels = inputs["input_ids"].clone()
        for row, one in enumerate(written):
            labels[row, ~answer_mask(offsets[row], one.answers, expansions[row])] = IGNORED_LABEL
        return {**inputs, "labels": labels}

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The inputs of `generate` that ask for the answer to the last message of each row, padded on the left.

        Rows are those of a call; pictures behind their last message are left out.
        """
        written = [self.writer.prompt(plain_messages(row["messages"])) for row in rows]
        pictures = [_pictures(row)[: _places(row)] for row in rows]
        return dict(self._encode(written, pictures, padding_side="left"))

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

        Raises:
            BrokenSampleError: if an image cannot be opened, or the template refuses the conversation.
        """
        self._check_text(sample)
        written = self.writer.write(sample.messages)
        tokens = self.processor.tokenizer(written.text, add_special_tokens=self._adds_special(written))
        return len(tokens["input_ids"]) + sum(
            _visual_tokens(self.processor, image_size(image)) - 1 for image in sample.images
        )

    def _check_text(self, sample: Sample) -> None:
        """Raise BrokenSampleError for text that the processor would read as an image or a video."""
        words = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
        for name in ("image_token", "video_token"):
            token = getattr(self.processor, name, None)
            if token and any(token in text for text in words):
                raise BrokenSampleError(f"a text holds {token}, which stands for an image or a video in this model")

    def _encode(self, written: Sequence[Rendered], pictures: list[list[Any]], **more: Any) -> Any:
        return self.processor(
            text=[one.text for one in written],
            images=pictures if any(pictures) else None,
            padding=True,
            add_special_tokens=self._adds_special(written[0]),
            return_tensors="pt",
            **{"padding_side": "right"} | more,
        )

    def _adds_special(self, written: Rendered) -> bool:
        """True if the tokenizer should add its special tokens; False if the template wrote the first one itself."""
        first = self.processor.tokenizer.bos_token
        return first is None or not written.text.startswith(first)


def _pictures(row: Mapping[str, Any]) -> list[Image.Image]:
    return [open_image(image) for image in listed(row["images"])]


def _places(row: Mapping[str, Any]) -> int:
    """The number of image places in the messages of a row."""
    return sum(part["type"] == "image" for message in row["messages"] for part in message["content"])


def listed(images: Any) -> Sequence[Any]:
    """Images as a list, from a list, a single image or None."""
    if images is None:
        return []
    return images if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the empty fields that a table of `datasets` adds to every part."""
    return [
        {"role": message["role"], "content": [_without_empty(part) for part in message["content"]]}
        for message in messages
    ]


def _without_empty(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if value is not None}


def open_image(image: Any) -> Image.Image:
    """Open a picture from a file or its bytes, or take a picture itself, in RGB.

    Raises:
        BrokenSampleError: if it does not exist, is not a picture or cannot be decoded.
    """
    found = located(image)
    with _broken():
        if isinstance(found, Image.Image):
            return to_rgb(found)
        return open_picture(found if isinstance(found, bytes) else Path(found))


def image_size(image: Any) -> tuple[int, int]:
    """(width, height) of a picture or of a picture file, of which only the header is decoded.

    Raises:
        BrokenSampleError: if it does not exist or is not a picture.
    """
    found = located(image)
    if isinstance(found, Image.Image):
        return found.size
    with _broken(), opened(found if isinstance(found, bytes) else Path(found)) as picture:
        width, height = picture.size
        turned = _exif(picture).get(ExifTags.Base.Orientation, 1) >= 5
        return (height, width) if turned else (width, height)


def _exif(picture: Any) -> Image.Exif:
    """The picture's Exif data. Pillow decodes a whole PNG for it, which is only needed if data follows the pixels."""
    if picture.format == "PNG" and PNG_TELLING.isdisjoint(list(_chunks_behind_pixels(picture.fp))):
        return Image.Image.getexif(picture)
    return picture.getexif()  # type: ignore[no-any-return]


def _chunks_behind_pixels(file: BinaryIO) -> Iterator[bytes]:
    """The names of a PNG's chunks after the first one with pixels; the position in the file is restored."""
    place = file.tell()
    file.seek(len(PNG_SIGNATURE))
    pixels = False
    while len(head := file.read(8)) == 8:
        pixels |= head[4:] == b"IDAT"
        if pixels:
            yield head[4:]
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)


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


IGNORED_LABEL = -100
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `answers` are the character ranges that the model learns to write."""

    text: str
    answers: list[Span]


class ConversationWriter:
    """Writes conversations with a processor's chat template, and finds the characters of answers.

    Answers are those that the template marks with `{% generation %}`. Without such marks, an answer is everything after
    the generation prompt: the words and the end of the turn.

    Args:
        processor: the model's processor, which must have a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.template: str = processor.chat_template
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def write(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation with the ranges of its answers.

        Raises:
            BrokenSampleError: if the template refuses the conversation, or rewrites earlier turns when one is added, so
                that the answers cannot be found.
        """
        if self.marked:
            text, answers = self._render(messages, marked=True)
            return Rendered(text, [(start, stop) for start, stop in answers])
        return self._by_prefixes(messages)

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation that ends where the next answer begins."""
        return Rendered(self._render(messages, prompt=True)[0], [])

    def _by_prefixes(self, messages: Sequence[Message]) -> Rendered:
        text, answers = self._render(messages)[0], []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], prompt=True)[0]
            until = self._render(messages[: number + 1])[0]
            if not (until.startswith(prompt) and text.startswith(until)):
                raise BrokenSampleError(
                    "the chat template writes earlier turns anew when a further one is added; use one that marks its "
                    "answers with {% generation %}"
                )
            answers.append((len(prompt), len(until)))
        return Rendered(text, answers)

    def _render(
        self, messages: Sequence[Message], prompt: bool = False, marked: bool = False
    ) -> tuple[str, Sequence[Sequence[int]]]:
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
        return texts[0], spans[0] if marked else []


def answer_mask(offsets: Tensor, answers: Sequence[Span], expansions: Sequence[dict[str, Any]]) -> Tensor:
    """(L,) bool: the tokens that overlap an answer.

    Args:
        offsets: (L, 2), the characters of each token in the text with expanded images; begin and end of padding are
            equal.
        answers: character ranges in the text before the expansion.
        expansions: the processor's expansions, with the `span` of each image before and its `new_span` after.
    """
    ends = [expansion["span"][1] for expansion in expansions]
    moved = [0, *(expansion["new_span"][1] - expansion["span"][1] for expansion in expansions)]
    mask = torch.zeros(len(offsets), dtype=torch.bool)
    for span in answers:
        start, stop = (character + moved[bisect_right(ends, character)] for character in span)
        mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return mask & (offsets[:, 0] < offsets[:, 1])
