"""Describe one step: its requests, the tokens that each stage lacks, and the visual prompts in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyramiddrop.vllm.prefix_rows import PrefixRows, Rows
from pyramiddrop.vllm.prompts import VisualPrompt


@dataclass(frozen=True)
class Entry:
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
    def visits(self) -> bool:
        """Whether this step computes a part of a visual prompt."""
        return self.prompt is not None and self.computed < self.prompt.length

    @property
    def finishes(self) -> bool:
        """Whether this step computes the prompt's last token, and so ends its stages."""
        return self.visits and self.prompt is not None and self.computed + self.scheduled >= self.prompt.length

    def missing(self, stage: int) -> int:
        """Of the tokens computed after this step, those that the layers of `stage` hold no row of."""
        if self.prompt is None or stage == 0:
            return 0
        if self.visits and not self.finishes:
            return self.computed + self.scheduled
        return self.prompt.dropped[stage]

    def rows(self, stage: int) -> int:
        """The rows that the layers of `stage` compute in this step."""
        if not self.visits or stage == 0:
            return self.scheduled
        return self.computed + self.scheduled - self.missing(stage)


@dataclass
class Step:
    """One step of the engine.

    Attributes:
        entries: its requests, in the order of the batch.
        table: (R, blocks) of each request the numbers of its blocks of stage 0; None before its metadata is built.
        block: tokens of one of these blocks.
        slots: layer name -> (rows,) long, where its keys and values go, where this step has other rows than vLLM knows.
    """

    entries: Sequence[Entry]
    table: Tensor | None = None
    block: int = 0
    slots: dict[str, Tensor] = field(default_factory=dict)

    @property
    def visits(self) -> bool:
        """Whether any request computes a part of a visual prompt."""
        return any(entry.visits for entry in self.entries)

    @property
    def misses(self) -> bool:
        """Whether any stage misses anything of any request."""
        return any(entry.prompt is not None for entry in self.entries)

    def missing(self, stage: int) -> Tensor:
        """(R,) int32 on the CPU."""
        return torch.tensor([entry.missing(stage) for entry in self.entries], dtype=torch.int32)

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

    def begin(self, entries: Iterable[Entry]) -> None:
        """A step begins. A prompt that begins anew has nothing left of its earlier, preempted parts.

        Raises:
            RuntimeError: for a single token of a visual prompt: the scheduler was to cut it otherwise.
        """
        self.step = Step(list(entries))
        for entry in self.step.entries:
            held = self.waiting.get(entry.request)
            if held is not None and len(held.hidden) != entry.computed:
                self.forget(entry.request)
            if entry.visits and entry.scheduled == 1:
                raise RuntimeError(
                    f"pyramiddrop: a single token of the prompt of {entry.request} is scheduled, which would be "
                    "replayed as a step of decoding: vLLM did not ask the plugin's scheduler how to cut the prompt"
                )

    def note_blocks(self, table: Tensor, block: int) -> None:
        """Blocks of stage 0 of the step's requests: their numbers (R, blocks), and the tokens of one."""
        if self.step is not None:
            self.step.table, self.step.block = table, block

    def forget(self, request: str) -> None:
        """A request has ended, or begins anew."""
        self.waiting.pop(request, None)
