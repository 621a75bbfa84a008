"""Dropping before the decoder and inside it, on families whose positions have several axes or whose features come in
behind a layer: against the masked oracle, in which every second token is gone before the first layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.23")

from checks import CLOSE, generated
from conformance.against import same_kept
from conformance.subject import subject_of
from masked_oracle import Oracle, attached
from pyramiddrop import PyramidDrop, VisionDrop
from reference import Rule, num_keep
from zoo import MEMBERS

METHOD = VisionDrop(keep=0.5, score="uniform") | PyramidDrop(layers=[2, 4], keep=[0.5, 0.25])
RULE = Rule([0, 2, 4], [0.5, 0.25, 0.125])
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"]


class UniformFirst(Oracle):
    """The masked oracle, whose first drop keeps evenly spaced tokens and asks no layer."""

    stage = 0

    def attention(self, stage: int, layer: Any, hidden: Tensor, call: Any) -> Tensor:
        if stage > 1:
            return super().attention(stage, layer, hidden, call)
        return torch.zeros(len(hidden), 1, hidden.shape[1], hidden.shape[1])

    def drop(self, stage: int, attention: Tensor) -> None:
        self.stage = stage
        super().drop(stage, attention)

    def choose_from(self, group: list[int], alive: Tensor, scores: Tensor, keep: float, sample: int) -> None:
        if self.stage > 1:
            super().choose_from(group, alive, scores, keep, sample)
            return
        count = num_keep(len(group), keep)
        alive[group] = False
        alive[[c for n, c in enumerate(group) if (n + 1) * count // len(group) > n * count // len(group)]] = True


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in MEMBERS])
@torch.no_grad()
def test_forward_and_generation(name: str) -> None:
    subject = subject_of(MEMBERS[name])
    model = subject.model
    for specs in ([[5, "image", 7]], subject.mixed):
        batch = subject.batch(specs)
        with attached(model, UniformFirst(RULE, batch.prompt)) as oracle:
            expected = model(**batch.inputs, use_cache=False).logits
        with METHOD(model) as trace:
            logits = model(**batch.inputs).logits
        same_kept(trace, oracle.kept)
        alive = oracle.survives & batch.valid
        torch.testing.assert_close(logits[alive], expected[alive], **CLOSE)
        with attached(model, UniformFirst(RULE, batch.prompt)):
            wanted = generated(model, batch.inputs, 4)
        with METHOD(model):
            output = generated(model, batch.inputs, 4)
        assert output.sequences.tolist() == wanted.sequences.tolist()
        for ours, theirs in zip(output.logits, wanted.logits, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
