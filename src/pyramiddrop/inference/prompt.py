"""Owns the way from picture files and a question to the tensors that a model reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from pyramiddrop.inference.errors import InputError

#: For a processor without a chat template: the format of the first LLaVA models.
PLAIN = "USER: {images}\n{prompt} ASSISTANT:"


def open_picture(path: Path) -> Image.Image:
    """The picture in `path`, upright and in RGB.

    Raises:
        InputError: for a file that is not there or is no picture.
    """
    with _opened(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def check_picture(path: Path) -> None:
    """Raise InputError for a file that is not there or does not begin as a picture does; its pixels are not read."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError:
        raise InputError(f"no such picture: {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not a picture that can be read" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"cannot read the picture {path}: {reason}") from error


def check_prompt(prompt: str, pictures: int) -> None:
    """Raise InputError for an empty prompt, or one without a picture."""
    if not pictures:
        raise InputError("a prompt needs an image: without one there are no visual tokens to drop (--image FILE)")
    if not prompt.strip():
        raise InputError("the prompt is empty")


def build_inputs(processor: Any, pictures: Sequence[Image.Image], prompt: str) -> Any:
    """The tensors for one question about `pictures`, on the CPU: batch size 1, the pictures before the words.

    Raises:
        InputError: for no picture, an empty prompt, or one that holds the processor's own image token.
    """
    return build_batch(processor, [(pictures, prompt)])


def build_batch(processor: Any, questions: Sequence[tuple[Sequence[Image.Image], str]]) -> Any:
    """The tensors for several questions, each about its own pictures: one row a question, padded on the left.

    Raises:
        InputError: as for `build_inputs`, for any of them.
    """
    for pictures, prompt in questions:
        _check_question(processor, pictures, prompt)
    single = len(questions) == 1
    padding = {} if single else {"padding": True}
    with _left_padding(processor.tokenizer):
        if getattr(processor, "chat_template", None) is None:
            images = [list(pictures) for pictures, _ in questions]
            text = [_plain(processor, len(pictures), prompt) for pictures, prompt in questions]
            own = (images[0], text[0]) if single else (images, text)
            return processor(images=own[0], text=own[1], return_tensors="pt", **padding)
        turns = [[{"role": "user", "content": _content(pictures, prompt)}] for pictures, prompt in questions]
        return processor.apply_chat_template(
            turns[0] if single else turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=padding,
        )


def _check_question(processor: Any, pictures: Sequence[Image.Image], prompt: str) -> None:
    check_prompt(prompt, len(pictures))
    token = image_token(processor)
    if token in prompt:
        raise InputError(f"the prompt must not hold {token}: each image gets its place before the words by itself")


def image_token(processor: Any) -> str:
    """What stands for an image in a text that the processor is given."""
    placeholder = getattr(processor, "image_placeholder_token", None)  # where the token itself is another one
    return str(placeholder or getattr(processor, "image_token", "<image>"))


def _plain(processor: Any, pictures: int, prompt: str) -> str:
    return PLAIN.format(images=image_token(processor) * pictures, prompt=prompt)


def _content(pictures: Sequence[Image.Image], prompt: str) -> list[dict[str, Any]]:
    return [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": prompt}]


@contextmanager
def _left_padding(tokenizer: Any) -> Iterator[None]:
    """Pad on the left: every prompt ends where its answer begins. Without a padding token, the end's is taken."""
    before = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = before
