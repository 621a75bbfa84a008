"""Owns what is answered already: replies on disk, a line each, written as batches finish and read back after a stop."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyramiddrop.evaluation.answering import Reply
from pyramiddrop.evaluation.fingerprint import key_digest
from pyramiddrop.inference.comparison import usage_dict
from pyramiddrop.inference.errors import user_input
from pyramiddrop.inference.usage import StageUse, Usage


class Journal:
    """The replies of one method, in a file of its own that no other key has.

    Args:
        folder: where the file is.
        name: what its name begins with, for people.
        key: what the replies depend on, as plain values; it is the file's first line.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}-{key_digest(key)}.jsonl"
        self._head = _line(key)

    def read(self, batch: int, total: int) -> list[Reply]:
        """The replies that were written: all `total`, or those up to the last whole batch; the rest is cut off.

        A batch that was stopped half way is answered again as a whole, so that its numbers are those of an unbroken
        run to the last bit.

        Raises:
            InputError: for a file that cannot be read or written.
        """
        with user_input(f"cannot write {self.path}", (OSError,)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            if lines[:1] != [self._head]:
                self.path.write_bytes(self._head)
                return []
            replies = _replies(lines[1:])
            if len(replies) < total:
                del replies[len(replies) // batch * batch :]
            os.truncate(self.path, sum(map(len, lines[: 1 + len(replies)])))
            return replies

    def append(self, replies: Sequence[Reply]) -> None:
        """Write the replies of one batch, down to the disk.

        Raises:
            InputError: where that cannot be.
        """
        with user_input(f"cannot write {self.path}", (OSError,)), self.path.open("ab") as file:
            file.write(b"".join(_line(_reply_dict(reply)) for reply in replies))
            file.flush()
            os.fsync(file.fileno())


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode() + b"\n"


def _replies(lines: Sequence[bytes]) -> list[Reply]:
    """Those of the lines before the first that is broken."""
    found: list[Reply] = []
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            found.append(_reply(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            break
    return found


def _reply_dict(reply: Reply) -> dict[str, Any]:
    return {"answer": reply.text, "usage": usage_dict(reply.usage), "vanilla": usage_dict(reply.vanilla)}


def _reply(entry: Mapping[str, Any]) -> Reply:
    return Reply(entry["answer"], _usage(entry["usage"]), _usage(entry["vanilla"]))


def _usage(entry: Mapping[str, Any]) -> Usage:
    stages = tuple(StageUse(**stage) for stage in entry["stages"])
    counts = {name: math.nan if entry[name] is None else entry[name] for name in ("flops", "kv_bytes")}
    return Usage(**{**entry, "stages": stages, **counts})
