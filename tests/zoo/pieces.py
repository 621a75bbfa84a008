"""Rows of text, images and videos for tiny models of any family, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

IGNORED = -100
FIRST_TEXT, LAST_TEXT = 2, 150  # ids of ordinary text; special ids lie above, so that no text is one by chance

Inputs = dict[str, Tensor]


class Answer(int):
    """A segment of so many text tokens that are supervised (their labels are not -100)."""


@dataclass
class Piece:
    """What one image or video adds to a row.

    Attributes:
        ids: its tokens, with the start and end tokens, timestamps and newlines that the family's processor writes.
        types: 1 at visual tokens of an image, 2 at those of a video, 0 at text around them (mm_token_type_ids).
        tensors: what the model's forward takes beside; joined along dimension 0 over the batch, in order.
        frames: of a video, the frame of each visual token, from 0; empty: it is an image.
    """

    ids: list[int]
    types: list[int]
    tensors: Inputs
    frames: list[int] = field(default_factory=list)

    def cut(self, counts: Sequence[int]) -> Piece:
        """Tell the frame of each token of a video, whose frames have so many visual tokens."""
        frames = iter([frame for frame, count in enumerate(counts) for _ in range(count)])
        self.frames = [next(frames) if kind else 0 for kind in self.types]
        assert next(frames, None) is None, "more tokens of frames than there are"
        return self


@dataclass
class Row:
    """One sample before padding."""

    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


@dataclass(frozen=True)
class Member:
    """A tiny random model of one family.

    Attributes:
        name: of the member, unique: the family's model_type, and a variant behind a dash where there are several.
        build: seed -> the model: float32, eval mode, at least 8 decoder layers (or as few as the family allows).
        piece: (model, generator, number of the piece in its row) -> an image; sizes differ by number where they can.
        video: the same for a video, or None where the family has none.
        finish: (model, inputs) -> the inputs with what the family's processor adds per token, e.g. token_type_ids.
        cannot: what the untouched model cannot do -> why. Keys: "batch", "right_padding", "left_padding", "generate",
            "use_cache", "static_cache", "beams", "sdpa", "checkpointing", "reentrant" (of the two kinds of
            checkpointing), "training", "images" (several a row), "second_turn", "mixed" (images and videos in one
            batch), "video_beams" (of a prompt with a video alone), "image_beams" (of a row with two images).
    """

    name: str
    build: Callable[[int], PreTrainedModel]
    piece: Callable[[PreTrainedModel, torch.Generator, int], Piece]
    video: Callable[[PreTrainedModel, torch.Generator, int], Piece] | None = None
    finish: Callable[[PreTrainedModel, Inputs], Inputs] | None = None
    cannot: Mapping[str, str] = field(default_factory=dict)


def without_types(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The `finish` of families whose forward takes no mm_token_type_ids."""
    return {name: tensor for name, tensor in inputs.items() if name != "mm_token_type_ids"}


def make_rows(member: Member, model: PreTrainedModel, specs: Sequence[Sequence[object]], seed: int = 1) -> list[Row]:
    """Rows of random content. A spec lists segments: 5 is five text tokens, Answer(5) supervised ones, "image" one.

    The content of a row depends on the seed and the row's number alone.
    """
    return [_make_row(member, model, spec, seed * 1000 + number) for number, spec in enumerate(specs)]


def _make_row(member: Member, model: PreTrainedModel, spec: Sequence[object], seed: int) -> Row:
    generator, row = torch.Generator().manual_seed(seed), Row()
    for segment in spec:
        if isinstance(segment, str):
            make = {"image": member.piece, "video": member.video}[segment]
            assert make is not None, f"{member.name} has no {segment}"
            piece = make(model, generator, len(row.pieces))
            row.pieces.append(piece)
            row.ids += piece.ids
            row.types += piece.types
            row.labels += [IGNORED] * len(piece.ids)
        else:
            assert isinstance(segment, int)
            tokens = torch.randint(FIRST_TEXT, LAST_TEXT, (int(segment),), generator=generator).tolist()
            row.ids += tokens
            row.types += [0] * len(tokens)
            row.labels += tokens if isinstance(segment, Answer) else [IGNORED] * len(tokens)
    return row


def collate(
    member: Member, model: PreTrainedModel, rows: Sequence[Row], side: str = "left", labels: bool = False
) -> Inputs:
    """The model's inputs: rows padded on one side to the longest, their images and videos one after the other."""
    width = max(len(row.ids) for row in rows)
    inputs = {
        "input_ids": torch.tensor([_pad(row.ids, width, 0, side) for row in rows]),
        "attention_mask": torch.tensor([_pad([1] * len(row.ids), width, 0, side) for row in rows]),
        "mm_token_type_ids": torch.tensor([_pad(row.types, width, 0, side) for row in rows]),
    }
    if labels:
        inputs["labels"] = torch.tensor([_pad(row.labels, width, IGNORED, side) for row in rows])
    tensors: dict[str, list[Tensor]] = {}
    for piece in (piece for row in rows for piece in row.pieces):
        for name, tensor in piece.tensors.items():
            tensors.setdefault(name, []).append(tensor)
    inputs |= {name: torch.cat(parts) for name, parts in tensors.items()}
    return member.finish(model, inputs) if member.finish else inputs


def make_batch(
    member: Member,
    model: PreTrainedModel,
    specs: Sequence[Sequence[object]],
    side: str = "left",
    seed: int = 1,
    labels: bool = False,
) -> Inputs:
    """`collate(make_rows(...))`."""
    return collate(member, model, make_rows(member, model, specs, seed), side, labels)


def _pad(values: list[int], width: int, filler: int, side: str) -> list[int]:
    padding = [filler] * (width - len(values))
    return padding + values if side == "left" else values + padding
