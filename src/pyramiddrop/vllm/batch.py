"""Describe one step: its requests, the tokens that each stage lacks, and the visual prompts in it."""

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
        request: its id.
        prompt: its visual prompt, or None where no stage drops any of it.
        computed: its tokens of earlier steps.
        scheduled: its tokens of this step.
    """

    request: str
    prompt: VisualPrompt | None
    computed: int
    scheduled: int

    @property
    def has_visual(self) -> bool:
        """Whether this step computes a part of a visual prompt."""
        return self.prompt is not None and self.computed < self.prompt.length

    @property
    def finishes(self) -> bool:
        """Whether this step computes the prompt's last token, and so ends its stages."""
        return self.has_visual and self.prompt is not None and self.computed + self.scheduled >= self.prompt.length

    def num_dropped(self, stage: int) -> int:
        """Of the tokens computed after this step, those that the layers of `stage` hold no row of."""
        if self.prompt is None or stage == 0:
            return 0
        if self.has_visual and not self.finishes:
            return self.computed + self.scheduled
        return self.prompt.dropped[stage]

    def rows(self, stage: int) -> int:
        """The rows that the layers of `stage` compute in this step."""
        if not self.has_visual or stage == 0:
            return self.scheduled
        return self.computed + self.scheduled - self.num_dropped(stage)


class Step:
    """One step of the engine.

    Attributes:
        entries: its requests, in the order of the batch.
        has_visual: whether any request computes a part of a visual prompt.
        drops: whether any stage lacks anything of any request.
        decodes: whether each request computes one token, behind its visual prompt if it has one.
        table: (R, blocks) of each request the numbers of its blocks of stage 0; None before its metadata is built.
        block: tokens of one of these blocks.
        slots: layer name -> (rows,) long, where its keys and values go, where this step has other rows than vLLM knows.
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
        """(R,) int32 on `device`: for each request the tokens that the layers of `stage` hold no row of."""
        place = stage, device
        if place not in self._missing:
            counts = torch.tensor([entry.num_dropped(stage) for entry in self.entries], dtype=torch.int32)
            self._missing[place] = counts.to(device, non_blocking=True)
        return self._missing[place]

    def rows(self, stage: int) -> list[int]:
        """For each request the rows that the layers of `stage` compute."""
        return [entry.rows(stage) for entry in self.entries]


class Batch:
    """What the runner, the metadata builders and the model of one worker share.

    Attributes:
        step: the step that runs, or None where a step is none of the engine's (profiling, warming up, capturing).
        waiting: request id -> the rows that the parts of its prompt computed so far have left for its last part.
        prefix: rows of blocks in the prefix cache; None if there is no such cache.
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
        """A step begins. A prompt that begins anew has nothing left of its earlier, preempted parts.

        A step that only goes on decoding the requests of the step before is described by that one.

        Args:
            requests: their ids, in the order of the batch.
            prompts: their visual prompts, or None where no stage drops any of it.
            computed: (R,) their tokens of earlier steps.
            scheduled: (R,) their tokens of this step.

        Raises:
            RuntimeError: for a single token of a visual prompt: the scheduler was to cut it otherwise.
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
        """Whether the last step decoded the same prompts in the same order, and this one does, too."""
        last = self._decoding
        return (
            last is not None
            and len(last.entries) == len(prompts)
            and all(map(is_, prompts, (entry.prompt for entry in last.entries)))
            and bool((scheduled == 1).all() and (computed >= self._ends).all())
        )

    def note_blocks(self, table: Tensor, block: int) -> None:
        """Blocks of stage 0 of the step's requests: their numbers (R, blocks), and the tokens of one.

        If that stage has several KV-cache groups, it is the first that counts.
        """
        if self.step is not None and self.step.table is None:
            self.step.table, self.step.block = table, block

    def forget(self, request: str) -> None:
        """A request has ended, or begins anew."""
        self.waiting.pop(request, None)
