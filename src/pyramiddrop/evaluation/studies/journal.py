"""Owns the journal of a study: what is done so far, on disk, so that a study that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyramiddrop.inference.errors import InputError, user_input


class Journal:
    """A file of JSON lines that only grows: the first says what is measured, each later one holds a piece that is done.

    Args:
        path: of the file; it is made when the first piece is done.
        about: what is measured, in plain numbers and text. Only a study of the same goes on with the file.

    Raises:
        InputError: where the file is another study's, or cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self._first = path, json.loads(json.dumps({"about": about}))
        lines = self._whole_lines() or [self._first]
        if lines[0] != self._first:
            different = _difference(lines[0], self._first)
            raise InputError(f"{path.parent} holds another study ({different}); give another folder with --output")
        self.entries: dict[str, Any] = {line["key"]: line["done"] for line in lines[1:]}

    def add(self, key: str, done: Any) -> None:
        """Write down that the piece `key` is done, and what came of it."""
        begins = [] if self.entries else [self._first]
        text = "".join(json.dumps(line) + "\n" for line in (*begins, {"key": key, "done": done}))
        mode = "a" if self.entries else "w"
        with user_input(f"cannot write {self.path}", (OSError,)), self.path.open(mode, encoding="utf-8") as file:
            file.write(text)
        self.entries[key] = done

    def _whole_lines(self) -> list[Any]:
        """What the file holds. A last line that was cut off while it was written is taken off the file."""
        if not self.path.exists():
            return []
        with user_input(f"cannot read {self.path}", (OSError, ValueError)):
            text = self.path.read_text("utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                self.path.write_text(whole, "utf-8")
            return [json.loads(line) for line in whole.splitlines()]


def _difference(held: Any, asked: Any) -> str:
    """The first setting in which two studies differ, for people."""
    before, now = (entry.get("about", {}) if isinstance(entry, dict) else {} for entry in (held, asked))
    name = next((name for name in {**before, **now} if before.get(name) != now.get(name)), "its format")
    return f"{name} is {before.get(name)!r} there, and {now.get(name)!r} now"
