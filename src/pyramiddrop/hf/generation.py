"""One call of `generate`: which forwards are its steps, and which ask another prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.hf.plan import Request
from pyramiddrop.hf.versions import cache_of


@dataclass
class Generation:
    """One call of `generate`: its first forward is the prompt; what that asked holds until the end.

    Attributes:
        tokens: (B, L) ids or (B, L, D) embeddings that `generate` was given, of all columns so far or the new ones
            alone; None where it was given neither.
        columns: all columns so far, where its attention mask tells.
        frames: of each video that it was given.
        nested: whether it runs inside another one of the same model.
        prompt: the request of the first forward, once that has come, where it is no single token on top of a cache.
        started: whether the first forward has come.
        embedded: whether that had embeddings, and no ids.
        vision: what the vision tower told of the prompt's pictures, where a method asks it: it looks once.
    """

    tokens: Tensor | None
    columns: int | None
    frames: list[int] | None
    nested: bool
    prompt: Request | None = None
    started: bool = False
    embedded: bool = False
    vision: Tensor | None = None
    _cache: Any = None
    _ids: Tensor | None = None

    @property
    def is_first(self) -> bool:
        """Whether the forward that comes is the prompt of an outermost generation: that one is traced."""
        return not (self.started or self.nested)

    def start(self, call: Mapping[str, Any], batch: int) -> None:
        """Remember the first forward, of `batch` rows: by it later ones are told."""
        self.started, self._cache, self._ids = True, cache_of(call), call.get("input_ids")
        self.embedded = self._ids is None
        if self.embedded and self.tokens is not None and not self.tokens.is_floating_point():
            self._ids = self.tokens.repeat_interleave(self.beams(batch), 0)

    def continues(self, call: Mapping[str, Any]) -> bool:
        """Whether a forward is, after the first one, a step of this generation: it has the same cache; or, where there
        is none, the same ids and more behind them. Anything else asks another prompt (guidance, verifiers)."""
        if not self.started:
            return False
        cache, ids, prompt = cache_of(call), call.get("input_ids"), self._ids
        if cache is not None or self._cache is not None:
            return cache is self._cache
        if ids is None or prompt is None or len(ids) != len(prompt) or ids.shape[1] <= prompt.shape[1]:
            return False
        return torch.equal(ids[:, : prompt.shape[1]], prompt.to(ids.device))

    def beams(self, batch: int) -> int:
        """How often `generate` has repeated each row of a forward of `batch` rows."""
        return 1 if self.tokens is None else max(1, batch // len(self.tokens))

    def guesses(self, past: int, length: int) -> int:
        """Columns at the end of the first forward that are no prompt: candidates of assisted decoding."""
        if self.columns is not None:
            return max(0, past + length - self.columns)
        if self.tokens is None:
            return 0
        tokens = self.tokens.shape[1]
        return max(0, (past if tokens > past else 0) + length - tokens)
