"""Attention of a stage: metadata with fewer rows, shorter sequences and other slots; padded heads."""

from __future__ import annotations

import types
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend

from pyramiddrop.vllm.batch import Batch, Step
from pyramiddrop.vllm.kv_cache import StageSpec


def join_stage(attention: Any, stage: int, batch: Batch) -> None:
    """Assign vLLM's `Attention` layer to `stage`, with its own KV-cache group and metadata.

    Raises:
        ValueError: if the layer does not attend to all earlier tokens.
    """
    if attention.sliding_window is not None or attention.attn_backend.is_mla():
        raise ValueError("pyramiddrop serves full attention only; the model has sliding windows or latent attention")
    original = attention.get_kv_cache_spec

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> StageSpec:
        return StageSpec.of(original(vllm_config), stage)

    attention.get_kv_cache_spec = types.MethodType(get_kv_cache_spec, attention)
    attention.pyramiddrop_batch = batch
    attention.attn_backend = _stage_backend(attention.attn_backend, stage)


def pad_heads(attention: Any) -> None:
    """Pad the heads of vLLM's `Attention` layer if its backend does not support their size.

    vLLM's CPU backend has no heads of size 48, for example. Zeros after a query and a key do not change their product,
    and those after a value are removed again. The KV cache is as wide as the padded heads.

    Raises:
        ValueError: if the heads are larger than the backend supports.
    """
    backend, size = attention.attn_backend, attention.head_size
    if backend.supports_head_size(size):
        return
    wider = [other for other in backend.get_supported_head_sizes() if other > size]
    if not wider:
        raise ValueError(f"heads of {size} cannot be served: {backend.get_name()} computes smaller ones only")
    wide = min(wider)
    attention.head_size = attention.head_size_v = attention.impl.head_size = wide
    original = attention.forward

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        padded = [pad(_by_head(states, size), (0, wide - size)).flatten(-2) for states in (query, key, value)]
        return _by_head(original(*padded, **options), wide)[..., :size].flatten(-2)

    attention.forward = types.MethodType(forward, attention)


def _by_head(states: Tensor, size: int) -> Tensor:
    return states.view(*states.shape[:-1], -1, size)


@cache
def _stage_backend(backend: Any, stage: int) -> Any:
    """`backend` with a metadata builder for `stage`: one class for all of its layers, by which vLLM groups them."""
    base: Any = backend.get_builder_cls()

    class StageBuilder(base):
        supports_update_block_table = False

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any, **options: Any):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **options)
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            self._batch: Batch = layer.pyramiddrop_batch
            # A captured decode graph reads the lengths from this buffer, and so every step writes them here.
            self._lengths = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=device)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **options: Any
        ) -> Any:
            if stage:
                common_attn_metadata = self._staged(common_attn_metadata)
            else:
                self._batch.note_blocks(common_attn_metadata.block_table_tensor, self.kv_cache_spec.block_size)
            return super().build(common_prefix_len, common_attn_metadata, fast_build, **options)

        def _staged(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
            lengths = self._lengths[: len(common.seq_lens)]
            lengths.copy_(common.seq_lens)
            common = common.replace(seq_lens=lengths)
            step = self._batch.step
            if step is None or not step.drops:
                return common
            common = _shorter(common, step, stage)
            if step.decodes:
                _write_decoding_slots(common, self.kv_cache_spec.block_size, len(step.entries))
                return common
            if step.has_visual:
                rows = step.rows(stage)
                if not any(rows):
                    return common  # the layers of this stage do not run
                common = _fewer_rows(common, rows)
                step.slots.update(dict.fromkeys(self.layer_names, common.slot_mapping))
            _write_slots(common, self.kv_cache_spec.block_size)
            return common

    return subclass_attention_backend(f"PyramidDropStage{stage}", backend, StageBuilder)


def _shorter(common: CommonAttentionMetadata, step: Step, stage: int) -> CommonAttentionMetadata:
    """Sequence lengths without the tokens dropped before the stage; padding requests have none."""
    count = len(step.entries)
    common.seq_lens[:count] -= step.num_dropped(stage, common.seq_lens.device)
    bound = common.seq_lens_cpu_upper_bound
    if bound is not None:
        bound = bound.clone()
        bound[:count] -= step.num_dropped(stage, bound.device)
    return common.replace(
        seq_lens_cpu_upper_bound=bound,
        positions=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def _fewer_rows(common: CommonAttentionMetadata, rows: list[int]) -> CommonAttentionMetadata:
    """Metadata for the `rows` of each request, without requests that have none. Such a step is never padded."""
    device = common.query_start_loc.device
    present = torch.tensor([request for request, count in enumerate(rows) if count])
    here = present.to(device, non_blocking=True)
    starts = torch.tensor([0, *(count for count in rows if count)]).cumsum(0).to(common.query_start_loc_cpu.dtype)
    bound, prefilling = common.seq_lens_cpu_upper_bound, common.is_prefilling
    return common.replace(
        num_reqs=len(present),
        query_start_loc=starts.to(device, non_blocking=True),
        query_start_loc_cpu=starts,
        seq_lens=common.seq_lens[here],
        seq_lens_cpu_upper_bound=None if bound is None else bound[present],
        is_prefilling=None if prefilling is None else prefilling[present],
        req_idx=None if common.req_idx is None else common.req_idx[present.numpy()],
        block_table_tensor=common.block_table_tensor[here],
        num_actual_tokens=sum(rows),
        max_query_len=max(rows),
        slot_mapping=torch.empty(sum(rows), dtype=common.slot_mapping.dtype, device=device),
    )


def _write_decoding_slots(common: CommonAttentionMetadata, block_size: int, requests: int) -> None:
    """`_write_slots` for a step in which each of the `requests` has one row."""
    places = common.seq_lens[:requests].long() - 1
    blocks = common.block_table_tensor[:requests].gather(1, (places // block_size)[:, None])[:, 0]
    common.slot_mapping[:requests] = blocks.to(common.slot_mapping.dtype) * block_size + places % block_size


def _write_slots(common: CommonAttentionMetadata, block_size: int) -> None:
    """Write the slots of all rows in place, because the forward context or a captured graph reads this buffer.

    A request's rows are the last ones of its sequence. No value is read back from the device.
    """
    starts, lengths = common.query_start_loc.long(), common.seq_lens.long()
    total = int(common.query_start_loc_cpu[-1])
    counts = starts[1:] - starts[:-1]
    owners = torch.arange(len(counts), device=starts.device).repeat_interleave(counts, output_size=total)
    places = torch.arange(total, device=starts.device) + (lengths - starts[1:])[owners]
    blocks = common.block_table_tensor[owners, places // block_size]
    common.slot_mapping[:total] = blocks.to(common.slot_mapping.dtype) * block_size + places % block_size
