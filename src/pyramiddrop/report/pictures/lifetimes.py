"""Read from a trace which visual tokens are present in which layers, and their places in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyramiddrop.report.token_layout.geometry import Cell, View, cells_by_view, unplaced_by_name
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class StageTokens:
    """The layers from `first` to `last` (0-based, both included) and their visual tokens.

    Attributes:
        tokens: number of visual tokens, including those without a place in the picture.
        cells: for each view of the picture, the places of these tokens.
        unplaced: number of tokens without a place in the picture, by name.
    """

    first: int
    last: int
    tokens: int
    cells: list[frozenset[Cell]]
    unplaced: Mapping[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> str:
        """The layers as text."""
        if self.last < self.first:
            return "before the decoder"
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"


def token_status(layers: Sequence[StageTokens], number: int, view: View) -> list[int]:
    """For each cell of `view` (view number `number`), row by row, the last of the stages in which it is present."""
    return [sum(cell in stage.cells[number] for stage in layers) - 1 for cell in view.grid]


def visual_columns(trace: Trace, sample: int) -> Tensor:
    """The columns of the visual tokens of a sample; ValueError if the trace is empty."""
    if not trace.visual_columns:
        raise ValueError("the trace is empty: run the patched model first")
    return trace.visual_columns[sample]


def stage_tokens(trace: Trace, views: Sequence[View], sample: int = 0) -> list[StageTokens]:
    """The stages between the drops of `trace`: the first has every token, the last the fewest."""
    columns = visual_columns(trace, sample)
    expected = sum(view.tokens for view in views)
    if len(columns) != expected:
        raise ValueError(f"the views have {expected} visual tokens; the trace has {len(columns)}")
    alive = [columns, *(stage.kept[sample] for stage in trace.stages)]
    starts = [0, *(stage.layer for stage in trace.stages)]
    ends = [*(start - 1 for start in starts[1:]), len(trace.lengths) - 1]
    indices = [torch.searchsorted(columns, kept).tolist() for kept in alive]
    return [
        StageTokens(first, last, len(kept), cells_by_view(views, kept), unplaced_by_name(views, kept))
        for first, last, kept in zip(starts, ends, indices, strict=True)
    ]
