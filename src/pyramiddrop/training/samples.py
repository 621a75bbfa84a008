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
#: LLaVA's words for who speaks.
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")

VIDEOS = f"videos are not supported; give frames as images, each with an {IMAGE}"

Part = dict[str, str]
Message = dict[str, Any]


class BrokenSampleError(ValueError):
    """A sample that cannot be trained on. The message says why, without saying which."""


@dataclass(frozen=True)
class Sample:
    """A conversation and its images.

    Attributes:
        messages: `{"role": ..., "content": [part, ...]}`; a part is `{"type": "text", "text": ...}` or an image's
            place, `{"type": "image"}`.
        images: one for each place, in order: a file, or a picture.
    """

    messages: list[Message]
    images: list[Any]


def json_records(path: Path) -> Iterator[Any]:
    """The records of a JSON list, or of a file with the ending `.jsonl`, a line each.

    Raises:
        OSError, ValueError: for a file that cannot be read, is no JSON or no list.
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
    """The sample in `record`, which is either one of these two.

    - LLaVA's: `{"image": "a.jpg" or [...], "conversations": [{"from": "human", "value": "<image>\\nWhy?"}, ...]}`
    - Messages: `{"images": [...] or "image": ..., "messages": [{"role": "user", "content": ...}, ...]}`, where content
      is text, with an `<image>` wherever one belongs, or a list of parts.

    Without a single place for them, the images stand before the first words of the user.

    Args:
        folder: what relative names of image files start from.

    Raises:
        BrokenSampleError: for anything that is not so, and for images that do not fit their places.
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
    """`text` as parts; the line breaks that set an `<image>` apart from the words are the chat template's business."""
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
    """The name of an image's file from `folder` on, the bytes of such a file, or the picture itself.

    Raises:
        BrokenSampleError: for anything else.
    """
    if isinstance(image, Mapping):  # how `datasets` hands over what it does not decode
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
    """Give the images of a conversation without any place theirs: before the user's first words."""
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
