"""Owns the pieces of a study that are done, on disk, so that a study that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyramiddrop.evaluation.fingerprint import key_digest
from pyramiddrop.inference.errors import user_input


class Pieces:
    """A file of JSON lines that only grows: the first is the key, each later one a piece.

    Args:
        folder: where the file is; both are made when the first piece is done.
        name: what its name begins with, for people.
        key: what the pieces depend on, as plain values; another key has another file.

    Raises:
        InputError: where the file cannot be read.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any]) -> None:
        self.path, self._key = folder / f"{name}-{key_digest(key)}.jsonl", key
        self.done: dict[str, Any] = {line["piece"]: line["found"] for line in self._whole_lines()[1:]}

    def add(self, piece: str, found: Any) -> None:
        """Write down what came of a piece.

        Raises:
            InputError: where that cannot be.
        """
        lines = [{"piece": piece, "found": found}] if self.done else [self._key, {"piece": piece, "found": found}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with user_input(f"cannot write {self.path}", (OSError,)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self.done else "w", encoding="utf-8") as file:
                file.write(text)
        self.done[piece] = found

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
