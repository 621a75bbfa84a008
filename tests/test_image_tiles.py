"""Which runs of visual tokens are one image's: what processors write, and what does not look like that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from pyramiddrop.hf.images import Beginnings, end_behind, one_between, tile_first, tile_lengths, whole_last

V = 0  # a visual token
FRAME, ROW1, ROW2, WHOLE, LINE, START, END, TAG = 91, 92, 93, 94, 95, 96, 97, 98

IDEFICS3 = [FRAME, ROW1, V, V, FRAME, ROW2, V, V, LINE, LINE, FRAME, WHOLE, V, V, FRAME]
IDEFICS3_WHOLE = [FRAME, WHOLE, V, V, FRAME]
GRANITE = [FRAME, ROW1, V, FRAME, ROW2, V, LINE, LINE, FRAME, WHOLE, V, FRAME]
GRANITE_WHOLE = [FRAME, ROW1, V, LINE]
AYA = [START, ROW1, V, V, V, ROW2, V, V, V, WHOLE, V, V, V, END]
AYA_WHOLE = [START, WHOLE, V, V, V, END]
LLAMA4 = [START, V, ROW1, V, ROW2, WHOLE, V, END]
LLAMA4_WHOLE = [START, WHOLE, V, END]
LFM2 = [START, ROW1, V, V, ROW2, V, V, TAG, V, END]
LFM2_WHOLE = [START, V, V, V, END]
COHERE2 = [START, V, V, LINE, V, V, LINE, END]
COHERE2_WHOLE = [START, V, V, LINE, END]
OVIS2 = [START, V, ROW1, V, ROW2, V, END]
OVIS2_WHOLE = [START, V, ROW1, END]


def lengths(rule: Beginnings, *rows: list[int]) -> Any:
    """Of a batch of these rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[7] * (width - len(row)) + row for row in rows])
    return tile_lengths(rule)(PretrainedConfig(), {"input_ids": ids}, ids == V)


@pytest.mark.parametrize(
    ("rule", "tiled", "whole"),
    [
        (whole_last, IDEFICS3, IDEFICS3_WHOLE),
        (tile_first, GRANITE, GRANITE_WHOLE),
        (end_behind, AYA, AYA_WHOLE),
        (end_behind, LLAMA4, LLAMA4_WHOLE),
        (end_behind, LFM2, LFM2_WHOLE),
        (one_between, COHERE2, COHERE2_WHOLE),
        (one_between, OVIS2, OVIS2_WHOLE),
    ],
    ids=["idefics3", "granite_docling", "aya_vision", "llama4", "lfm2_vl", "cohere2_vision", "ovis2"],
)
def test_images_are_told_apart_in_any_order_also_side_by_side(
    rule: Beginnings, tiled: list[int], whole: list[int]
) -> None:
    many, one = tiled.count(V), whole.count(V)
    assert lengths(rule, [3, *tiled, *whole, 4, *tiled, 5]) == [many, one, many]
    assert lengths(rule, [3, *whole, *tiled, *whole, 5]) == [one, many, one]
    assert lengths(rule, [3, *whole, 5, 6], [*tiled, 5, *tiled, 6], [4]) == [one, many, many]


@pytest.mark.parametrize(
    ("rule", "row"),
    [
        (whole_last, [1, 2, V, 3, 4, V, 5]),  # nothing that frames parts
        (whole_last, [FRAME, ROW1, V, FRAME, WHOLE, V, 5]),  # nothing behind the whole
        (whole_last, [FRAME, WHOLE, V, 3, FRAME, WHOLE, V, FRAME]),  # nothing behind the first whole
        (whole_last, [FRAME, ROW1, V, FRAME, WHOLE, V]),
        (tile_first, [V, 2, 3, V]),
        (tile_first, [1, 2, V, 3, 4, V, 5]),
        (end_behind, [START, V, 3, 4, 5, V, END]),  # words behind the first, and no end
        (end_behind, [START, V, END, START, V]),  # cut off
    ],
)
def test_what_no_processor_writes_is_not_guessed_at(rule: Beginnings, row: list[int]) -> None:
    assert lengths(rule, row) is None
    assert lengths(rule, [START, V, END], row) is None


def test_embeddings_tell_nothing() -> None:
    visual = torch.ones(1, 4, dtype=torch.bool)
    assert tile_lengths(one_between)(PretrainedConfig(), {"inputs_embeds": torch.ones(1, 4, 8)}, visual) is None
