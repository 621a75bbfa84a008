"""Open pictures, and build a model's input tensors from pictures, video frames and a question."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pyramiddrop.inference import InputError

#: Formats in which Pillow's mode "I" holds values from 0 to 65535.
SIXTEEN_BITS = ("PNG", "PPM")


@dataclass(frozen=True)
class Video:
    """Frames of a video, all of one size, and the processor's `video_metadata` for them."""

    frames: list[Image.Image]
    metadata: dict[str, Any]


def to_rgb(picture: Image.Image) -> Image.Image:
    """A copy of `picture` in RGB, without transparency, as in Transformers' processors. Raises InputError for 32-bit
    integers and floats outside 0..1, whose range is unknown, and for modes that Pillow cannot convert.

    Pillow alone clips values above 255 to white. Here 16-bit values are scaled from 0..65535, and floats from 0..1.
    """
    mode = picture.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        values = np.asarray(picture, dtype=np.float64)
        lowest, highest = values.min(), values.max()
        if mode.startswith("I;16") or (mode == "I" and picture.format in SIXTEEN_BITS):
            white = 65535
        elif mode == "F" and 0 <= lowest <= highest <= 1:
            white = 1
        else:
            raise InputError(
                f"mode {mode} with values from {lowest:g} to {highest:g} has no known range; save it with 8 or 16 "
                "bits, or as floats from 0 to 1"
            )
        picture = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    try:
        return picture.convert("RGB")
    except ValueError as error:
        raise InputError(f"mode {picture.mode} cannot be converted to RGB; save it as an RGB picture") from error


#: The prompt for processors without a chat template: the format of the first LLaVA models.
PLAIN = "USER: {images}\n{prompt} ASSISTANT:"
#: Several questions, each about its own pictures.
Questions = Sequence[tuple[Sequence[Image.Image], str]]


def open_picture(source: Path | bytes) -> Image.Image:
    """Open a picture from a file or its bytes, upright and in RGB. Raises InputError if the file does not exist, is not
    a picture, or has values of unknown range."""
    with opened(source) as picture:
        upright = ImageOps.exif_transpose(picture)
        upright.format = picture.format
        return to_rgb(upright)


def check_picture(path: Path) -> None:
    """Raise InputError if a file does not exist or has no picture's header; pixels are not read."""
    with opened(path):
        pass


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """Context manager that opens a picture from a file or its bytes and reads its header only. Raises InputError if the
    file does not exist or is not a picture, and for errors about it inside the block."""
    name = "in the data" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            yield picture
    except FileNotFoundError:
        raise InputError(f"no such picture: {name}") from None
    except InputError as error:
        raise InputError(f"cannot read the picture {name}: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not a picture that can be read" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"cannot read the picture {name}: {reason}") from error


def check_prompt(prompt: str, pictures: int, videos: bool = False) -> None:
    """Raise InputError if the prompt is empty, or has neither a picture nor a video."""
    if not pictures and not videos:
        raise InputError(
            "a prompt needs an image or a video: without one there are no visual tokens to drop (--image, --video)"
        )
    if not prompt.strip():
        raise InputError("the prompt is empty")


def build_inputs(processor: Any, pictures: Sequence[Image.Image], prompt: str, video: Video | None = None) -> Any:
    """Build the tensors of one question, batch size 1, on the CPU: pictures, then the video, then the text. Raises
    InputError if there is neither picture nor video, the prompt is empty or contains the processor's own image token,
    or the processor does not take videos.

    The processor uses all of the video's frames without sampling.
    """
    if video and getattr(processor, "video_processor", None) is None:
        raise InputError("the checkpoint's processor takes no videos; give the frames as images")
    return _build(processor, [(pictures, prompt)], video)


def build_batch(processor: Any, questions: Questions, size: Mapping[str, int] | None = None) -> Any:
    """Build the tensors of several questions, each about its own pictures: one row each, left-padded. Raises InputError
    as for `build_inputs`.

    `size` replaces the processor's own size of pictures.
    """
    return _build(processor, questions, settings={"images_kwargs": {"size": dict(size)}} if size else {})


def image_token(processor: Any) -> str:
    """The placeholder of an image in the processor's text."""
    placeholder = getattr(processor, "image_placeholder_token", None)  # if it differs from the token itself
    return str(placeholder or getattr(processor, "image_token", "<image>"))


def _build(
    processor: Any, questions: Questions, video: Video | None = None, settings: Mapping[str, Any] | None = None
) -> Any:
    own_tokens = [image_token(processor), *([processor.video_token] if video else [])]
    for pictures, prompt in questions:
        check_prompt(prompt, len(pictures), videos=video is not None)
        for token in own_tokens:
            if token in prompt:
                raise InputError(
                    f"the prompt must not hold {token}: each image and video gets its place before the words by itself"
                )
    questions = [([to_rgb(picture) for picture in pictures], prompt) for pictures, prompt in questions]
    settings = {**(settings or {}), **({"padding": True} if len(questions) > 1 else {})}
    if video:
        settings |= {"video_metadata": [video.metadata], "do_sample_frames": False, "return_metadata": True}
    with _left_padding(processor.tokenizer):
        build = _of_template if getattr(processor, "chat_template", None) is not None else _of_text
        inputs = build(processor, questions, video, settings)
    inputs.pop("video_metadata", None)  # not a tensor, and not an argument of the model
    return inputs


def _of_template(processor: Any, questions: Questions, video: Video | None, settings: dict[str, Any]) -> Any:
    clip = [{"type": "video", "video": video.frames}] if video else []
    turns = []
    for pictures, prompt in questions:
        images = [{"type": "image", "image": picture} for picture in pictures]
        turns.append([{"role": "user", "content": [*images, *clip, {"type": "text", "text": prompt}]}])
    return processor.apply_chat_template(
        turns[0] if len(turns) == 1 else turns,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    )


def _of_text(processor: Any, questions: Questions, video: Video | None, settings: dict[str, Any]) -> Any:
    images, clip = [list(pictures) for pictures, _ in questions], processor.video_token if video else ""
    places = [image_token(processor) * len(pictures) + clip for pictures, _ in questions]
    text = [PLAIN.format(images=place, prompt=prompt) for place, (_, prompt) in zip(places, questions, strict=True)]
    own = (images[0] or None, text[0]) if len(text) == 1 else (images, text)
    videos = {"videos": [video.frames]} if video else {}
    return processor(images=own[0], text=own[1], return_tensors="pt", **videos, **settings)


@contextmanager
def _left_padding(tokenizer: Any) -> Iterator[None]:
    """Make the processor pad on the left, so that every prompt ends where its answer begins.

    Without a padding token, the end token pads.
    """
    before = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = before


def on_model(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Move `inputs` to the model's device, and pixels to its dtype."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in moved.items()}
