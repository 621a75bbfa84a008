"""Owns the way from picture files and a question to the tensors that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
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
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
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
    check_prompt(prompt, len(pictures))
    image_token = getattr(processor, "image_token", "<image>")
    if image_token in prompt:
        raise InputError(
            f"the prompt must not hold {image_token}: each image gets its place before the words by itself"
        )
    if getattr(processor, "chat_template", None) is None:
        text = PLAIN.format(images=image_token * len(pictures), prompt=prompt)
        return processor(images=list(pictures), text=text, return_tensors="pt")
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
