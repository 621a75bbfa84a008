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
    """A conversation and its images.

    Attributes:
        messages: `{"role": ..., "content": [part, ...]}`; a part is `{"type": "text", "text": ...}` or the place of an
            image, `{"type": "image"}`.
        images: a file or a picture for each place, in order.
    """

    messages: list[Message]
    images: list[Any]


def json_records(path: Path) -> Iterator[Any]:
    """The records of a JSON list, or of a `.jsonl` file with one in each line.

    Raises:
        OSError, ValueError: if the file cannot be read, or is not a JSON list.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        yield from (_json_line(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
        return
    records = json.loads(text)
    if not isinstance(records, list):
        raise ValueError(f"it must be a list of samples; got {type(records).__name__}")
    yield from records


def _json_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error}") from error


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
        turns = [_llava_turn(turn) for turn in _list_of(record["conversations"], "conversations")]
    elif record.get("messages") is not None:
        turns = [_message_turn(turn) for turn in _list_of(record["messages"], "messages")]
    else:
        raise BrokenSampleError('a sample must have "conversations" or "messages"')
    if record.get("video") is not None or record.get("videos") is not None:
        raise BrokenSampleError(VIDEOS)
    images = [located(image, folder) for image in _images_of(record)]
    messages = [{"role": role, "content": parts} for role, parts in turns]
    _place_images(messages, len(images))
    _check_roles([role for role, _ in turns])
    _check_content(messages, len(images))
    return Sample(messages, images)


def _list_of(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
        raise BrokenSampleError(f'"{name}" must be a list of turns')
    return value


def _llava_turn(turn: Any) -> tuple[str, list[Part]]:
    role = _field(turn, "from")
    if role not in LLAVA_ROLES:
        raise BrokenSampleError(f'"from" must be one of {", ".join(LLAVA_ROLES)}; got {role!r}')
    return LLAVA_ROLES[role], split_at_images(_text(_field(turn, "value")))


def _message_turn(turn: Any) -> tuple[str, list[Part]]:
    role, content = _field(turn, "role"), _field(turn, "content")
    if role not in ROLES:
        raise BrokenSampleError(f'"role" must be one of {", ".join(ROLES)}; got {role!r}')
    if isinstance(content, str):
        return role, split_at_images(content)
    return role, [_part(part) for part in _list_of(content, "content")]


def _part(part: Any) -> Part:
    kind = _field(part, "type")
    if kind == "text":
        return {"type": "text", "text": _text(_field(part, "text"))}
    if kind == "image":
        return {"type": "image"}
    raise BrokenSampleError(f'a part of type {kind!r} is not supported; use "text" or "image"')


def _field(holder: Any, name: str) -> Any:
    if not isinstance(holder, Mapping) or holder.get(name) is None:
        raise BrokenSampleError(f'a turn has no "{name}"')
    return holder[name]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BrokenSampleError(f"a turn must be text; got {type(value).__name__}")
    return value


def split_at_images(text: str) -> list[Part]:
    """Split `text` into parts, without line breaks around `<image>`, which the chat template adds."""
    parts: list[Part] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        words = piece.strip("\n")
        if words.strip():
            parts.append({"type": "text", "text": words})
    return parts


def _images_of(record: Mapping[str, Any]) -> Sequence[Any]:
    given = record.get("images") if record.get("images") is not None else record.get("image")
    if given is None:
        return []
    return given if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]


def located(image: Any, folder: Path | None = None) -> str | bytes | Image:
    """The path of an image file in `folder`, the bytes of a file, or the picture itself.

    Raises:
        BrokenSampleError: for anything else.
    """
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


def _place_images(messages: list[Message], images: int) -> None:
    """Add places for images to a conversation without any, before the user's first text."""
    if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = [{"type": "image"} for _ in range(images)] + first["content"]


def _check_roles(roles: Sequence[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or list(spoken) != expected:
        raise BrokenSampleError(
            f"user and assistant must take turns, the user first and the assistant last; got {', '.join(roles)}"
        )


def _check_content(messages: Sequence[Message], images: int) -> None:
    for message in messages:
        if message["role"] == "user" and any(VIDEO in part.get("text", "") for part in message["content"]):
            raise BrokenSampleError(f"a turn of the user holds a {VIDEO}; {VIDEOS}")
        if not message["content"]:
            raise BrokenSampleError(f"a turn of the {message['role']} is empty")
        if message["role"] == "assistant" and any(part["type"] == "image" for part in message["content"]):
            raise BrokenSampleError(f"an answer holds an {IMAGE}")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != images:
        raise BrokenSampleError(f"{places} {IMAGE} for {images} images")
