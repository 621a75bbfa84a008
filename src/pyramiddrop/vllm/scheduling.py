"""Tell block managers what each request drops, split prompts at allowed tokens, and find their cached blocks."""

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
from pyramiddrop.vllm.rules import rules_for, rules_of

logger = logging.getLogger(LOGGER)


class _Staged:
    """Mixin for vLLM's schedulers."""

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
        self._undropped = [manager.kv_cache_group_id for manager in managers if manager.kv_cache_spec.stage == 0]
        self._first = managers[self._undropped[0]]  # the group by whose blocks the workers store rows
        self._first.on_cached = self._record
        self._recorded = RecordedBlocks(kept_tokens(vllm_config) // self._first.block_size)
        self._step = 0
        self._log_capacity(len(managers))

    def _log_capacity(self, groups: int) -> None:
        """Log the KV capacity with dropping, beside vLLM's line, which is without."""
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
        # A block without its rows is useless, and would hide a later one with the same content.
        self._first.block_pool.evict_blocks(self._recorded.add(blocks, self._step))

    def _get_local_prefix_cache_hit(self, request: Request, *limits: Any) -> Any:
        """The cached blocks of each group for a prefix of the request, its number of tokens, and vLLM's other results.

        For a pruned prompt, only blocks of stage 0 whose rows at the first drop the workers hold.
        """
        if not any(self.dropped[request.request_id]):
            return super()._get_local_prefix_cache_hit(request, *limits)  # type: ignore[misc]
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        if not manager.prefix_cache_lookup_enabled(request):
            return manager.empty_kv_cache_blocks, 0, 0, False
        first, length = self._first, request.num_prompt_tokens
        found = first.longest_hit(request.block_hashes, length - 2, self._undropped)
        count = self._recorded.usable(found[first.kv_cache_group_id], self._step)
        while count and self._leaves_one_token(request, count * first.block_size):
            count -= 1
        groups = [found.get(group, [])[:count] for group in range(len(manager.coordinator.single_type_managers))]
        return manager.create_kv_cache_blocks(tuple(groups)), count * first.block_size, 0, False

    def _leaves_one_token(self, request: Request, end: int) -> bool:
        """True if a part of the prompt that ends before the token `end` leaves a single token before the next place at
        which a part must or may end: the prompt's end, and each picture."""
        cuts = [request.num_prompt_tokens, *(feature.mm_position.offset for feature in request.mm_features)]
        return end + 1 in cuts

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """The number of tokens to schedule, of `num_new_tokens`.

        A batch with one token for each request would be replayed as a CUDA graph for decoding, in which nothing is
        ranked. A single token of a visual prompt is therefore never scheduled alone. To leave none over, a part never
        ends one token before the prompt's end or before a picture, where vLLM also splits.
        """
        new: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)  # type: ignore[misc]
        if num_computed_tokens >= request.num_prompt_tokens or not any(self.dropped[request.request_id]):
            return new
        if self._leaves_one_token(request, num_computed_tokens + new):
            new -= 1
        return new if new > 1 else 0


class StagedScheduler(_Staged, Scheduler):
    """The scheduler without asynchronous scheduling."""


class AsyncStagedScheduler(_Staged, AsyncScheduler):
    """The scheduler with asynchronous scheduling, vLLM's default."""


def staged_scheduler(vllm_config: Any, **options: Any) -> Scheduler:
    """The scheduler class of an engine, chosen after its configuration was checked."""
    chosen = AsyncStagedScheduler if vllm_config.scheduler_config.async_scheduling else StagedScheduler
    return chosen(vllm_config, **options)
