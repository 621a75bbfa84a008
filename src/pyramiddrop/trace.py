"""The trace of a prefill: which tokens each drop kept, and the saved FLOPs and KV cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from pyramiddrop.cost import Cost, DecoderShape, kv_bytes, prefill_flops

if TYPE_CHECKING:
    from torch import Tensor


class Ranked(NamedTuple):
    """The (B, N) rows that a drop ranked, which of them are visual tokens (None: all), and their scores."""

    rows: Tensor
    visual: Tensor | None
    scores: Tensor


@dataclass
class StageTrace:
    """One drop. Its properties are computed when they are read, so that recording costs the prefill nothing."""

    layer: int
    keep: float
    _rows: Tensor
    _visual: Tensor | None
    _offset: int
    _columns: Sequence[Tensor] = ()
    _ranked: Ranked | None = None

    @property
    def kept(self) -> list[Tensor]:
        """The sorted original columns of the kept visual tokens: for each sample a LongTensor on the CPU."""
        rows, visual = self._rows.cpu(), _marked(self._rows, self._visual)
        return [(row[mask].sort().values + self._offset) for row, mask in zip(rows, visual, strict=True)]

    @property
    def scores(self) -> list[Tensor] | None:
        """The score of each visual token, in the order of `visual_columns`: for each sample float32 on the CPU.

        NaN at tokens that an earlier drop removed. None if this drop did not rank, because it drops nothing or
        everything.
        """
        if self._ranked is None:
            return None
        import torch

        rows, scores = self._ranked.rows.cpu(), self._ranked.scores.cpu()
        visual, found = _marked(rows, self._ranked.visual), []
        for row, mask, values, columns in zip(rows, visual, scores.float(), self._columns, strict=True):
            places = torch.searchsorted(columns, row[mask] + self._offset)
            found.append(values.new_full((len(columns),), float("nan")).index_put((places,), values[mask]))
        return found


def _marked(rows: Tensor, visual: Tensor | None) -> Tensor:
    """(B, N) bool on the CPU, which `rows` are visual tokens."""
    return rows.cpu() >= 0 if visual is None else visual.cpu()


@dataclass(repr=False)
class Trace:
    """The last prefill of a patched model; empty before the first. A `generate` call has one prefill.

    Each prefill records into a trace of its own, which is copied here when complete, so that threads that share a model
    do not mix.

    Attributes:
        stages: one entry a drop, shallow to deep.
        visual_columns: for each sample the original columns of all its visual tokens: the k-th visual token of the
            picture is at column `visual_columns[b][k]`.
        length: the padded length of the batch before any drop.
        lengths: the padded length of the batch in each layer, which is also the number of rows that the layer adds to
            its KV cache.
    """

    stages: list[StageTrace] = field(default_factory=list)
    visual_columns: list[Tensor] = field(default_factory=list)
    length: int = 0
    lengths: list[int] = field(default_factory=list)
    _shape: DecoderShape | None = None
    _ranking_cost: int = 0

    @property
    def visual_tokens(self) -> list[int]:
        """The number of visual tokens of each sample, before any drop."""
        return [len(columns) for columns in self.visual_columns]

    @property
    def has_sizes(self) -> bool:
        """True if `cost` knows the sizes of the model of the last prefill."""
        return self._shape is not None

    def show(self, finished: Trace) -> None:
        """Take over the content of `finished`; called by the adapter after the last drop of a prefill.

        It is a single assignment, so that no reader in another thread sees half of it.
        """
        self.__dict__ = finished.__dict__

    def record(
        self, layer: int, keep: float, rows: Tensor, visual: Tensor | None, offset: int, ranked: Ranked | None = None
    ) -> None:
        """Add a drop; called by the adapter.

        Args:
            rows: (B, N) long, the kept rows.
            visual: (B, N) bool, which of them are visual tokens; None: all.
            offset: the column of row 0.
        """
        self.stages.append(StageTrace(layer, keep, rows, visual, offset, self.visual_columns, ranked))

    def cost(self) -> Cost:
        """The cost of this prefill, over all samples, beside the same prefill without dropping.

        Raises:
            RuntimeError: before the first prefill, and for a text model that the cost model does not know.
        """
        trace = copy.copy(self)  # of one prefill, even if another one is shown meanwhile
        if not trace.lengths:
            raise RuntimeError("nothing to cost yet: the trace is filled by the first prefill of the patched model")
        if trace._shape is None:
            raise RuntimeError("the cost model does not know this model's text model")
        shape, batch, depth = trace._shape, len(trace.visual_columns), len(trace.lengths)
        vanilla = [trace.length] * depth
        counts = [trace.visual_tokens, *([len(kept) for kept in stage.kept] for stage in trace.stages)]
        stages = [sum(stage.layer <= layer for stage in trace.stages) for layer in range(depth)]
        visual = [[counts[stage][sample] for stage in stages] for sample in range(batch)]  # of each sample, by layer
        flops = sum(prefill_flops(shape, trace.lengths, visual=own) for own in visual)
        return Cost(
            flops=flops + batch * trace._ranking_cost,
            vanilla_flops=sum(prefill_flops(shape, vanilla, visual=[own] * depth) for own in trace.visual_tokens),
            kv_bytes=batch * kv_bytes(shape, trace.lengths),
            vanilla_kv_bytes=batch * kv_bytes(shape, vanilla),
        )

    def __repr__(self) -> str:
        """One line: the visual tokens after each drop, over all samples, and the share of vanilla's FLOPs."""
        trace = copy.copy(self)
        if not trace.lengths:
            return "Trace(no prefill yet)"
        counts = [sum(trace.visual_tokens), *(sum(map(len, stage.kept)) for stage in trace.stages)]
        batch = len(trace.visual_columns)
        parts = [f"{batch} samples"] if batch > 1 else []
        parts.append(" -> ".join(map(str, counts)) + " visual tokens")
        if trace.has_sizes:
            parts.append(f"{100 * trace.cost().flops_ratio:.0f} % of FLOPs")
        return f"Trace({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """A table for notebooks: one row a drop."""
        trace = copy.copy(self)
        rows = [("", 1.0, *trace.visual_tokens)]
        rows += [(stage.layer, stage.keep, *map(len, stage.kept)) for stage in trace.stages]
        heads = ("before layer", "keep", *(f"sample {sample}" for sample in range(len(trace.visual_columns))))
        body = [_html_row("th", heads), *(_html_row("td", row) for row in rows)] if trace.lengths else []
        return f"<table><caption>{escape(repr(trace))}</caption>{''.join(body)}</table>"


def _html_row(tag: str, cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
