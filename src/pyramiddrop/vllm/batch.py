"""Describe one engine step: its requests, their visual prompts, and the tokens dropped before each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyramiddrop.vllm.prefix_rows import PrefixRows, Rows
from pyramiddrop.vllm.prompts import VisualPrompt


@dataclass(frozen=True)
class ScheduledRequest:
    """One request of a step, in the order of the batch.

    Attributes:
        request: the id of the request.
        prompt: its visual prompt; None if no tokens are dropped from it.
        computed: number of its tokens computed in earlier steps.
        scheduled: number of its tokens in this step.
    """

    request: str
    prompt: VisualPrompt | None
    computed: int
    scheduled: int

    @property
    def has_visual(self) -> bool:
        """True if this step computes a part of a visual prompt."""
        return self.prompt is not None and self.computed < self.prompt.length

    @property
    def finishes(self) -> bool:
        """True if this step computes the prompt's last token, after which all stages are complete."""
        return self.has_visual and self.prompt is not None and self.computed + self.scheduled >= self.prompt.length

    def num_dropped(self, stage: int) -> int:
        """The number of tokens computed so far, this step included, of which the layers of `stage` have no row."""
        if self.prompt is None or stage == 0:
            return 0
        if self.has_visual and not self.finishes:
            return self.computed + self.scheduled
        return self.prompt.dropped[stage]

    def rows(self, stage: int) -> int:
        """The number of rows that the layers of `stage` compute in this step."""
        if not self.has_visual or stage == 0:
            return self.scheduled
        return self.computed + self.scheduled - self.num_dropped(stage)


class Step:
    """One step of the engine.

    Attributes:
        entries: its requests, in the order of the batch.
        has_visual: True if any request computes a part of a visual prompt.
        drops: True if tokens of any request were dropped before any stage.
        decodes: True if each request computes one token, after its visual prompt if it has one.
        table: (R, blocks) the numbers of each request's blocks of stage 0; None before its metadata is built.
        block: number of tokens in one of these blocks.
        slots: layer name -> (rows,) long, the slots of its keys and values, if the step's rows differ from vLLM's.
    """

    def __init__(self, entries: Sequence[ScheduledRequest]) -> None:
        self.entries = entries
        self.has_visual = any(entry.has_visual for entry in entries)
        self.drops = any(entry.prompt is not None for entry in entries)
        self.decodes = not self.has_visual and all(entry.scheduled == 1 for entry in entries)
        self.table: Tensor | None = None
        self.block = 0
        self.slots: dict[str, Tensor] = {}
        self._missing: dict[tuple[int, torch.device], Tensor] = {}

    def num_dropped(self, stage: int, device: torch.device) -> Tensor:
        """(R,) int32 on `device`: for each request the number of tokens without a row in the layers of `stage`."""
        place = stage, device
        if place not in self._missing:
            counts = torch.tensor([entry.num_dropped(stage) for entry in self.entries], dtype=torch.int32)
            self._missing[place] = counts.to(device, non_blocking=True)
        return self._missing[place]

    def rows(self, stage: int) -> list[int]:
        """For each request the number of rows that the layers of `stage` compute."""
        return [entry.rows(stage) for entry in self.entries]


class Batch:
    """The state that the runner, the metadata builders and the model of a worker share.

    Attributes:
        step: the running step; None if it is not one of the engine (profiling, warm-up, capture).
        waiting: request id -> the rows of the computed parts of its prompt, kept for the last part.
        prefix: rows of blocks in the prefix cache; None without such a cache.
    """

    def __init__(self, prefix: PrefixRows | None = None) -> None:
        self.step: Step | None = None
        self.waiting: dict[str, Rows] = {}
        self.prefix = prefix
        self._decoding: Step | None = None
        self._ends = np.empty(0)

    def begin(
        self,
        requests: Sequence[str],
        prompts: Sequence[VisualPrompt | None],
        computed: np.ndarray[Any, Any],
        scheduled: np.ndarray[Any, Any],
    ) -> None:
        """Begin a step. Parts of a preempted prompt that starts again are discarded.

        A step that continues to decode the same requests reuses the description of the step before.

        Args:
            requests: the ids of the requests, in the order of the batch.
            prompts: their visual prompts; None if no tokens are dropped.
            computed: (R,) numbers of their tokens computed in earlier steps.
            scheduled: (R,) numbers of their tokens in this step.

        Raises:
            RuntimeError: for a single token of a visual prompt, which the scheduler should have avoided.
        """
        if self._decodes_on(prompts, computed, scheduled):
            self.step = self._decoding
            return
        described = zip(requests, prompts, computed.tolist(), scheduled.tolist(), strict=True)
        self.step = Step([ScheduledRequest(*values) for values in described])
        self._decoding = self.step if self.step.decodes else None
        self._ends = np.array([prompt.length if prompt is not None else 0 for prompt in prompts])
        for entry in self.step.entries:
            held = self.waiting.get(entry.request)
            if held is not None and len(held.hidden) != entry.computed:
                self.forget(entry.request)
            if entry.has_visual and entry.scheduled == 1:
                raise RuntimeError(
                    f"pyramiddrop: a single token of the prompt of {entry.request} is scheduled, which would be "
                    "replayed as a step of decoding: vLLM did not ask the plugin's scheduler how to cut the prompt"
                )

    def _decodes_on(
        self,
        prompts: Sequence[VisualPrompt | None],
        computed: np.ndarray[Any, Any],
        scheduled: np.ndarray[Any, Any],
    ) -> bool:
        """True if both the last step and this one decode the same prompts in the same order."""
        last = self._decoding
        return (
            last is not None
            and len(last.entries) == len(prompts)
            and all(map(is_, prompts, (entry.prompt for entry in last.entries)))
            and bool((scheduled == 1).all() and (computed >= self._ends).all())
        )

    def note_blocks(self, table: Tensor, block: int) -> None:
        """Note the blocks of stage 0 of the step's requests: their numbers (R, blocks), and the tokens in a block.

        If stage 0 has several KV-cache groups, the first one counts.
        """
        if self.step is not None and self.step.table is None:
            self.step.table, self.step.block = table, block

    def forget(self, request: str) -> None:
        """Discard the state of a request that has ended or starts again."""
        self.waiting.pop(request, None)
