"""The slots of a stage's rows, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

from pyramiddrop.vllm.attention import _write_decoding_slots, _write_slots

BLOCK = 4


def step(lengths: list[int], rows: list[int], padding: int = 0) -> Any:
    """As much of a step's metadata as slots are made of; `padding` requests have no rows, as in a captured graph."""
    count = len(lengths)
    starts = torch.tensor([0, *rows, *[0] * padding]).cumsum(0).int()
    blocks = torch.randperm((count + padding) * 8).view(count + padding, 8).int()
    return SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([*lengths, *[0] * padding], dtype=torch.int32),
        block_table_tensor=blocks,
        slot_mapping=torch.full((sum(rows) + padding,), -1, dtype=torch.int64),
    )


def slots_by_hand(common: Any, lengths: list[int], rows: list[int]) -> list[int]:
    """The slots of the last rows of each sequence, one by one."""
    found = []
    for request, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        for place in range(length - count, length):
            found.append(int(common.block_table_tensor[request, place // BLOCK]) * BLOCK + place % BLOCK)
    return found


def test_rows_are_the_last_of_their_sequences() -> None:
    lengths, rows = [9, 1, 30, 8], [4, 1, 7, 8]
    common = step(lengths, rows)
    _write_slots(common, BLOCK)
    assert common.slot_mapping.tolist() == slots_by_hand(common, lengths, rows)


@pytest.mark.parametrize("padding", [0, 3])
def test_decoding_has_one_row_a_request(padding: int) -> None:
    """Padded as a captured graph is: what is padded stays as it was."""
    lengths = [9, 1, 30, 8, 12]
    common = step(lengths, [1] * 5, padding)
    _write_decoding_slots(common, BLOCK, 5)
    assert common.slot_mapping.tolist() == slots_by_hand(common, lengths, [1] * 5) + [-1] * padding
    _write_slots(common, BLOCK)
    assert common.slot_mapping.tolist() == slots_by_hand(common, lengths, [1] * 5) + [-1] * padding
