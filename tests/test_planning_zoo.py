"""Plans for models of the zoo: what a plan says that it spends is what the model's own prefill and cache spend."""

from __future__ import annotations

import pytest

from pyramiddrop import PyramidDrop
from pyramiddrop.cost import Prompt, estimate_cost
from pyramiddrop.cost.model_sizes import model_shape
from pyramiddrop.planning import Budget, Plan, plan
from test_cost_zoo import counted, held_bytes, marked, model_of
from zoo import MEMBERS, make_batch

#: Layers that share keys, windows, states, latents, heads that differ, experts of visual tokens.
NAMES = (
    "deepseek_ocr2",
    "ernie4_5_vl_moe",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4-edge",
    "kimi_k25",
    "lfm2_vl",
    "lfm3_vl",
    "muse_glimmer",
    "qwen3_5",
    "step3p7",
)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("kind", ["kv_bytes", "percent"])
@pytest.mark.parametrize("name", marked(NAMES))
def test_a_plan_spends_what_the_model_does(name: str, kind: str) -> None:
    model, member = model_of(name), MEMBERS[name]
    inputs = make_batch(member, model, [[20, "image", 30]])
    with PyramidDrop(lam=1.0, stages=2)(model) as trace:
        counted(model, inputs)
    prompt = Prompt(trace.visual_tokens[0], trace.length - trace.visual_tokens[0])
    shape = model_shape(model.config, bytes_per_value=4)
    cheapest, vanilla = (
        estimate_cost(shape, prompt, PyramidDrop(lam=lam).schedule(shape.decoder.layers)) for lam in (0.2, 1)
    )
    limit = (cheapest.kv_bytes + vanilla.kv_bytes) / 2 if kind == "kv_bytes" else 98.5
    stages = min(3, len(shape.decoder.drop_layers()) + 1)
    found = plan(shape, prompt, Budget(**{kind: limit}), stages=stages)
    with PyramidDrop(**found.arguments)(model) as trace:
        _, cache = counted(model, inputs)
    assert 0 < min(found.schedule.counts(prompt.visual_tokens)) < prompt.visual_tokens
    if kind == "kv_bytes":
        assert found.spent == sum(held_bytes(cache)) <= limit
    else:
        assert found.spent == pytest.approx(percent_spent(found, trace.cost().flops), rel=1e-9)
    assert found.cost.kv_bytes == sum(held_bytes(cache))


def percent_spent(found: Plan, decoder: int) -> float:
    """What a prefill spends whose decoder's layers and rankings take so many FLOPs."""
    full = found.vanilla.full
    return 100 * (full.total - full.decoder + decoder) / full.total
