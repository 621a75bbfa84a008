"""Which calls hold packed rows: read off bounds, masks and positions, on rows short enough to count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyramiddrop.hf.rows import Bounds, Unpacked, find_documents


def found(*rows: list[int], valid: list[list[int]] | None = None, **call: Any) -> list[list[int]] | None:
    """The documents that these position ids tell of."""
    positions = torch.tensor(rows)
    given = None if valid is None else torch.tensor(valid).bool()
    documents = find_documents({"position_ids": positions} | call, tuple(positions.shape), given, past=0)
    return None if documents is None else documents.tolist()


def test_positions_that_start_again_begin_a_document() -> None:
    assert found([0, 1, 2, 0, 1]) == [[0, 0, 0, 1, 1]]
    assert found([0, 1, 2, 3, 4], [0, 1, 0, 0, 1]) == [[0, 0, 0, 0, 0], [0, 0, 1, 2, 2]]
    assert found([2, 3, 2, 3, 2]) == [[0, 0, 1, 1, 2]]  # RoBERTa's kin count from 2
    assert found([5, 6, 7, 0, 1]) == [[0, 0, 0, 1, 1]]  # the end of a document that was cut


@pytest.mark.parametrize(
    "positions",
    [
        [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 5],
        [0, 1, 4, 5, 9],  # gaps: another library has dropped tokens
        [0, 1, 1, 1, 2],  # an image that shares a position
        [7, 8, 9, 10, 11],
    ],
)
def test_other_positions_do_not(positions: list[int]) -> None:
    assert found(positions) is None


def test_padding_begins_no_document() -> None:
    assert found([1, 1, 0, 1, 2], valid=[[0, 0, 1, 1, 1]]) is None
    assert found([0, 0, 0, 1, 2], valid=[[0, 0, 1, 1, 1]]) is None
    assert found([0, 1, 2, 0, 0], valid=[[1, 1, 1, 0, 0]]) is None
    assert found([0, 1, 1, 0, 1], valid=[[1, 1, 0, 1, 1]]) == [[0, 0, 0, 1, 1]]


def test_positions_of_several_axes() -> None:
    """The text's stand first, of four; of three the first is time, which stays while an image lasts."""
    text, time = torch.tensor([[0, 1, 2, 0, 0, 1]]), torch.tensor([[0, 0, 0, 0, 1, 2]])
    others = torch.zeros(2, 1, 6, dtype=torch.long)
    assert find_documents({"position_ids": torch.stack([text, time, *others])}, (1, 6), None, 0).tolist() == [
        [0, 0, 0, 1, 2, 2]
    ]
    assert find_documents({"position_ids": torch.stack([time, *others])}, (1, 6), None, 0) is None
    assert find_documents({"position_ids": torch.stack([text, *others])}, (1, 6), None, 0).tolist() == [
        [0, 0, 0, 1, 1, 1]
    ]


def test_bounds_and_masks_say_more_than_positions() -> None:
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert found([0, 1, 2, 3, 4], cu_seq_lens_q=bounds) == [[0, 0, 1, 1, 1]]
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    assert found([0, 1, 0, 1, 2], attention_mask=causal) is None
    split = causal.clone()
    split[..., 2:, :2] = False
    assert found([0, 1, 2, 3, 4], attention_mask=split) == [[0, 0, 1, 1, 1]]
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~split, torch.finfo(torch.float32).min)
    assert found([0, 1, 2, 3, 4], attention_mask={"full_attention": additive}) == [[0, 0, 1, 1, 1]]
    with pytest.raises(ValueError, match="ends at 5, and this call has 1 x 6 tokens"):
        found([0, 1, 2, 3, 4, 5], cu_seq_lens_q=bounds)


def test_documents_become_rows_and_go_back() -> None:
    numbers = torch.tensor([[3, 0, 0, 1], [2, 2, 2, 3]])
    unpacked = Unpacked(numbers, count=3, width=3)
    tokens = torch.tensor([[9, 1, 2, 3], [4, 5, 6, 9]])
    taken: list[list[Any]] = unpacked.take(tokens).masked_fill(~unpacked.valid, 0).tolist()
    assert taken == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    back: Tensor = unpacked.put(unpacked.take(tokens))
    assert back.tolist() == [[0, 1, 2, 3], [4, 5, 6, 0]]


def test_bounds_are_what_flash_kernels_take() -> None:
    bounds = Bounds.of(torch.tensor([3, 1, 4]))
    assert (bounds.cumulative.tolist(), bounds.cumulative.dtype, bounds.longest) == ([0, 3, 4, 8], torch.int32, 4)
