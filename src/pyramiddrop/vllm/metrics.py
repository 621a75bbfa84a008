"""Count what dropping saves, in the Prometheus registry that vLLM's `/metrics` shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pyramiddrop.cost import BYTES, DecoderShape, Experts, ModelShape, Prompt, estimate_cost
from pyramiddrop.methods import Method
from pyramiddrop.schedule import Schedule
from pyramiddrop.vllm.names import KEY
from pyramiddrop.vllm.prompts import read_prompt
from pyramiddrop.vllm.request_rules import rules_for
from pyramiddrop.vllm.rules import Rules

VISUAL = ("image", "video")


class Savings:
    """Counts the requests of one engine as they are admitted."""

    def __init__(self, vllm_config: Any, rules: Rules) -> None:
        self._rules = rules
        self._shape = decoder_shape(vllm_config)
        settings = vllm_config.additional_config[KEY]
        self._ranking: Callable[..., int] = Method.from_settings(settings, KEY).ranking_flops

    def count(self, request: Any) -> None:
        """Count `request`, as vLLM's frontend hands it to the engine."""
        rules = rules_for(self._rules, request.sampling_params)
        features = [feature for feature in request.mm_features or () if feature.modality in VISUAL]
        if not features:
            return
        visual = sum(feature.mm_position.get_num_embeds() for feature in features)
        asked = "server" if rules is self._rules else "request"
        counters = _counters()
        counters["requests"].labels(asked=asked, keep=",".join(f"{keep:g}" for keep in rules.schedule.keep)).inc()
        counters["visual_tokens"].inc(visual)
        length = len(request.prompt_token_ids)
        prompt = read_prompt(features, length, rules)
        if prompt is None:
            return
        counters["visual_tokens_dropped"].inc(prompt.dropped[-1])
        flops, kv_bytes = self._saved(rules.schedule, visual, length - visual)
        counters["prefill_flops_saved"].inc(flops)
        counters["kv_cache_bytes_saved"].inc(kv_bytes)

    def _saved(self, schedule: Schedule, visual: int, text: int) -> tuple[int, int]:
        """FLOPs of the prefill, ranking counted, and bytes of the KV cache that dropping saves of one prompt."""
        shape, prompt = ModelShape(self._shape), Prompt(visual, text)
        before, after = estimate_cost(shape, prompt), estimate_cost(shape, prompt, schedule, self._ranking)
        return before.full.total - after.full.total, before.kv_bytes - after.kv_bytes


def decoder_shape(vllm_config: Any) -> DecoderShape:
    """The sizes of the text model that an engine serves."""
    model = vllm_config.model_config
    text = model.hf_text_config
    count = getattr(text, "num_experts", 0)
    experts = Experts(count, text.num_experts_per_tok, text.moe_intermediate_size) if count else None
    fp8 = str(vllm_config.cache_config.cache_dtype).startswith("fp8")
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=model.get_head_size(),
        bytes_per_value=BYTES["float8"] if fp8 else model.dtype.itemsize,
        vocabulary=text.vocab_size,
        experts=experts,
    )


@cache
def _counters() -> dict[str, Any]:
    """Made with the first request: before, vLLM may still choose the registry's directory."""
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
