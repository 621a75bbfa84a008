"""KV memory of a stage: its own group of blocks, for the tokens that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec


class StageManager(FullAttentionManager):
    """Allocates blocks for a request's tokens without those dropped before the stage.

    Attributes:
        dropped: request id -> number of tokens dropped before each stage; the scheduler maintains it.
        on_cached: called with blocks of a pruned prompt that were added to the prefix cache.
    """

    dropped: Mapping[str, Sequence[int]]
    on_cached: Callable[[Sequence[Any]], None] | None = None

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **options: Any,
    ) -> int:
        blocks: int = super().get_num_blocks_to_allocate(
            request_id,
            self._held(request_id, num_tokens),
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            self._held(request_id, num_tokens_main_model),
            **options,
        )
        return blocks

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        blocks: list[Any] = super().allocate_new_blocks(
            request_id, self._held(request_id, num_tokens), self._held(request_id, num_tokens_main_model)
        )
        return blocks

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **options: Any) -> None:
        """Add the blocks of a request to the prefix cache.

        Of a pruned prompt, only blocks of stage 0 are valid for another question, and only those of the prompt itself,
        because the rows at the first drop are not stored for its answer.
        """
        if not any(self.dropped[request.request_id]):
            super().cache_blocks(request, num_tokens, *args, **options)
        elif self.kv_cache_spec.stage == 0:
            before = self.num_cached_block.get(request.request_id, 0)
            super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **options)
            after = self.num_cached_block.get(request.request_id, 0)
            if self.on_cached is not None:
                self.on_cached(self.req_to_blocks[request.request_id][before:after])

    def longest_hit(self, hashes: Sequence[Any], tokens: int, groups: Sequence[int]) -> dict[int, list[Any]]:
        """For each of `groups` of this stage, the cached blocks of the longest prefix with the block `hashes`.

        Args:
            hashes: hashes of the prompt's blocks.
            tokens: the largest number of tokens to find.
            groups: numbers of KV-cache groups; vLLM may divide the layers of a long stage among several.
        """
        blocks, _ = self.find_longest_cache_hit(
            block_hashes=hashes,
            max_length=tokens,
            kv_cache_group_ids=list(groups),
            block_pool=self.block_pool,
            kv_cache_spec=self.kv_cache_spec,
            drop_eagle_block=False,
            alignment_tokens=self.block_size,
        )
        return dict(zip(groups, blocks, strict=True))

    def _held(self, request_id: str, tokens: int) -> int:
        # A prompt that is computed in parts has no rows here before its last part.
        stage: int = self.kv_cache_spec.stage
        return max(0, tokens - self.dropped[request_id][stage])


@dataclass(frozen=True, kw_only=True)
class StageSpec(FullAttentionSpec):
    """The KV cache of one layer in `stage`, including stage 0.

    With a plain FullAttentionSpec, vLLM would silently put layers of later stages into the same group. The class must
    be importable, because workers send it to the engine's core.
    """

    stage: int = 0

    @classmethod
    def of(cls, spec: FullAttentionSpec, stage: int) -> Self:
        """Convert the `spec` of a layer to that of a layer in `stage`."""
        values = {entry.name: getattr(spec, entry.name) for entry in fields(FullAttentionSpec)}
        return cls(**values, stage=stage)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        # vLLM merges specs on trial: an AssertionError means that they do not fit.
        assert all(spec == specs[0] for spec in specs), "layers of different stages hold different tokens"
        return specs[0]

    def is_uniform_with_collection(self, specs: Mapping[str, KVCacheSpec]) -> bool:
        return all(isinstance(spec, StageSpec) and spec.stage == self.stage for spec in specs.values())


KVCacheSpecRegistry._ensure_registered()  # otherwise vLLM does not register its own specs once this one exists
register_kv_cache_spec(manager_class=StageManager)(StageSpec)
