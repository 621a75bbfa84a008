"""The forward of a step with a visual prompt: layer by layer, with a gather at each drop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from pyramiddrop.vllm.batch import Batch, Step
from pyramiddrop.vllm.lora import RowAdapters
from pyramiddrop.vllm.prefix_rows import Rows
from pyramiddrop.vllm.ranking import TokenSelector
from pyramiddrop.vllm.rules import Rules


class _VisualPrefill:
    """One visual prompt of which the step computes a part.

    A part that is not the last one runs through stage 0 only and stores its rows, which the last part continues.

    Attributes:
        adapter: the LoRA adapter of each of its rows, once; empty without LoRA.
    """

    def __init__(
        self, row: int, step: Step, rules: Rules, batch: Batch, adapters: RowAdapters, start: int, device: torch.device
    ) -> None:
        """Begin with the request at index `row` of the `step`, whose rows begin at `start`."""
        entry = step.entries[row]
        assert entry.prompt is not None
        self._entry, self._block, self._batch = entry, step.block, batch
        self._table = None if step.table is None else step.table[row]
        self._earlier = batch.waiting.pop(entry.request, None)
        if entry.computed and self._earlier is None:
            self._earlier = self._from_prefix_cache()
        self._selector: TokenSelector | None = None
        if entry.finishes:
            self._selector = TokenSelector(entry.prompt, entry.computed + entry.scheduled, rules, device)
        self._adapters, self.adapter = adapters, adapters.of(start, start + 1)
        self._ranking: Tensor | None = None
        self._scores: Tensor | None = None

    def _from_prefix_cache(self) -> Rows:
        if self._batch.prefix is None or self._table is None:
            raise RuntimeError(
                f"pyramiddrop: rows of the {self._entry.computed} earlier tokens of {self._entry.request} are missing"
            )
        return self._batch.prefix.read(self._table, self._block, self._entry.computed)

    @property
    def finishes(self) -> bool:
        """True if this part is the prompt's last one."""
        return self._selector is not None

    def rank_ahead(self, stage: int, layer: Any, hidden: Tensor, positions: Tensor) -> None:
        """Score with `layer`, the last one before `stage`, on its input (n, D)."""
        if stage == 1:
            self._ranking = hidden  # stored with the rows of this part
            if self._earlier is not None:
                assert self._earlier.ranking is not None
                hidden = torch.cat([self._earlier.ranking, hidden])
                positions = torch.cat([self._earlier.positions, positions], -1)
        if self._selector is not None and self._selector.ranks(stage):
            self._scores = self._score(self._selector, stage, layer, hidden, positions)

    def drop(self, stage: int, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (n, D) and positions (..., n) of `stage`, before its first `layer`."""
        selector = self._selector
        if stage == 1:
            rows = self._rows_so_far(hidden, positions)
            hidden, positions = rows.hidden, rows.positions
        if selector is None:
            return hidden[:0], positions[..., :0]
        if not selector.drops(stage):
            return hidden, positions
        scores, self._scores = self._scores, None
        if scores is None and selector.ranks(stage):
            scores = self._score(selector, stage, layer, hidden, positions)
        stays = selector.choose(stage, scores)
        return hidden[stays], positions[..., stays]

    def _score(self, selector: TokenSelector, stage: int, layer: Any, hidden: Tensor, positions: Tensor) -> Tensor:
        with self._adapters.rows(layer, self.adapter * (selector.asking + 1)):  # the rows that are projected
            return selector.scores(stage, layer, hidden, positions)

    def _rows_so_far(self, hidden: Tensor, positions: Tensor) -> Rows:
        """All rows of the prompt up to the end of this part, at the first drop; they are stored for later parts."""
        entry, prompt = self._entry, self._entry.prompt
        assert prompt is not None
        rows = Rows(hidden, positions, self._ranking)
        if self._earlier is not None:
            rows = self._earlier.then(rows)
        if self._batch.prefix is not None and self._table is not None:
            end = min(entry.computed + entry.scheduled, prompt.length)
            self._batch.prefix.record(self._table, self._block, entry.computed, end, rows)
        if not self.finishes:
            # Copies, because these may be views of the batch or of buffers that the next step overwrites.
            self._batch.waiting[entry.request] = rows.copied()
        self._earlier = self._ranking = None
        return rows


class StagedForward:
    """The forward of one step's rows through the layers.

    The step is divided into spans: each visual prefill, and all requests between two of them.
    """

    def __init__(self, rules: Rules, batch: Batch, step: Step, lora_manager: Any, device: torch.device) -> None:
        self._rules, self._step = rules, step
        self._adapters = RowAdapters(lora_manager, sum(entry.scheduled for entry in step.entries))
        self._first = {stage.layer: number for number, stage in enumerate(rules.schedule.stages, 1)}
        self._prefills: list[_VisualPrefill | None] = []
        self._scheduled: list[int] = []
        start = 0
        for row, entry in enumerate(step.entries):
            prefill = None
            if entry.has_visual:
                prefill = _VisualPrefill(row, step, rules, batch, self._adapters, start, device)
            if prefill is None and self._prefills and self._prefills[-1] is None:
                self._scheduled[-1] += entry.scheduled
            else:
                self._prefills.append(prefill)
                self._scheduled.append(entry.scheduled)
            start += entry.scheduled
        self._lengths = list(self._scheduled)

    def run(self, text: Any, positions: Tensor, embeds: Tensor, deepstack: Mapping[int, Tensor]) -> Tensor:
        """(T, D) hidden states after the last norm, of which vLLM reads the last row of every request.

        Args:
            text: vLLM's text model, with its `layers` and `norm`.
            positions: (T,) or (3, T).
            embeds: (T, D), padded or not.
            deepstack: layer -> (T, D) features to add after it (Qwen3-VL); layers of stage 0 only.
        """
        tokens = sum(self._scheduled)
        hidden, positions = embeds[:tokens], positions[..., :tokens]
        residual: Tensor | None = None
        with ExitStack() as stage:
            for index, layer in enumerate(text.layers):
                if index in self._first:
                    stage.close()
                    hidden, positions = self._end_stage(index, layer, _whole(hidden, residual), positions)
                    residual = None
                    if not len(hidden):  # all requests of the step wait for the rest of their prompts
                        return torch.zeros_like(embeds)
                    self._use_slots(text.layers[index:], self._first[index])
                    stage.enter_context(self._adapters.rows(text.layers, self._row_adapters()))
                if self._rules.rank_layer == "last" and index + 1 in self._first:
                    self._rank_ahead(self._first[index + 1], layer, _whole(hidden, residual), positions)
                hidden, residual = layer(positions, hidden, residual)
                if index in deepstack:
                    hidden = hidden + deepstack[index][:tokens]
        hidden, _ = text.norm(hidden, residual)
        return self._given_back(hidden, embeds)

    def _end_stage(self, index: int, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        stage = self._first[index]
        spans = [
            (rows, places) if prefill is None else prefill.drop(stage, layer, rows, places)
            for prefill, rows, places in self._spans(hidden, positions)
        ]
        self._lengths = [len(rows) for rows, _ in spans]
        if sum(self._lengths) != sum(self._step.rows(stage)):
            raise RuntimeError("pyramiddrop: the rows of a stage are not those that its KV cache was told of")
        return torch.cat([rows for rows, _ in spans]), torch.cat([places for _, places in spans], -1)

    def _rank_ahead(self, stage: int, layer: Any, hidden: Tensor, positions: Tensor) -> None:
        for prefill, rows, places in self._spans(hidden, positions):
            if prefill is not None:
                prefill.rank_ahead(stage, layer, rows, places)

    def _spans(self, hidden: Tensor, positions: Tensor) -> Any:
        return zip(
            self._prefills,
            torch.split(hidden, self._lengths),
            torch.split(positions, self._lengths, dim=-1),
            strict=True,
        )

    def _row_adapters(self) -> list[int]:
        """The LoRA adapter of each row; empty without LoRA."""
        adapters: list[int] = []
        start = 0
        for prefill, length, scheduled in zip(self._prefills, self._lengths, self._scheduled, strict=True):
            own = self._adapters.of(start, start + scheduled) if prefill is None else prefill.adapter * length
            adapters.extend(own)
            start += scheduled
        return adapters

    def _use_slots(self, layers: Any, stage: int) -> None:
        """Make the layers of `stage` write their keys and values to the slots of its metadata builder."""
        context = get_forward_context()
        for layer in layers:
            name = layer.self_attn.attn.layer_name
            if name in self._step.slots:
                context.slot_mapping[name] = self._step.slots[name]

    def _given_back(self, hidden: Tensor, embeds: Tensor) -> Tensor:
        out = embeds.new_zeros(len(embeds), hidden.shape[-1])
        start = 0
        for prefill, rows, scheduled in zip(
            self._prefills, torch.split(hidden, self._lengths), self._scheduled, strict=True
        ):
            end = start + scheduled
            if prefill is None:
                out[start:end] = rows
            elif prefill.finishes:
                out[end - 1] = rows[-1]
            start = end
        return out


def _whole(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """Add the two parts in which vLLM carries the residual stream."""
    return hidden if residual is None else hidden + residual
