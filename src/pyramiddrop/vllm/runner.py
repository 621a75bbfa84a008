"""Hook into vLLM's first model runner (for CPUs), which has no hook of its own."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from pyramiddrop.vllm.batch import Batch
from pyramiddrop.vllm.prompts import VisualPrompt, read_prompt
from pyramiddrop.vllm.rules import Rules, rules_for

_build = GPUModelRunner._build_attention_metadata


@wraps(_build)
def _described(self: GPUModelRunner, *args: Any, **options: Any) -> Any:
    batch: Batch | None = getattr(self.get_model(), "pyramiddrop_batch", None)
    if batch is not None:
        scheduled = options.get("num_scheduled_tokens")  # a dummy run, without scheduled requests
        if scheduled is None:
            batch.step = None
        else:
            _begin(self, batch, scheduled)
    return _build(self, *args, **options)


def describe_steps() -> None:
    """Make the runner describe each step to a dropping model; other models are unchanged."""
    GPUModelRunner._build_attention_metadata = _described


def _begin(runner: GPUModelRunner, batch: Batch, scheduled: dict[str, int]) -> None:
    for request in batch.waiting.keys() - runner.requests.keys():
        batch.forget(request)
    rules: Rules = runner.get_model().pyramiddrop_rules
    held = runner.input_batch
    requests = held.req_ids
    batch.begin(
        requests,
        [_prompt(runner.requests[request], rules) for request in requests],
        held.num_computed_tokens_cpu[: len(requests)],
        np.array([scheduled[request] for request in requests]),
    )


def _prompt(state: Any, rules: Rules) -> VisualPrompt | None:
    """The visual prompt of a request, read once and stored with the runner's state of the request."""
    if not hasattr(state, "pyramiddrop_prompt"):
        own = rules_for(rules, state.sampling_params)
        state.pyramiddrop_prompt = read_prompt(state.mm_features, state.num_prompt_tokens, own)
    prompt: VisualPrompt | None = state.pyramiddrop_prompt
    return prompt
