"""Generate an answer under a method, and compare it with the full model's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyramiddrop import Method
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.prefill_stats import Usage, none_if_nan, usage, vanilla_usage
from pyramiddrop.inference.prompt import on_model
from pyramiddrop.inference.timing import PrefillTime, time_prefills
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class Answer:
    """A model's answer, and the trace of its prefill (None without a method)."""

    text: str
    trace: Trace | None


def ask(
    checkpoint: Checkpoint,
    inputs: Mapping[str, Any],
    method: Method | None = None,
    max_new_tokens: int = 64,
    streamer: Any = None,
) -> Answer:
    """Answer greedily under `method` (None: the unpatched model), so that methods differ only by what they drop.

    Args:
        inputs: the result of :func:`pyramiddrop.inference.prompt.build_inputs`, on any device.
        streamer: a Transformers streamer that receives the tokens as they are generated.
    """
    with method(checkpoint.model) if method else nullcontext() as trace:
        (text,) = answer_greedily(checkpoint, inputs, max_new_tokens, streamer)
    return Answer(text, trace)


@torch.inference_mode()
def answer_greedily(
    checkpoint: Checkpoint, inputs: Mapping[str, Any], max_new_tokens: int, streamer: Any = None
) -> list[str]:
    """The answers to a batch of left-padded prompts, under the method that is applied to the model, if any."""
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


def pad_token(model: Any, tokenizer: Any) -> int | None:
    """The id that pads answers shorter than others; without it, `generate` prints a warning."""
    known = (model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), None)


@dataclass(frozen=True)
class Outcome:
    """The result of one method: its answer, and the usage and time of its prefill."""

    answer: str
    usage: Usage
    prefill: PrefillTime

    def as_dict(self) -> dict[str, Any]:
        """FLOPs, bytes and seconds as plain numbers, with text."""
        prefill = {"prefill_seconds": self.prefill.wall, "prefill_cpu_seconds": self.prefill.cpu}
        return {"answer": self.answer, **usage_dict(self.usage), **prefill}


@dataclass(frozen=True)
class Comparison:
    """The same prompt without and with a method, whose `trace` shows the kept tokens.

    Times are medians of the `runs`, or those of the fastest run if `fastest`.
    """

    vanilla: Outcome
    pruned: Outcome
    trace: Trace
    runs: int
    fastest: bool = False

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the pruned prefill as a share of vanilla's."""
        return self.pruned.usage.flops / self.vanilla.usage.flops

    @property
    def kv_ratio(self) -> float:
        """KV cache of the pruned prefill as a share of vanilla's."""
        return self.pruned.usage.kv_bytes / self.vanilla.usage.kv_bytes

    @property
    def time_ratio(self) -> float:
        """Wall time of the pruned prefill as a share of vanilla's."""
        return self.pruned.prefill.wall / self.vanilla.prefill.wall

    def as_dict(self) -> dict[str, Any]:
        """FLOPs, bytes and seconds as plain numbers, with text."""
        return {
            "vanilla": self.vanilla.as_dict(),
            "pruned": self.pruned.as_dict(),
            "flops_ratio": none_if_nan(self.flops_ratio),
            "kv_ratio": none_if_nan(self.kv_ratio),
            "prefill_ratio": self.time_ratio,
            "prefill_runs": self.runs,
        }


def compare(
    checkpoint: Checkpoint,
    inputs: Mapping[str, Any],
    method: Method,
    max_new_tokens: int = 64,
    runs: int = 5,
    fastest: bool = False,
) -> Comparison:
    """Answer `inputs` without and with `method`, and time both prefills in turn, `runs` times each.

    If `fastest`, the fastest run (for a machine shared with other programs) is reported instead of the median.
    """
    plain = ask(checkpoint, inputs, None, max_new_tokens)
    pruned = ask(checkpoint, inputs, method, max_new_tokens)
    assert pruned.trace is not None
    over = min if fastest else statistics.median
    times = time_prefills(checkpoint.model, inputs, {"vanilla": None, "pruned": method}, runs, over)
    return Comparison(
        Outcome(plain.text, vanilla_usage(checkpoint.model, inputs), times["vanilla"]),
        Outcome(pruned.text, usage(pruned.trace), times["pruned"]),
        pruned.trace,
        runs,
        fastest,
    )


def usage_dict(used: Usage) -> dict[str, Any]:
    """The usage of a prefill as plain numbers."""
    numbers = {"flops": none_if_nan(used.flops), "kv_bytes": none_if_nan(used.kv_bytes)}
    return {**asdict(used), "stages": [asdict(stage) for stage in used.stages], **numbers}
