"""Refuse parameters of a single request before they reach the engine: a bad request must not end the server."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from pyramiddrop.vllm.names import PREFIX

_process = InputProcessor.process_inputs


@wraps(_process)
def _guarded(self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any) -> Any:
    if self.model_config.architecture.startswith(PREFIX):
        _check(params, bool(options.get("resumable")))
    return _process(self, request_id, prompt, params, *args, **options)


def guard_requests() -> None:
    """Let vLLM's input processor refuse what an engine that drops cannot answer; other engines are not touched."""
    InputProcessor.process_inputs = _guarded


def _check(params: Any, resumable: bool) -> None:
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
