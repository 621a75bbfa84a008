"""Collate samples to a batch: encoded, padded to the longest, labelled on their answers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image
from torch import Tensor

from pyramiddrop.inference.errors import InputError
from pyramiddrop.inference.pixels import to_rgb
from pyramiddrop.inference.prompt import open_picture, opened
from pyramiddrop.training.answers import IGNORED_LABEL, ConversationWriter, Rendered, answer_mask
from pyramiddrop.training.samples import BrokenSampleError, Sample, located

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: The chunks of a PNG that may hold Exif data.
PNG_TELLING = frozenset((b"eXIf", b"tEXt", b"zTXt", b"iTXt"))


class AnswerCollator:
    """Makes batches of samples for any trainer: `Trainer(data_collator=AnswerCollator(processor), ...)`.

    Rows are padded on the right to the longest of the batch; images may be of any number in a sample, or none. Tokens
    are those that the model meets when it is asked: the beginning-of-text token is there if the processor adds it.

    Args:
        processor: of the model, with a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.writer = ConversationWriter(processor)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The model's inputs for `rows`, each with `messages` and `images` (files or pictures) as in `Sample`.

        Returns:
            `input_ids`, `attention_mask` and `labels`, (B, L), -100 wherever no answer is; `pixel_values` and what else
            the processor makes of the images.
        """
        written = [self.writer.write(plain_messages(row["messages"])) for row in rows]
        pictures = [[open_image(image) for image in listed(row["images"])] for row in rows]
        inputs = dict(self._encode(written, pictures))
        offsets = inputs.pop("offset_mapping")
        expansions = inputs.pop("text_replacement_offsets", None) or [[] for _ in rows]
        labels = inputs["input_ids"].clone()
        for row, one in enumerate(written):
            labels[row, ~answer_mask(offsets[row], one.answers, expansions[row])] = IGNORED_LABEL
        return {**inputs, "labels": labels}

    @property
    def ends_answers(self) -> bool:
        """Whether the template puts a special token into an answer, so that the model learns to stop."""
        content = [{"type": "text", "text": "a"}]
        turns = [{"role": role, "content": content} for role in ("user", "assistant", "user", "assistant")]
        batch = self([{"messages": turns, "images": []}])
        answers = batch["labels"][0][batch["labels"][0] != IGNORED_LABEL].tolist()
        tokenizer = self.processor.tokenizer
        return bool(set(answers) & set(tokenizer.get_added_vocab().values()) - set(tokenizer("a")["input_ids"]))

    def length(self, sample: Sample) -> int:
        """The tokens of a sample, its visual ones included.

        Raises:
            BrokenSampleError: where an image cannot be opened, or the template refuses the conversation.
        """
        self._check_text(sample)
        written = self.writer.write(sample.messages)
        tokens = self.processor.tokenizer(written.text, add_special_tokens=self._adds_special(written))
        return len(tokens["input_ids"]) + sum(
            _visual_tokens(self.processor, image_size(image)) - 1 for image in sample.images
        )

    def _check_text(self, sample: Sample) -> None:
        """Raise BrokenSampleError for words that the processor would take for an image or a video."""
        words = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
        for name in ("image_token", "video_token"):
            token = getattr(self.processor, name, None)
            if token and any(token in text for text in words):
                raise BrokenSampleError(f"a text holds {token}, which stands for an image or a video in this model")

    def _encode(self, written: Sequence[Rendered], pictures: list[list[Any]]) -> Any:
        return self.processor(
            text=[one.text for one in written],
            images=pictures if any(pictures) else None,
            padding=True,
            padding_side="right",
            add_special_tokens=self._adds_special(written[0]),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            return_tensors="pt",
        )

    def _adds_special(self, written: Rendered) -> bool:
        """Whether the tokenizer adds its special tokens; not where the template wrote the first of them itself."""
        first = self.processor.tokenizer.bos_token
        return first is None or not written.text.startswith(first)


def listed(images: Any) -> Sequence[Any]:
    """Images as a list; a table may hold a single one, or none."""
    if images is None:
        return []
    return images if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as they were read; a table of `datasets` fills every part up with empty fields."""
    return [
        {"role": message["role"], "content": [_without_empty(part) for part in message["content"]]}
        for message in messages
    ]


def _without_empty(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if value is not None}


def open_image(image: Any) -> Image.Image:
    """The picture in a file, in the bytes of one, or the picture itself, in RGB.

    Raises:
        BrokenSampleError: for what is not there, is no picture or cannot be decoded.
    """
    found = located(image)
    with _broken():
        if isinstance(found, Image.Image):
            return to_rgb(found)
        return open_picture(found if isinstance(found, bytes) else Path(found))


def image_size(image: Any) -> tuple[int, int]:
    """(width, height) of a picture or of the one in a file, of which no more than the header is decoded.

    Raises:
        BrokenSampleError: for what is not there or is no picture.
    """
    found = located(image)
    if isinstance(found, Image.Image):
        return found.size
    with _broken(), opened(found if isinstance(found, bytes) else Path(found)) as picture:
        width, height = picture.size
        turned = _exif(picture).get(ExifTags.Base.Orientation, 1) >= 5
        return (height, width) if turned else (width, height)


def _exif(picture: Any) -> Image.Exif:
    """Pillow decodes all of a PNG for its Exif data; that is needed only if the file tells more behind its pixels."""
    if picture.format == "PNG" and PNG_TELLING.isdisjoint(list(_chunks_behind_pixels(picture.fp))):
        return Image.Image.getexif(picture)
    return picture.getexif()  # type: ignore[no-any-return]


def _chunks_behind_pixels(file: BinaryIO) -> Iterator[bytes]:
    """The names of a PNG's chunks behind the first that holds pixels; the file stays at its place."""
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
    """How many tokens the processor makes of an image of `size` (width, height)."""
    inputs = processor(images=[Image.new("RGB", size)], text=[processor.image_token], add_special_tokens=False)
    return len(inputs["input_ids"][0])
