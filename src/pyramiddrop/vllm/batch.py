"""Describe one step: its requests, the tokens that each stage lacks, and the visual prompts in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
        slots: layer name -> (rows,) long, where its keys and values go, where this step has other rows than vLLM knows.
    """

    entries: Sequence[Entry]
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


@dataclass(frozen=True)
class Waiting:
    """What the parts of a prompt computed so far have left for its last part.

    Attributes:
        hidden: (n, D), what they hand to the first layer of stage 1.
        positions: (..., n) of them.
        ranking: (n, D), what the ranking layer received, where that is a layer of stage 0; else None.
    """

    hidden: Tensor
    positions: Tensor
    ranking: Tensor | None


class Batch:
    """What the runner, the metadata builders and the model of one worker share.

    Attributes:
        step: the step that runs, or None where a step is none of the engine's (profiling, warming up, capturing).
        waiting: request id -> what the earlier parts of its prompt have left.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self.waiting: dict[str, Waiting] = {}

    def begin(self, entries: Iterable[Entry]) -> None:
        """A step begins. A prompt that begins anew has nothing left of its earlier, preempted parts."""
        self.step = Step(list(entries))
        for entry in self.step.entries:
            if entry.computed == 0:
                self.forget(entry.request)

    def forget(self, request: str) -> None:
        """A request has ended, or begins anew."""
        self.waiting.pop(request, None)
