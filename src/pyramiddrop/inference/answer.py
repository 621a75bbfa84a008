"""Generate one answer under a method, with the trace of its prefill."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pyramiddrop import Method
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class Answer:
    """What a model said, and the trace of its prefill (None without a method)."""

    text: str
    trace: Trace | None


def ask(
    checkpoint: Checkpoint,
    inputs: Mapping[str, Any],
    method: Method | None = None,
    max_new_tokens: int = 64,
    streamer: Any = None,
) -> Answer:
    """Answer greedily, so that two methods differ by nothing but the tokens that they drop.

    Args:
        inputs: of :func:`pyramiddrop.inference.prompt.build_inputs`, on any device.
        method: what drops visual tokens; None leaves the model as it is.
        streamer: a Transformers streamer that gets the tokens as they come.
    """
    with method(checkpoint.model) if method else nullcontext() as trace:
        (text,) = answer_greedily(checkpoint, inputs, max_new_tokens, streamer)
    return Answer(text, trace)


@torch.inference_mode()
def answer_greedily(
    checkpoint: Checkpoint, inputs: Mapping[str, Any], max_new_tokens: int, streamer: Any = None
) -> list[str]:
    """The answers to a batch of prompts, padded on the left, under whatever method is on the model."""
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    ready = on_model(model, inputs)
    ids = model.generate(
        **ready,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        streamer=streamer,
        pad_token_id=pad_token(model, tokenizer),
    )
    new = ids[:, ready["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def on_model(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` on the model's device, the pixels in its dtype."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in moved.items()}


def pad_token(model: Any, tokenizer: Any) -> int | None:
    """Given by name, or else `generate` prints a warning about it; answers that end before others are filled up."""
    known: list[int | None] = [model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    return next((token for token in known if token is not None), None)
