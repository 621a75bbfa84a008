"""Refuse bad requests before they reach the engine, so that they do not end the server, and count the others."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from pyramiddrop.vllm.metrics import Savings
from pyramiddrop.vllm.names import KEY, PREFIX
from pyramiddrop.vllm.prompts import read_prompt, visual_by_stage
from pyramiddrop.vllm.response_headers import note_served
from pyramiddrop.vllm.rules import Rules, rules_for, rules_of

_process = InputProcessor.process_inputs


@wraps(_process)
def _guarded(self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any) -> Any:
    if not self.model_config.architecture.startswith(PREFIX):
        return _process(self, request_id, prompt, params, *args, **options)
    if not hasattr(self, "pyramiddrop_rules"):
        self.pyramiddrop_rules = rules_of(self.vllm_config)
        self.pyramiddrop_savings = Savings(self.vllm_config, self.pyramiddrop_rules)
    rules = _check(params, bool(options.get("resumable")), self.pyramiddrop_rules)
    request = _process(self, request_id, prompt, params, *args, **options)
    _check_pictures(request, self.vllm_config.scheduler_config, rules)
    length = len(request.prompt_token_ids)
    visual = visual_by_stage(request.mm_features, length, rules)
    if visual[0]:
        self.pyramiddrop_savings.count(rules, visual, length)
        note_served(rules.schedule.keep, visual)
    return request


def guard_requests() -> None:
    """Make vLLM's input processor refuse requests that a dropping engine cannot answer; other engines are unchanged."""
    InputProcessor.process_inputs = _guarded


def _check(params: Any, resumable: bool, rules: Rules) -> Rules:
    """Check the request and return its rules."""
    if getattr(params, "prompt_logprobs", None) is not None:
        raise VLLMValidationError(
            "prompt_logprobs (and echo with logprobs) cannot be given while visual tokens are dropped: what is dropped "
            "has no logits",
            parameter="prompt_logprobs",
        )
    if resumable:
        raise VLLMValidationError(
            "streaming input is not supported while visual tokens are dropped: what a prompt keeps is decided by the "
            "whole prompt"
        )
    try:
        return rules_for(rules, params)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{KEY}") from None


def _check_pictures(request: Any, scheduler: Any, rules: Rules) -> None:
    """Refuse pictures that cannot be scheduled: an uncut picture needs a budget of one token more than it has."""
    if not scheduler.disable_chunked_mm_input or not request.mm_features:
        return
    longest = max(feature.mm_position.length for feature in request.mm_features)
    if longest < scheduler.max_num_batched_tokens or not read_prompt(request.mm_features, 0, rules):
        return
    raise VLLMValidationError(
        f"a picture of {longest} tokens cannot be computed in one step of {scheduler.max_num_batched_tokens}: with "
        f"--disable-chunked-mm-input, start the server with --max-num-batched-tokens {longest + 1} or more"
    )
