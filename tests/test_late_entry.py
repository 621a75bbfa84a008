"""The benchmark of late entry: visual rows that enter late are those that are masked and left as they are till then."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.tasks import digits_task
from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.prompt import build_inputs, on_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import late_entry  # noqa: E402
from speed_document import filled  # noqa: E402


@pytest.fixture(scope="module")
def digits() -> Checkpoint:
    return load_checkpoint(digits_checkpoint(), "cpu")


@pytest.fixture(scope="module")
def inputs(digits: Checkpoint) -> Any:
    [sample] = digits_task(limit=1).samples
    return on_model(digits.model, build_inputs(digits.processor, list(sample.images), sample.question))


@torch.inference_mode()
def masked(model: Any, embeds: torch.Tensor, entry: int, visual: torch.Tensor) -> torch.Tensor:
    """At full length: layers before `entry` mask visual columns for text, and leave visual rows as they are."""
    info, length = inspect_model(model), embeds.shape[1]
    causal = torch.full((length, length), float("-inf")).triu(1)
    hidden, positions = embeds, info.text.rotary_emb(embeds, torch.arange(length)[None])
    for index, layer in enumerate(info.layers):
        mask = causal.clone()
        if index < entry:
            mask[~visual.unsqueeze(1) & visual] = float("-inf")
        after = layer(hidden, attention_mask=mask[None, None], position_embeddings=positions)
        after = after[0] if isinstance(after, tuple) else after
        hidden = torch.where(visual[None, :, None], hidden, after) if index < entry else after
    return model.get_output_embeddings()(info.text.norm(hidden)[:, -1])


@pytest.mark.parametrize("entry", [0, 1, 3])
def test_late_rows_are_masked_rows(digits: Checkpoint, inputs: Any, entry: int) -> None:
    embeds, visual = late_entry.embedded(digits.model, inputs)
    assert 0 < visual.sum() < len(visual)
    found = late_entry.next_logits(digits.model, embeds, entry, visual)
    torch.testing.assert_close(found, masked(digits.model, embeds, entry, visual), rtol=1e-4, atol=1e-4)
    whole = late_entry.next_logits(digits.model, embeds, 0, visual)
    assert torch.allclose(found, whole, atol=1e-3) == (entry == 0)


def test_tokens_that_enter_at_once_are_answered_as_ever(digits: Checkpoint, inputs: Any) -> None:
    embeds, visual = late_entry.embedded(digits.model, inputs)
    assert late_entry.answer(digits, embeds, visual, 0) == answer_greedily(digits, inputs, 8)[0]


def test_the_page_shows_what_was_measured() -> None:
    text = late_entry.DOCUMENT.read_text("utf-8")
    assert "| digits, 8 layers | 160 |" in text
    assert filled(text, late_entry.table) == text
