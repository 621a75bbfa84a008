"""The parts of vLLM beyond its public interface that the plugin relies on, with reasons, checked before hooking.

vLLM may change these parts in any version. To support another version, run the tests of serving on it and go through
this table, which lists everything that is overridden, wrapped or called by position.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Hook:
    """A function of vLLM.

    Attributes:
        place: its module, a colon, and its name there.
        parameters: the names of its first parameters, or of those that must exist if they are given by name.
        reason: how the plugin uses it.
    """

    place: str
    parameters: tuple[str, ...]
    reason: str


_ALLOCATE = (
    *("self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens"),
    *("num_local_computed_tokens", "num_tokens_main_model"),
)
_FIND = ("block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec", "drop_eagle_block")
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

HOOKS = (
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params"),
        "wrapped: a request that cannot be answered is refused, others are counted (requests.py)",
    ),
    Hook(f"{_SCHEDULER}.add_request", ("self", "request"), "overridden: counts what a request drops (scheduling.py)"),
    Hook(f"{_SCHEDULER}._free_blocks", ("self", "request"), "overridden: forgets a request (scheduling.py)"),
    Hook(
        f"{_SCHEDULER}._reserve_prefill_lookahead",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
        "overridden: the last word on how many tokens of a prompt a step takes (scheduling.py)",
    ),
    Hook(
        f"{_SCHEDULER}._get_local_prefix_cache_hit",
        ("self", "request"),
        "overridden: which cached blocks a prompt that drops tokens may use (scheduling.py)",
    ),
    Hook(
        f"{_MANAGER}.get_num_blocks_to_allocate", _ALLOCATE, "overridden: fewer blocks for later stages (kv_cache.py)"
    ),
    Hook(
        f"{_MANAGER}.allocate_new_blocks",
        ("self", "request_id", "num_tokens", "num_tokens_main_model"),
        "overridden: fewer blocks later on (kv_cache.py)",
    ),
    Hook(f"{_MANAGER}.cache_blocks", ("self", "request", "num_tokens"), "overridden: stage 0 alone (kv_cache.py)"),
    Hook(f"{_MANAGER}.find_longest_cache_hit", _FIND, "called for stage 0 alone (kv_cache.py)"),
    Hook(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "overridden: the metadata of a stage (attention.py)",
    ),
    Hook(
        "vllm.v1.attention.backend:subclass_attention_backend",
        ("name_prefix", "attention_backend_cls", "builder_cls"),
        "called: a backend with that builder (attention.py)",
    ),
    Hook(
        "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec",
        ("self", "vllm_config"),
        "replaced: one KV-cache group for each stage (attention.py)",
    ),
    Hook(
        "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping",
        ("self", "mapping"),
        "not called: it sets `_last_mapping`, from which the adapters of a step's tokens are read (lora.py)",
    ),
    Hook(
        "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata",
        ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size"),
        "called with the adapters of a stage's rows (lora.py)",
    ),
    *(
        Hook(
            f"vllm.model_executor.models.{model}:{layer}.forward",
            ("self", "positions", "hidden_states", "residual"),
            "called layer by layer in a step with a picture (forward.py)",
        )
        for model, layer in (
            ("llama", "LlamaDecoderLayer"),
            ("qwen2", "Qwen2DecoderLayer"),
            ("qwen3", "Qwen3DecoderLayer"),
            ("qwen3_moe", "Qwen3MoeDecoderLayer"),
        )
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        ("num_scheduled_tokens",),
        "wrapped: tells the model what each step is, in the first runner (runner.py)",
    ),
)
#: Parts of vLLM's second runner, which needs Triton to be imported.
SECOND_RUNNER = (
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.add_request",
        ("self", "req_index", "new_req_data"),
        "overridden: reads a request's prompt (model_state.py)",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.remove_request",
        ("self", "req_id"),
        "overridden: forgets a request (model_state.py)",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
        ("self", "input_batch"),
        "overridden: tells the model what each step is (model_state.py)",
    ),
)
#: Fields of vLLM's attention metadata that `attention.py` rewrites.
METADATA = (
    "query_start_loc",
    "query_start_loc_cpu",
    "seq_lens",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "block_table_tensor",
    "slot_mapping",
    "positions",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "req_idx",
)


def check_contract(hooks: tuple[Hook, ...] = HOOKS) -> None:
    """Compare the table with the installed vLLM.

    Raises:
        RuntimeError: if functions are missing or have other parameters; all of them are named.
    """
    wrong = [difference for hook in hooks if (difference := _difference(hook))]
    from vllm.v1.attention.backend import CommonAttentionMetadata

    names = {field.name for field in fields(CommonAttentionMetadata)}
    wrong += [f"CommonAttentionMetadata has no {name}" for name in METADATA if name not in names]
    if wrong:
        raise RuntimeError(f"what pyramiddrop relies on in vLLM is not as it was: {'; '.join(wrong)}")


def _difference(hook: Hook) -> str | None:
    module, _, path = hook.place.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None:
        return f"{hook.place} is not there"
    names = tuple(inspect.signature(found).parameters)
    if names[: len(hook.parameters)] != hook.parameters and not ("self" not in hook.parameters and _named(hook, names)):
        return f"{hook.place} takes ({', '.join(names)}), not ({', '.join(hook.parameters)}, ...)"
    return None


def _named(hook: Hook, names: tuple[str, ...]) -> bool:
    """True if all parameters that are given by name exist."""
    return set(hook.parameters) <= set(names)
