"""Collate samples to a batch: encoded, padded to the longest, labelled on their answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from torch import Tensor

from pyramiddrop.inference.errors import InputError
from pyramiddrop.inference.prompt import open_picture
from pyramiddrop.training.answers import IGNORED_LABEL, ConversationWriter, Rendered, answer_mask
from pyramiddrop.training.samples import BrokenSampleError, Sample


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
        written = self.writer.write(sample.messages)
        tokens = self.processor.tokenizer(written.text, add_special_tokens=self._adds_special(written))
        return len(tokens["input_ids"]) + sum(
            _visual_tokens(self.processor, image_size(image)) - 1 for image in sample.images
        )

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
    return images if isinstance(images, Sequence) and not isinstance(images, str) else [images]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as they were read; a table of `datasets` fills every part up with empty fields."""
    return [
        {"role": message["role"], "content": [_without_empty(part) for part in message["content"]]}
        for message in messages
    ]


def _without_empty(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if value is not None}


def open_image(image: Any) -> Any:
    """The picture in a file, or the picture itself.

    Raises:
        BrokenSampleError: for a file that is not there or is no picture.
    """
    if not isinstance(image, str):
        return image
    try:
        return open_picture(Path(image))
    except InputError as error:
        raise BrokenSampleError(str(error)) from error


def image_size(image: Any) -> tuple[int, int]:
    """(width, height) of a picture or of the one in a file, of which no more than the header is read.

    Raises:
        BrokenSampleError: for a file that is not there or is no picture.
    """
    if not isinstance(image, str):
        return int(image.width), int(image.height)
    try:
        with Image.open(image) as picture:
            width, height = picture.size
            lying = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except FileNotFoundError:
        raise BrokenSampleError(f"no such picture: {image}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenSampleError(f"cannot read the picture {image}: {error}") from error
    return (height, width) if lying else (width, height)


@lru_cache(maxsize=4096)
def _visual_tokens(processor: Any, size: tuple[int, int]) -> int:
    """How many tokens the processor makes of an image of `size` (width, height)."""
    inputs = processor(images=[Image.new("RGB", size)], text=[processor.image_token], add_special_tokens=False)
    return len(inputs["input_ids"][0])
