"""One call of `generate`: which forwards are its steps, and which ask another prompt."""

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
from pyramiddrop.hf.layer_inputs import Kwargs
from pyramiddrop.hf.model_info import UnsupportedModelError
from pyramiddrop.hf.prompt_masks import PromptMasks
from pyramiddrop.hf.versions import cache_of

if TYPE_CHECKING:
    from pyramiddrop.hf.attachment import Attachment

WAIT = "Let the thread end before the `with` block does, or give it method.view(model) or an applied method"


@dataclass
class Generation:
    """One call of `generate`: its first forward is the prompt; what that asked holds until the end.

    Attributes:
        tokens: (B, L) ids or (B, L, D) embeddings that `generate` was given, of all columns so far or the new ones
            alone; None if it was given neither.
        columns: all columns so far, if its attention mask tells.
        frames: of each video that it was given.
        nested: whether it runs inside another one of the same model.
        prompt: works out the masks of the first forward, once that has come, unless it is one token on top of a cache.
        padded: whether the prompt may have padding; False once it was seen to have none.
        started: whether the first forward has come.
        embedded: whether that had embeddings, and no ids.
        vision: what the vision tower told of the prompt's pictures, if a method asks it: it looks once.
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

    def candidates(self, past: int, length: int) -> int:
        """Columns at the end of the first forward that are no prompt: candidate tokens of assisted decoding."""
        if self.columns is not None:
            return max(0, past + length - self.columns)
        if self.tokens is None:
            return 0
        tokens = self.tokens.shape[1]
        return max(0, (past if tokens > past else 0) + length - tokens)


# By attachment, for a patched assistant model may generate inside the generation of a patched main model.
generations: ContextVar[Mapping[int, Generation]] = ContextVar("pyramiddrop_generations", default={})  # noqa: B039


class Generate:
    """Stands in for a patched model's `generate`, so that the forwards know to which generation they belong."""

    def __init__(self, attachment: Attachment, generator: Any) -> None:
        self.attachment, self.generator = attachment, generator
        self.__wrapped__ = MethodType(type(generator).generate, generator)  # what it looks like to `inspect`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.generator.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise UnsupportedModelError(
                "prefill_chunk_size is not supported with a pyramiddrop method: tokens are ranked by the last token "
                "of the whole prompt. Leave it unset"
            )
        frames = video_frames(kwargs, self.attachment.info.merged_frames)
        outer, mask, key = generations.get(), kwargs.get("attention_mask"), id(self.attachment.dispatcher)
        generation = Generation(_tokens(args, kwargs), None if mask is None else mask.shape[1], frames, key in outer)
        if not self.attachment.attached:
            warnings.warn(
                "this `generate` was taken from a model while a pyramiddrop method was on it, and starts after the "
                f"method was taken off: nothing is dropped. {WAIT}",
                stacklevel=2,
            )
        with self.attachment.generating(generation):
            return type(self.generator).generate(self.generator, *args, **kwargs)


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    """Stands in for what `generate_batch` and a server start with."""
    raise ValueError(
        "continuous batching (generate_batch, init_continuous_batching) is not supported with a pyramiddrop method: "
        "its paged cache holds every token in every layer. Use generate with a batch, or serve with vLLM (pyramiddrop "
        "serve), or take the method off with remove(model)"
    )


def _tokens(args: tuple[Any, ...], kwargs: Kwargs) -> Tensor | None:
    """The ids or embeddings that `generate` was given."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    return next((value for value in given if isinstance(value, Tensor)), None)
