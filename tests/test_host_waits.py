"""A prefill never waits for the device: on PyTorch's meta device, whose tensors have no values, whatever asks for one
raises, and so does whatever mixes tensors of two devices. What this passes runs ahead of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from pyramiddrop import FastV, Method, PyramidDrop, RandomDrop, UniformDrop
from pyramiddrop.hf import query_key, ranking
from pyramiddrop.hf.versions import cache_argument
from pyramiddrop.scoring import TopHeadsScorer
from pyramiddrop.selection import best
from pyramiddrop.speed.subject import shape_subject

METHODS = [
    PyramidDrop(),
    PyramidDrop(rank_layer="last"),
    PyramidDrop(positions="compact"),
    PyramidDrop(merge=True),
    PyramidDrop(reserve=0.25, random_from=3),
    *(
        PyramidDrop(score=score)
        for score in ("instruction", "rope_free", "top_heads", "debiased", "key_norm", "variation")
    ),
    FastV(),
    RandomDrop(),
    UniformDrop(),
]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a ranking layer is asked once, and waited for, is answered."""
    monkeypatch.setattr(query_key, "_agree", lambda *given: True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made: PreTrainedModel = shape_subject("tiny", torch.device("cpu"), dtype="bfloat16").model.to("meta")
    return made


def embedded(model: PreTrainedModel, batch: int, rows: int) -> Any:
    return torch.empty(batch, rows, model.config.hidden_size, dtype=model.dtype, device="meta")


def marked(*rows: tuple[int, int], length: int = 40) -> torch.Tensor:
    """(B, length) bool, where each row's visual tokens begin and end."""
    columns = torch.arange(length)
    return torch.stack([(columns >= first) & (columns < last) for first, last in rows])


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("visual", [marked((5, 35)), marked((5, 35), (8, 20))], ids=["one", "ragged"])
@pytest.mark.parametrize("method", METHODS)
def test_a_prefill_and_a_step_ask_for_no_value(
    model: PreTrainedModel, method: Method, visual: torch.Tensor, attention: str
) -> None:
    model.set_attn_implementation(attention)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), method(model, visual_mask=visual) as trace:
        output = model(inputs_embeds=embedded(model, len(visual), 40), **cache_argument(cache), logits_to_keep=1)
        assert output.logits.device.type == "meta"
        tokens = torch.empty(len(visual), 1, dtype=torch.long, device="meta")
        model(input_ids=tokens, **cache_argument(cache))
    assert trace.lengths[0] == 40 > trace.lengths[-1]
    assert [layer.keys.shape[2] for layer in cache.layers] == [length + 1 for length in trace.lengths]
    assert {layer.keys.device.type for layer in cache.layers} == {"meta"}


def test_what_asks_for_a_value_would_be_seen(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = TopHeadsScorer.__call__
    monkeypatch.setattr(
        TopHeadsScorer, "__call__", lambda self, inputs: scores(self, inputs) * inputs.num_keep.max().item()
    )
    monkeypatch.setattr(ranking, "best", lambda scores, count: best(scores * scores.max().item(), count))
    for method in (PyramidDrop(score="top_heads"), PyramidDrop()):
        with torch.no_grad(), method(model, visual_mask=marked((5, 35))), pytest.raises(RuntimeError, match="meta"):
            model(inputs_embeds=embedded(model, 1, 40))
