"""Parse training samples: LLaVA's conversations, or Hugging Face's messages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

IMAGE, VIDEO = "<image>", "<video>"
#: LLaVA's names of the speakers.
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")

VIDEOS = f"videos are not supported; give frames as images, each with an {IMAGE}"

Part = dict[str, str]
Message = dict[str, Any]


class BrokenSampleError(ValueError):
    """A sample cannot be used for training; the message says why, without naming the sample."""


@dataclass(frozen=True)
class Sample:
    """A conversation of `{"role": ..., "content": [part, ...]}`, and a file or a picture for each place of an image.

    A part is `{"type": "text", "text": ...}` or the place of an image, `{"type": "image"}`.
    """

    messages: list[Message]
    images: list[Any]


def json_records(path: Path) -> Iterator[Any]:
    """The records of a JSON list, or of a `.jsonl` file with one in each line; else OSError or ValueError."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        records = json.loads(text)
        if not isinstance(records, list):
            raise ValueError(f"it must be a list of samples; got {type(records).__name__}")
        yield from records
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield record


def read_sample(record: Any, folder: Path | None = None) -> Sample:
    """Parse the sample in `record`, in one of two formats.

    - LLaVA's: `{"image": "a.jpg" or [...], "conversations": [{"from": "human", "value": "<image>\\nWhy?"}, ...]}`
    - Messages: `{"images": [...] or "image": ..., "messages": [{"role": "user", "content": ...}, ...]}`, where content
      is text, with an `<image>` wherever one belongs, or a list of parts.

    If no place is given, the images come before the first text of the user.

    Args:
        folder: the folder of relative image files.

    Raises:
        BrokenSampleError: for any other format, and if the numbers of images and places differ.
    """
    if not isinstance(record, Mapping):
        raise BrokenSampleError(f"a sample must be an object; got {type(record).__name__}")
    if record.get("conversations") is not None:
        messages = [_llava_message(turn) for turn in _list_of(record["conversations"], "conversations")]
    elif record.get("messages") is not None:
        messages = [_message(turn) for turn in _list_of(record["messages"], "messages")]
    else:
        raise BrokenSampleError('a sample must have "conversations" or "messages"')
    if record.get("video") is not None or record.get("videos") is not None:
        raise BrokenSampleError(VIDEOS)
    given = record.get("image") if record.get("images") is None else record["images"]
    images = [located(image, folder) for image in listed(given)]
    _check_roles([message["role"] for message in messages])
    if images and not image_places(messages):
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"} for _ in images] + first["content"]
    _check_content(messages, len(images))
    return Sample(messages, images)


def _list_of(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
        raise BrokenSampleError(f'"{name}" must be a list of turns')
    return value


def _llava_message(turn: Any) -> Message:
    role = _field(turn, "from")
    if role not in LLAVA_ROLES:
        raise BrokenSampleError(f'"from" must be one of {", ".join(LLAVA_ROLES)}; got {role!r}')
    return {"role": LLAVA_ROLES[role], "content": split_at_images(_text(turn, "value"))}


def _message(turn: Any) -> Message:
    role, content = _field(turn, "role"), _field(turn, "content")
    if role not in ROLES:
        raise BrokenSampleError(f'"role" must be one of {", ".join(ROLES)}; got {role!r}')
    if isinstance(content, str):
        return {"role": role, "content": split_at_images(content)}
    return {"role": role, "content": [_part(part) for part in _list_of(content, "content")]}


def _part(part: Any) -> Part:
    kind = _field(part, "type")
    if kind == "text":
        return {"type": "text", "text": _text(part, "text")}
    if kind == "image":
        return {"type": "image"}
    raise BrokenSampleError(f'a part of type {kind!r} is not supported; use "text" or "image"')


def _field(holder: Any, name: str) -> Any:
    if not isinstance(holder, Mapping) or holder.get(name) is None:
        raise BrokenSampleError(f'a turn has no "{name}"')
    return holder[name]


def _text(holder: Any, name: str) -> str:
    value = _field(holder, name)
    if not isinstance(value, str):
        raise BrokenSampleError(f"a turn must be text; got {type(value).__name__}")
    return value


def split_at_images(text: str) -> list[Part]:
    """Split `text` into parts, without line breaks around `<image>`, which the chat template adds."""
    parts: list[Part] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def message_text(message: Message) -> str:
    """The texts of a message, joined by spaces."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def image_places(messages: Sequence[Message]) -> int:
    """The number of places of images in messages."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def listed(value: Any) -> Sequence[Any]:
    """A list of images or answers, from a list, a single one or None."""
    if value is None:
        return []
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]


def located(image: Any, folder: Path | None = None) -> str | bytes | Image:
    """The path of an image file in `folder`, the bytes of a file, or the picture itself; else BrokenSampleError."""
    if isinstance(image, Mapping):  # undecoded images of `datasets`
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if image is None or (isinstance(image, str | bytes) and not image):
        raise BrokenSampleError("an image is empty")
    if isinstance(image, str | os.PathLike):
        return str(Path(folder or ".") / image)
    if not isinstance(image, bytes | Image):
        raise BrokenSampleError(
            f"an image must be the name of a file, a picture, or {{'bytes': ..., 'path': ...}}; got {image!r:.80}"
        )
    return image


def _check_roles(roles: Sequence[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BrokenSampleError(
            f"user and assistant must take turns, the user first and the assistant last; got {', '.join(roles)}"
        )


def _check_content(messages: Sequence[Message], images: int) -> None:
    for message in messages:
        if message["role"] == "user" and any(VIDEO in part.get("text", "") for part in message["content"]):
            raise BrokenSampleError(f"a turn of the user holds a {VIDEO}; {VIDEOS}")
        if not message["content"]:
            raise BrokenSampleError(f"a turn of the {message['role']} is empty")
        if message["role"] == "assistant" and image_places([message]):
            raise BrokenSampleError(f"an answer holds an {IMAGE}")
    if (places := image_places(messages)) != images:
        raise BrokenSampleError(f"{places} {IMAGE} for {images} images")
