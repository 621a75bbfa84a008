"""Count the visual tokens of a prompt, and how many of them each stage keeps.

The scheduler, which counts blocks, and the workers, which write them, both compute it from the same prompt. No messages
between them are needed, and no state remains when a request is preempted or aborted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.vllm.rules import Rules

VISUAL = ("image", "video")


@dataclass(frozen=True)
class VisualPrompt:
    """A prompt from which tokens are dropped.

    Attributes:
        length: number of its tokens.
        columns: (N,) long, the columns of its visual tokens, ascending.
        groups: (N,) long, the group of each visual token: one for all, or one for each image.
        num_keep: for each drop the number of kept tokens of each group.
        dropped: for each stage, including stage 0, the number of tokens dropped before it.
    """

    length: int
    columns: Tensor
    groups: Tensor
    num_keep: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]


def read_prompt(features: Sequence[Any] | None, length: int, rules: Rules) -> VisualPrompt | None:
    """Read the visual tokens of a prompt of `length` tokens; None if none of them is dropped.

    Args:
        features: vLLM's `mm_features` of the request.
        length: number of tokens of the prompt, without generated ones.
        rules: the rules of the engine.
    """
    spans = _spans(features)
    sizes = _group_sizes(spans, rules)
    num_keep = _num_keep(spans, sizes, length, rules)
    dropped = (0, *(sum(sizes) - sum(kept) for kept in num_keep))
    if not any(dropped):
        return None
    columns = torch.cat(spans)
    owners = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([len(span) for span in spans]))
    columns, order = columns.sort()
    groups = owners[order] if rules.per_image else torch.zeros_like(columns)
    return VisualPrompt(length, columns, groups, num_keep, dropped)


def visual_by_stage(features: Sequence[Any] | None, length: int, rules: Rules) -> tuple[int, ...]:
    """The number of visual tokens of a prompt in each stage, including stage 0; arguments as for `read_prompt`."""
    spans = _spans(features)
    sizes = _group_sizes(spans, rules)
    return (sum(sizes), *map(sum, _num_keep(spans, sizes, length, rules)))


def _group_sizes(spans: Sequence[Tensor], rules: Rules) -> list[int]:
    """The number of visual tokens of each group that is ranked separately."""
    return [len(span) for span in spans] if rules.per_image else [sum(map(len, spans))]


def _num_keep(spans: Sequence[Tensor], sizes: Sequence[int], length: int, rules: Rules) -> tuple[tuple[int, ...], ...]:
    """For each drop the number of kept tokens of each group."""
    # The last token of a picture at the end of the prompt is the query token, which is always kept.
    asking = (
        [int(length - 1 in span) for span in spans] if rules.per_image else [int(any(length - 1 in s for s in spans))]
    )
    held = list(zip(sizes, asking, strict=True))
    return tuple(tuple(max(stage.count(size), own) for size, own in held) for stage in rules.schedule.stages)


def _spans(features: Sequence[Any] | None) -> list[Tensor]:
    """The columns of the visual tokens of each image or video; separators between them are text."""
    spans = []
    for feature in features or ():
        if feature.modality in VISUAL:
            place = feature.mm_position
            columns = torch.arange(place.offset, place.offset + place.length)
            spans.append(columns if place.is_embed is None else columns[torch.as_tensor(place.is_embed, device="cpu")])
    return spans
