"""Tell block managers what each request drops, cut prompts where they can be cut, and find their cached blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from pyramiddrop.vllm.kv_cache import StageManager
from pyramiddrop.vllm.names import LOGGER
from pyramiddrop.vllm.prefix_rows import RecordedBlocks, kept_tokens
from pyramiddrop.vllm.prompts import read_prompt
from pyramiddrop.vllm.request_rules import rules_for
from pyramiddrop.vllm.rules import rules_of

logger = logging.getLogger(LOGGER)


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
            manager.on_cached = self._record
        [self._first] = [manager for manager in managers if manager.kv_cache_spec.stage == 0]
        self._recorded = RecordedBlocks(kept_tokens(vllm_config) // self._first.block_size)
        self._step = 0
        self._log_capacity(len(managers))

    def _log_capacity(self, groups: int) -> None:
        """Beside vLLM's line, which counts tokens that nothing is dropped of."""
        rows = self.cache_config.num_gpu_blocks * self._first.block_size  # type: ignore[attr-defined]
        kept = 1 + sum(self._rules.schedule.keep)
        logger.info(
            "pyramiddrop: the KV cache holds %s tokens of text, or %s visual tokens, each in %.4g of %d stages",
            f"{rows // groups:,}",
            f"{int(rows / kept):,}",
            kept,
            groups,
        )

    def schedule(self, *args: Any, **options: Any) -> Any:
        self._step += 1
        return super().schedule(*args, **options)  # type: ignore[misc]

    def add_request(self, request: Request) -> None:
        rules = rules_for(self._rules, request.sampling_params)
        prompt = read_prompt(request.mm_features, request.num_prompt_tokens, rules)
        self.dropped[request.request_id] = prompt.dropped if prompt else self._nothing
        super().add_request(request)  # type: ignore[misc]

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)  # type: ignore[misc]
        del self.dropped[request.request_id]

    def _record(self, blocks: Sequence[Any]) -> None:
        # Without its rows a block is no use, and would stand before a later one of the same content.
        self._first.block_pool.evict_blocks(self._recorded.add(blocks, self._step))

    def _get_local_prefix_cache_hit(self, request: Request, *limits: Any) -> Any:
        """Blocks of each group that hold a prefix of the request, its tokens, and what vLLM tells besides.

        Of a prompt that drops tokens, blocks of stage 0 alone, and those whose rows at the first drop the workers hold.
        """
        if not any(self.dropped[request.request_id]):
            return super()._get_local_prefix_cache_hit(request, *limits)  # type: ignore[misc]
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        if not manager.prefix_cache_lookup_enabled(request):
            return manager.empty_kv_cache_blocks, 0, 0, False
        first, length = self._first, request.num_prompt_tokens
        found = first.longest_hit(request.block_hashes, length - 2)
        count = self._recorded.usable(found, self._step)
        while count and self._leaves_one_token(request, count * first.block_size):
            count -= 1
        groups = [found[:count] if other is first else [] for other in manager.coordinator.single_type_managers]
        return manager.create_kv_cache_blocks(tuple(groups)), count * first.block_size, 0, False

    def _leaves_one_token(self, request: Request, end: int) -> bool:
        """Whether a part of the prompt that ends before the token `end` leaves one token before a place where a part
        must end, or may: the prompt's end, and each picture."""
        cuts = [request.num_prompt_tokens, *(feature.mm_position.offset for feature in request.mm_features)]
        return end + 1 in cuts

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """How many of `num_new_tokens` to take.

        A batch of one token each would be replayed as a CUDA graph of decoding, in which nothing is ranked: so of a
        visual prompt never one token is taken alone. For none to be left over, a part never ends one token before the
        prompt's end, nor before a picture: there vLLM cuts, too, while the picture before is still in its cache.
        """
        new: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)  # type: ignore[misc]
        if num_computed_tokens >= request.num_prompt_tokens or not any(self.dropped[request.request_id]):
            return new
        if self._leaves_one_token(request, num_computed_tokens + new):
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
