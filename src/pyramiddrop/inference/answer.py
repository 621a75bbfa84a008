"""Generate an answer under a method, with its trace; and compare it with the full model's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyramiddrop import Method
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.prefill_stats import Usage, known, usage, vanilla_usage
from pyramiddrop.inference.prompt import on_model
from pyramiddrop.inference.timing import PrefillTime, time_prefills
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


def pad_token(model: Any, tokenizer: Any) -> int | None:
    """Given by name, or else `generate` prints a warning about it; answers that end before others are filled up."""
    known: list[int | None] = [model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    return next((token for token in known if token is not None), None)


@dataclass(frozen=True)
class Outcome:
    """One way to run: its answer, what its prefill used, and how long that took."""

    answer: str
    usage: Usage
    prefill: PrefillTime


@dataclass(frozen=True)
class Comparison:
    """The same prompt without and with a method. `trace` tells which tokens the method kept.

    `fastest` says that the times are those of the fastest of the `runs`, not the medians.
    """

    vanilla: Outcome
    pruned: Outcome
    trace: Trace
    runs: int
    fastest: bool = False

    @property
    def flops_ratio(self) -> float:
        """Pruned FLOPs / vanilla FLOPs."""
        return self.pruned.usage.flops / self.vanilla.usage.flops

    @property
    def kv_ratio(self) -> float:
        """KV cache of the pruned prefill, as a share of vanilla."""
        return self.pruned.usage.kv_bytes / self.vanilla.usage.kv_bytes

    @property
    def time_ratio(self) -> float:
        """Pruned wall time / vanilla wall time, of the prefill."""
        return self.pruned.prefill.wall / self.vanilla.prefill.wall

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text: FLOPs, bytes and seconds."""
        return {
            "vanilla": outcome_dict(self.vanilla),
            "pruned": outcome_dict(self.pruned),
            "flops_ratio": known(self.flops_ratio),
            "kv_ratio": known(self.kv_ratio),
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

    Args:
        fastest: whether the fastest run counts, as on a machine that others use as well, or the median.
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


def outcome_dict(outcome: Outcome) -> dict[str, Any]:
    """Plain numbers and text of one way to run."""
    prefill = {"prefill_seconds": outcome.prefill.wall, "prefill_cpu_seconds": outcome.prefill.cpu}
    return {"answer": outcome.answer, **usage_dict(outcome.usage), **prefill}


def usage_dict(used: Usage) -> dict[str, Any]:
    """Plain numbers of one prefill."""
    account = {"flops": known(used.flops), "kv_bytes": known(used.kv_bytes)}
    return {**asdict(used), "stages": [asdict(stage) for stage in used.stages], **account}
