"""A member of the zoo on the bench: its model, its batches, and who asks in them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import reference
from conformance.setups import Setup, setup_of
from masked_oracle import Prompt
from zoo import MEMBERS, Answer, Member
from zoo.pieces import Row, collate, make_rows

Spec = Sequence[object]


@dataclass
class Batch:
    """Rows of the zoo as one call.

    Attributes:
        inputs: of the model's forward.
        rows: before padding.
        groups: the number of the image or video, or frame, that each token of a row belongs to, 0 for text.
        prompt: who is visual and who asks, for the oracle.
        valid: (B, L) bool, False at padding.
    """

    inputs: dict[str, Any]
    rows: list[Row]
    groups: list[list[int]]
    prompt: Prompt
    valid: Tensor


@dataclass
class Subject:
    """What a check works on; the model is the check's own."""

    member: Member
    setup: Setup
    model: PreTrainedModel

    def can(self, ability: str) -> bool:
        """Whether the untouched model can do it."""
        return ability not in self.member.cannot

    def batch(
        self, specs: Sequence[Spec], side: str = "left", labels: bool = False, seed: int = 1, by_frame: bool = False
    ) -> Batch:
        """A batch made of specs; with labels a training batch, in which the answers ask.

        Args:
            by_frame: whether each frame of a video counts as a group, as images do.
        """
        rows = make_rows(self.member, self.model, specs, seed)
        groups = [numbered(spec, row, by_frame) for spec, row in zip(specs, rows, strict=True)]
        return self.collate(rows, groups, side, labels)

    def collate(self, rows: list[Row], groups: list[list[int]], side: str = "left", labels: bool = False) -> Batch:
        """A batch of these rows; `groups` tells the image of every token."""
        inputs: dict[str, Any] = dict(collate(self.member, self.model, rows, side, labels))
        valid = padded([[1] * len(row.ids) for row in rows], side).bool()
        visual = padded([row.types for row in rows], side) > 0
        answers = padded([row.labels for row in rows], side, reference.IGNORED)
        queries = reference.answer_queries(answers) if labels else reference.last_columns(valid)
        protected = reference.predictors(answers) if labels else torch.zeros_like(visual)
        for sample, asking in enumerate(queries):
            protected[sample, asking] = True
        return Batch(inputs, rows, groups, Prompt(visual, queries, padded(groups, side), protected & visual), valid)

    def apart(self, batch: Batch) -> list[Batch]:
        """The rows of a batch, each alone."""
        labels = "labels" in batch.inputs
        rows = zip(batch.rows, batch.groups, strict=True)
        return [self.collate([row], [groups], labels=labels) for row, groups in rows]

    # ---- what the member is able to take ---------------------------------------------------------------------------

    @property
    def prompts(self) -> list[list[Spec]]:
        """Batches of prompts for `generate`: a single row, and rows of unequal length with two images and with none."""
        batches: list[list[Spec]] = [[[5, "image", 7]]]
        if self.can("batch") and self.can("left_padding"):
            batches.append(self.mixed)
        return batches

    @property
    def mixed(self) -> list[Spec]:
        """Rows of unequal length: with an image, with two, with none."""
        return [[5, "image", 7], [3, *self.two, 1], [9]]

    @property
    def lessons(self) -> list[list[Spec]]:
        """Batches for training: several turns; and rows with an image but no label, and with text alone."""
        turns: Spec = [3, "image", 4, Answer(3), 5, Answer(2)]
        batches: list[list[Spec]] = [[[2, "image", Answer(3)]]]
        if self.can("batch") and self.can("right_padding"):
            more: Spec = [2, "image", 4, Answer(3), *self.two, Answer(2)]
            batches.append([turns, more, [2, "image", 3], [4, Answer(3)]])
        else:
            batches.append([turns])
        return batches

    @property
    def two(self) -> Spec:
        """Two images with text between, or one where a row takes no more."""
        return ["image", 2, "image"] if self.can("images") else ["image", 6]


def numbered(spec: Spec, row: Row, by_frame: bool = False) -> list[int]:
    """The number of the image or video, or of the frame, from 1, that each token of a row belongs to; 0 for text."""
    numbers: list[int] = []
    pieces, first = iter(row.pieces), 1
    for segment in spec:
        if isinstance(segment, str):
            piece = next(pieces)
            frames = piece.frames if by_frame and piece.frames else [0] * len(piece.ids)
            numbers += [first + frame for frame in frames]
            first += max(frames) + 1
        else:
            assert isinstance(segment, int)
            numbers += [0] * int(segment)
    return numbers


def padded(rows: Sequence[list[int]], side: str, filler: int = 0) -> Tensor:
    """(B, L) the rows with filler on one side."""
    width = max(map(len, rows))
    padding = [[filler] * (width - len(row)) for row in rows]
    return torch.tensor([p + row if side == "left" else row + p for row, p in zip(rows, padding, strict=True)])


@lru_cache(maxsize=2)
def _built(name: str) -> PreTrainedModel:
    return MEMBERS[name].build(0)


def subject_of(member: Member, attention: str | None = None) -> Subject:
    """The member with a fresh copy of its model, under its own attention implementation or the given one."""
    model = copy.deepcopy(_built(member.name))
    if attention is not None:
        model.set_attn_implementation(attention)
    return Subject(member, setup_of(member), model)
