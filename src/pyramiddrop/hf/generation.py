"""One call of `generate`: tell its own forwards from those of other prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyramiddrop.hf.images import video_frames
from pyramiddrop.hf.model_info import UnsupportedModelError
from pyramiddrop.hf.prompt_masks import PromptMasks
from pyramiddrop.hf.versions import cache_of

if TYPE_CHECKING:
    from pyramiddrop.hf.attachment import Attachment

WAIT = "Let the thread end before the `with` block does, or give it method.view(model) or an applied method"


@dataclass
class Generation:
    """One call of `generate`. Its first forward is the prompt, whose query token ranks until the end.

    Attributes:
        tokens: (B, L) ids or (B, L, D) embeddings given to `generate`, of all columns so far or of the new ones alone;
            None if there are neither.
        columns: number of all columns so far, if the attention mask tells it.
        nested: True if it runs inside another call of the same model.
        prompt: computes the masks of the first forward; None before it, and if it is one token on top of a cache.
        padded: True if the prompt may have padding; False once it is known to have none.
        started: True after the first forward has begun.
        embedded: True if the first forward had embeddings instead of ids.
        vision: the vision tower's scores of the prompt's pictures, if the method needs them; they are computed once.
    """

    tokens: Tensor | None
    columns: int | None
    frames: list[int] | None
    nested: bool
    prompt: Callable[[], PromptMasks] | None = None
    padded: bool = True
    started: bool = False
    embedded: bool = False
    vision: Tensor | None = None
    _cache: Any = None
    _ids: Tensor | None = None

    def start(self, call: Mapping[str, Any], batch: int) -> None:
        """Remember the first forward, of `batch` rows, so that later ones can be recognised."""
        self.started, self._cache, self._ids = True, cache_of(call), call.get("input_ids")
        self.embedded = self._ids is None
        if self.embedded and self.tokens is not None and not self.tokens.is_floating_point():
            self._ids = self.tokens.repeat_interleave(self.beams(batch), 0)

    def continues(self, call: Mapping[str, Any]) -> bool:
        """True if a forward after the first one is a step of this generation; else it is another prompt (guidance).

        A step has the same cache or, without a cache, the same ids with more after them.
        """
        if not self.started:
            return False
        cache, ids, prompt = cache_of(call), call.get("input_ids"), self._ids
        if cache is not None or self._cache is not None:
            return cache is self._cache
        if ids is None or prompt is None or len(ids) != len(prompt) or ids.shape[1] <= prompt.shape[1]:
            return False
        return torch.equal(ids[:, : prompt.shape[1]], prompt.to(ids.device))

    def beams(self, batch: int) -> int:
        """How often `generate` repeats each sample in a forward of `batch` rows."""
        return 1 if self.tokens is None else max(1, batch // len(self.tokens))

    def candidates(self, past: int, length: int) -> int:
        """The number of candidate tokens of assisted decoding at the end of the first forward, after the prompt."""
        if self.columns is not None:
            return max(0, past + length - self.columns)
        if self.tokens is None:
            return 0
        tokens = self.tokens.shape[1]
        return max(0, (past if tokens > past else 0) + length - tokens)


# By attachment, because a patched assistant model may generate within the generation of a patched main model.
generations: ContextVar[Mapping[int, Generation]] = ContextVar("pyramiddrop_generations", default={})  # noqa: B039


class Generate:
    """Replacement of a patched model's `generate` that assigns forwards to their generation."""

    def __init__(self, attachment: Attachment, generator: Any) -> None:
        self.attachment, self.generator = attachment, generator
        self.__wrapped__ = MethodType(type(generator).generate, generator)  # the signature that `inspect` shows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.generator.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise UnsupportedModelError(
                "prefill_chunk_size is not supported with a pyramiddrop method: tokens are ranked by the last token "
                "of the whole prompt. Leave it unset"
            )
        given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        tokens = next((value for value in given if isinstance(value, Tensor)), None)
        attachment, mask, outer = self.attachment, kwargs.get("attention_mask"), generations.get()
        frames, key = video_frames(kwargs, attachment.info.merged_frames), id(attachment.dispatcher)
        generation = Generation(tokens, None if mask is None else mask.shape[1], frames, nested=key in outer)
        if not attachment.attached:
            warnings.warn(
                "this `generate` was taken from a model while a pyramiddrop method was on it, and starts after the "
                f"method was taken off: nothing is dropped. {WAIT}",
                stacklevel=2,
            )
        token, running = generations.set({**outer, key: generation}), (id(attachment), id(generation))
        attachment.generating.add(running)
        try:
            return type(self.generator).generate(self.generator, *args, **kwargs)
        finally:
            attachment.generating.discard(running)
            generations.reset(token)


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    """Replacement of the methods with which `generate_batch` and a server start."""
    raise ValueError(
        "continuous batching (generate_batch, init_continuous_batching) is not supported with a pyramiddrop method: "
        "its paged cache holds every token in every layer. Use generate with a batch, or serve with vLLM (pyramiddrop "
        "serve), or take the method off with remove(model)"
    )
