"""The scheduler's part: tell block managers what each request drops, and cut prompts so that pictures stay whole."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from pyramiddrop.vllm.kv_cache import StageManager
from pyramiddrop.vllm.prompts import read_prompt
from pyramiddrop.vllm.rules import rules_of


class _Staged:
    """Over one of vLLM's schedulers."""

    def __init__(self, vllm_config: Any, *args: Any, **options: Any) -> None:
        super().__init__(vllm_config, *args, **options)  # type: ignore[call-arg]
        self._rules = rules_of(vllm_config)
        self._nothing = (0,) * (self._rules.stages + 1)
        self.dropped: dict[str, tuple[int, ...]] = {}
        managers = self.kv_cache_manager.coordinator.single_type_managers  # type: ignore[attr-defined]
        for manager in managers:
            if not isinstance(manager, StageManager):
                raise RuntimeError(f"pyramiddrop: a KV cache group is kept by {type(manager).__name__}, not by a stage")
            manager.dropped = self.dropped

    def add_request(self, request: Request) -> None:
        prompt = read_prompt(request.mm_features, request.num_prompt_tokens, self._rules)
        self.dropped[request.request_id] = prompt.dropped if prompt else self._nothing
        super().add_request(request)  # type: ignore[misc]

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)  # type: ignore[misc]
        del self.dropped[request.request_id]

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """How many of `num_new_tokens` to take.

        A batch of one token each would be replayed as a CUDA graph of decoding, in which nothing is ranked: so of a
        visual prompt never one token is taken alone. For none to be left over, a part never ends one token before the
        prompt's end, nor before a picture: there vLLM cuts, too, while the picture before is still in its cache.
        """
        new: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)  # type: ignore[misc]
        if num_computed_tokens >= request.num_prompt_tokens or not any(self.dropped[request.request_id]):
            return new
        cuts = [request.num_prompt_tokens, *(feature.mm_position.offset for feature in request.mm_features)]
        if num_computed_tokens + new + 1 in cuts:
            new -= 1
        return new if new > 1 else 0


class StagedScheduler(_Staged, Scheduler):
    """Without asynchronous scheduling."""


class AsyncStagedScheduler(_Staged, AsyncScheduler):
    """With asynchronous scheduling, vLLM's default."""


def staged_scheduler(vllm_config: Any, **options: Any) -> Scheduler:
    """The scheduler of an engine; whether it is asynchronous is known only after its configuration was checked."""
    chosen = AsyncStagedScheduler if vllm_config.scheduler_config.async_scheduling else StagedScheduler
    return chosen(vllm_config, **options)
