"""Count the savings of dropping in the Prometheus registry that vLLM's `/metrics` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from pyramiddrop.cost import DecoderShape, Experts, ModelShape, Prompt, estimate_cost
from pyramiddrop.methods import Method
from pyramiddrop.schedule import Schedule
from pyramiddrop.vllm.names import KEY
from pyramiddrop.vllm.rules import Rules


class Savings:
    """Counts the requests of one engine as they are admitted."""

    def __init__(self, vllm_config: Any, rules: Rules) -> None:
        """Count with the `rules` of the engine."""
        self._rules = rules
        self._shape = decoder_shape(vllm_config)
        settings = vllm_config.additional_config[KEY]
        self._ranking: Callable[..., int] = Method.from_settings(settings, KEY).ranking_flops

    def count(self, rules: Rules, visual: Sequence[int], length: int) -> None:
        """Count one prompt with pictures or videos.

        Args:
            rules: the rules of the request.
            visual: number of visual tokens in each stage, including stage 0.
            length: number of tokens of the prompt.
        """
        counters = _counters()
        counters["requests"].labels(**self._labels(rules)).inc()
        counters["visual_tokens"].inc(visual[0])
        if visual[-1] == visual[0]:
            return
        counters["visual_tokens_dropped"].inc(visual[0] - visual[-1])
        flops, kv_bytes = self._saved(rules.schedule, visual[0], length - visual[0])
        counters["prefill_flops_saved"].inc(flops)
        counters["kv_cache_bytes_saved"].inc(kv_bytes)

    def _labels(self, rules: Rules) -> dict[str, str]:
        """The labels, with rounded ratios, because each combination is a time series of its own."""
        keep = rules.schedule.keep
        if rules is self._rules:
            return {"asked": "server", "keep": ",".join(f"{ratio:g}" for ratio in keep)}
        return {"asked": "request", "keep": ",".join(f"{round(ratio * 20) / 20:g}" for ratio in keep)}

    def _saved(self, schedule: Schedule, visual: int, text: int) -> tuple[int, int]:
        """FLOPs of the prefill (ranking included) and bytes of the KV cache that dropping saves for one prompt."""
        shape, prompt = ModelShape(self._shape), Prompt(visual, text)
        before, after = estimate_cost(shape, prompt), estimate_cost(shape, prompt, schedule, self._ranking)
        return before.full.total - after.full.total, before.kv_bytes - after.kv_bytes


def decoder_shape(vllm_config: Any) -> DecoderShape:
    """The sizes of the text model that an engine serves."""
    model = vllm_config.model_config
    text = model.hf_text_config
    count = getattr(text, "num_experts", 0)
    experts = Experts(count, text.num_experts_per_tok, text.moe_intermediate_size) if count else None
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=model.get_head_size(),
        bytes_per_value=model.dtype.itemsize,
        vocabulary=text.vocab_size,
        experts=experts,
    )


@cache
def _counters() -> dict[str, Any]:
    """The counters, created at the first request, because vLLM chooses the registry's directory before it."""
    from prometheus_client import Counter

    return {
        "requests": Counter(
            f"{KEY}:requests",
            "Requests with pictures or videos, by who chose the keep ratios (server or request), and by these.",
            ["asked", "keep"],
        ),
        "visual_tokens": Counter(f"{KEY}:visual_tokens", "Visual tokens of the requests."),
        "visual_tokens_dropped": Counter(
            f"{KEY}:visual_tokens_dropped", "Visual tokens of which the last stage holds nothing."
        ),
        "prefill_flops_saved": Counter(
            f"{KEY}:prefill_flops_saved", "FLOPs of the language model's prefill that were saved, by the cost model."
        ),
        "kv_cache_bytes_saved": Counter(f"{KEY}:kv_cache_bytes_saved", "Bytes of the KV cache that were saved."),
    }
