"""Turn pictures, frames and a question into the tensors that a model reads."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError

from pyramiddrop.inference.errors import InputError
from pyramiddrop.inference.pixels import to_rgb

if TYPE_CHECKING:
    from pyramiddrop.inference.video import Video

#: For a processor without a chat template: the format of the first LLaVA models.
PLAIN = "USER: {images}\n{prompt} ASSISTANT:"
#: Several questions, each about its own pictures.
Questions = Sequence[tuple[Sequence[Image.Image], str]]


def open_picture(source: Path | bytes) -> Image.Image:
    """The picture in a file, or in the bytes of one, upright and in RGB.

    Raises:
        InputError: for a file that is not there, is no picture, or holds values whose range is not known.
    """
    with opened(source) as picture:
        upright = ImageOps.exif_transpose(picture)
        upright.format = picture.format
        return to_rgb(upright)


def check_picture(path: Path) -> None:
    """Raise InputError for a file that is not there or does not begin as a picture does; its pixels are not read."""
    with opened(path):
        pass


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """The picture in a file, or in the bytes of one, of which no more than the header is read yet.

    Raises:
        InputError: for a file that is not there or is no picture, and for whatever is wrong with it in the block.
    """
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
    """Raise InputError for an empty prompt, or one without a picture or a video."""
    if not pictures and not videos:
        raise InputError(
            "a prompt needs an image or a video: without one there are no visual tokens to drop (--image, --video)"
        )
    if not prompt.strip():
        raise InputError("the prompt is empty")


def build_inputs(processor: Any, pictures: Sequence[Image.Image], prompt: str, video: Video | None = None) -> Any:
    """The tensors for one question, on the CPU: batch size 1, the pictures before the video, and both before the words.

    The processor takes the video's frames as they are, and samples none.

    Raises:
        InputError: for neither picture nor video, an empty prompt, one with the processor's own image token, and a
            video for a processor of images alone.
    """
    if video and getattr(processor, "video_processor", None) is None:
        raise InputError("the checkpoint's processor takes no videos; give the frames as images")
    return _build(processor, [(pictures, prompt)], video)


def build_batch(processor: Any, questions: Questions, size: Mapping[str, int] | None = None) -> Any:
    """The tensors for several questions, each about its own pictures: one row a question, padded on the left.

    Args:
        size: what pictures are resized to, instead of the processor's own `size`.

    Raises:
        InputError: as for `build_inputs`, for any of them.
    """
    return _build(processor, questions, settings={"images_kwargs": {"size": dict(size)}} if size else {})


def image_token(processor: Any) -> str:
    """What stands for an image in a text that the processor is given."""
    placeholder = getattr(processor, "image_placeholder_token", None)  # where the token itself is another one
    return str(placeholder or getattr(processor, "image_token", "<image>"))


def _build(
    processor: Any, questions: Questions, video: Video | None = None, settings: Mapping[str, Any] | None = None
) -> Any:
    for pictures, prompt in questions:
        _check_question(processor, pictures, prompt, video)
    questions = [([to_rgb(picture) for picture in pictures], prompt) for pictures, prompt in questions]
    single = len(questions) == 1
    settings = {**(settings or {}), **({} if single else {"padding": True})}
    if video:
        settings |= {"video_metadata": [video.metadata], "do_sample_frames": False, "return_metadata": True}
    with _left_padding(processor.tokenizer):
        build = _of_template if getattr(processor, "chat_template", None) is not None else _of_text
        inputs = build(processor, questions, video, settings)
    inputs.pop("video_metadata", None)  # no tensor, and nothing for the model
    return inputs


def _of_template(
    processor: Any,
    questions: Questions,
    video: Video | None,
    settings: dict[str, Any],
) -> Any:
    turns = [[{"role": "user", "content": _content(pictures, prompt, video)}] for pictures, prompt in questions]
    return processor.apply_chat_template(
        turns[0] if len(turns) == 1 else turns,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    )


def _of_text(
    processor: Any,
    questions: Questions,
    video: Video | None,
    settings: dict[str, Any],
) -> Any:
    images = [list(pictures) for pictures, _ in questions]
    text = [_plain(processor, len(pictures), prompt, video) for pictures, prompt in questions]
    own = (images[0] or None, text[0]) if len(text) == 1 else (images, text)
    videos = {"videos": [video.frames]} if video else {}
    return processor(images=own[0], text=own[1], return_tensors="pt", **videos, **settings)


def _check_question(processor: Any, pictures: Sequence[Image.Image], prompt: str, video: Video | None) -> None:
    check_prompt(prompt, len(pictures), videos=video is not None)
    for token in (image_token(processor), *([processor.video_token] if video else [])):
        if token in prompt:
            raise InputError(
                f"the prompt must not hold {token}: each image and video gets its place before the words by itself"
            )


def _plain(processor: Any, pictures: int, prompt: str, video: Video | None) -> str:
    clip = processor.video_token if video else ""
    return PLAIN.format(images=image_token(processor) * pictures + clip, prompt=prompt)


def _content(pictures: Sequence[Image.Image], prompt: str, video: Video | None) -> list[dict[str, Any]]:
    return [
        *({"type": "image", "image": picture} for picture in pictures),
        *([{"type": "video", "video": video.frames}] if video else []),
        {"type": "text", "text": prompt},
    ]


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


def on_model(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` on the model's device, the pixels in its dtype."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in moved.items()}
