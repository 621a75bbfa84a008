"""Refuse features of vLLM that a dropping engine does not support, at start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from pyramiddrop.vllm.names import KEY, LOGGER
from pyramiddrop.vllm.rules import configure, rules_of

logger = logging.getLogger(LOGGER)

SCHEDULER = "pyramiddrop.vllm.scheduling.staged_scheduler"
# With a smaller budget, a prompt cannot be split without leaving a single token over; see scheduling.py.
LEAST_BUDGET = 4


class StagedConfig(VerifyAndUpdateConfig):
    """vLLM's hook for the configuration of an architecture, called before an engine is built."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Configure the method, and refuse unsupported features.

        Raises:
            ValueError: if the settings are not a method, or a feature of vLLM is not supported.
        """
        configure(vllm_config)
        refuse_unsupported(vllm_config)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        rules = rules_of(vllm_config)
        logger.info(
            "pyramiddrop: %s drops visual tokens before layers %s and keeps %s of them",
            vllm_config.additional_config[KEY]["method"],
            ", ".join(map(str, rules.schedule.layers)),
            ", ".join(f"{keep:.4g}" for keep in rules.schedule.keep),
        )


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise ValueError for features of vLLM that would give wrong answers with dropping."""
    refused = list(unsupported(vllm_config))
    if refused:
        raise ValueError(f"pyramiddrop cannot be served with {'; nor with '.join(refused)}")


def unsupported(vllm_config: Any) -> Iterator[str]:
    """The requested features that are not supported, with reasons."""
    yield from _unsupported_features(vllm_config)
    yield from _unsupported_parallelism(vllm_config.parallel_config)
    yield from _unsupported_scheduling(vllm_config)


def _unsupported_features(vllm_config: Any) -> Iterator[str]:
    if vllm_config.speculative_config is not None:
        yield "speculative decoding (a draft is not made of what the stages hold)"
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        yield "--enable-tower-connector-lora (it has not been tried)"
    if lora is not None and vllm_config.parallel_config.is_moe_model is not False:
        yield "LoRA of a mixture of experts (it has not been tried)"
    # vLLM turns --kv-offloading-size into a connector only after this check.
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None:
        yield "KV connectors or KV offloading (they move blocks by the length of the prompt)"
    events = vllm_config.kv_events_config
    if events is not None and events.enable_kv_cache_events:
        yield "KV events (they tell blocks by the length of the prompt)"
    if vllm_config.ec_transfer_config is not None:
        yield "encoder disaggregation (it has not been tried)"
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        yield "offloading of weights (tokens are ranked by projections outside of their layer's forward)"
    if vllm_config.model_config.enable_prompt_embeds:
        yield "--enable-prompt-embeds (nothing says which embeddings are visual)"
    if is_quantized_kv_cache(vllm_config.cache_config.cache_dtype):
        yield (
            f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype} (no machine of the tests computes it: vLLM's "
            "attention on a CPU wants AVX-512 for it)"
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill (it picks rows of the whole prompt in later layers)"
    window = vllm_config.model_config.get_sliding_window()
    if window is not None and getattr(vllm_config.model_config.hf_text_config, "use_sliding_window", True):
        yield f"a sliding window of {window} tokens (it is counted in the rows that a stage holds)"
    if vllm_config.model_config.runner_type != "generate":
        yield f"--runner {vllm_config.model_config.runner_type} (it reads rows that are dropped)"
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None and multimodal.is_multimodal_pruning_enabled():
        yield "--video-pruning-rate (tokens would be dropped twice, by two counts)"


def _unsupported_parallelism(parallel: Any) -> Iterator[str]:
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism (a stage's rows do not cross from rank to rank)"
    if parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        yield "data parallelism of a mixture of experts (its ranks step together; run one server for each replica)"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism (it deals out slots by the length of the prompt)"
    if parallel.use_ubatching:
        yield "microbatches (--enable-dbo, --ubatch-size)"


def _unsupported_scheduling(vllm_config: Any) -> Iterator[str]:
    scheduler = vllm_config.scheduler_config
    if scheduler.disable_hybrid_kv_cache_manager:
        yield "--disable-hybrid-kv-cache-manager (each stage has a KV group of its own)"
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        yield f"--scheduler-cls {scheduler.scheduler_cls}"
    if scheduler.max_num_batched_tokens < LEAST_BUDGET:
        yield f"--max-num-batched-tokens below {LEAST_BUDGET}"
    if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL:
        yield "cudagraph_mode FULL (a step with a picture runs in Python; use FULL_AND_PIECEWISE or FULL_DECODE_ONLY)"
