"""Who shares a quota: all visual tokens of a sample, those of one image or video, or those of one frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def video_frames(call: Mapping[str, Any], merged: int = 1) -> list[int] | None:
    """Frames of each video of a call, in order (as the language model counts them), or None where it does not tell.

    Args:
        merged: frames of a grid that the model makes one of (ERNIE 4.5 VL: 2).
    """
    grids, pixels, counts = (
        call.get(name) for name in ("video_grid_thw", "pixel_values_videos", "num_frames_per_video")
    )
    if counts is not None:
        return [int(frames) for frames in counts]
    if grids is not None:
        return [max(1, int(frames) // merged) for frames in grids[:, 0]]
    if pixels is not None and pixels.dim() >= 4:
        return [pixels.shape[1]] * len(pixels)
    return None


def frames_of_beams(frames: Sequence[int], video: Tensor, beams: int) -> list[int]:
    """`frames` of each video in the order of a batch in which `generate` has repeated each row `beams` times.

    Args:
        video: (B, L) bool, the batch's video tokens.
    """
    starts = video & ~torch.nn.functional.pad(video, (1, 0))[:, :-1]
    runs = starts.sum(1).tolist()[::beams]
    alone = sum(runs) == len(frames)  # a video is one run of tokens; else each of its frames is
    given, repeated = iter(frames), list[int]()
    for count in runs:
        mine: list[int] = []
        while (len(mine) if alone else sum(mine)) < count and (of_video := next(given, None)) is not None:
            mine.append(of_video)
        repeated += mine * beams
    return repeated


def video_lengths(call: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each video where `generate` has already encoded them, and hands over neither grids nor pixels."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("video")
    features = getattr(encoded, "pooler_output", None)
    return None if features is None else [len(each) for each in features]


def group_tokens(
    grouping: str,
    visual: Tensor,
    video: Tensor,
    image_lengths: Sequence[int] | None,
    frames: Sequence[int] | None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The group of each visual token, counted in its sample from 0 and ascending along the row.

    Args:
        grouping: "sample", "image" (each image and each video is a group) or "frame" (each image and each frame is).
        visual: (B, L) bool.
        video: (B, L) bool, which of them belong to videos.
        image_lengths: tokens of each image of the batch in order; None, or what does not fit: a run of tokens is one.
        frames: of each video of the batch in order, or None where unknown.
        lengths: tokens of each video of the batch in order; None, or what does not fit: unknown.

    Returns:
        (B, L) long, 0 at text.

    Raises:
        ValueError: for "frame", where the frames of a video cannot be told apart.
    """
    if grouping == "sample":
        return torch.zeros_like(visual, dtype=torch.long)
    video = video & visual
    number = _images(visual & ~video, image_lengths)
    number = torch.where(video, number.max() + 1 + _videos(video, frames, lengths, grouping == "frame"), number)
    return counted_along(number, visual)


def _images(image: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """(B, L) the number of the image that each of its tokens belongs to, through the batch."""
    if lengths is None or sum(lengths) != int(image.sum()):
        return _runs(image)
    numbers = torch.zeros_like(image, dtype=torch.long)
    numbers[image] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    return numbers


def _videos(video: Tensor, frames: Sequence[int] | None, lengths: Sequence[int] | None, by_frame: bool) -> Tensor:
    """(B, L) the number of the video, or of the frame, that each of its tokens belongs to, through the batch."""
    runs = _runs(video)
    count = int(runs.max()) + 1 if video.any() else 0
    if frames is None and lengths is not None and sum(lengths) == int(video.sum()):
        if not by_frame:
            return _images(video, lengths)
        if _apart(video, runs, lengths):
            return runs
    if not count or (not by_frame and (frames is None or count != sum(frames))):
        return runs
    if frames is not None and count == sum(frames):  # a run is a frame: timestamps stand between
        owner = (
            torch.arange(count)
            if by_frame
            else torch.repeat_interleave(torch.arange(len(frames)), torch.tensor(frames))
        )
        return owner[runs]
    if frames is None or count != len(frames):
        raise ValueError(
            f"per_frame=True: this call's {count} runs of video tokens do not tell where its frames "
            f"{'(of unknown number) ' if frames is None else f'({list(frames)}) '}begin; use per_image=True"
        )
    numbers, first = torch.zeros_like(runs), 0
    for run, of_video in enumerate(frames):
        inside = video & (runs == run)
        numbers[inside] = first + _even(int(inside.sum()), of_video)
        first += of_video
    return numbers


def _apart(video: Tensor, runs: Tensor, lengths: Sequence[int]) -> bool:
    """Whether each video of so many tokens is several runs of equal length: its frames, with timestamps between."""
    owner, of_run = _images(video, lengths)[video].tolist(), runs[video].tolist()
    sizes = [Counter(run for run, whose in zip(of_run, owner, strict=True) if whose == mine) for mine in set(owner)]
    return all(len(each) > 1 and len(set(each.values())) == 1 for each in sizes)


def _even(tokens: int, frames: int) -> Tensor:
    """(tokens,) the frame of each token of a video without gaps; a newline may end it."""
    size, rest = divmod(tokens, frames)
    if rest > 1 or not size:
        raise ValueError(
            f"per_frame=True: {tokens} tokens of a video of {frames} frames cannot be told apart; use per_image=True"
        )
    return (torch.arange(tokens) // size).clamp(max=frames - 1)


def _runs(mask: Tensor) -> Tensor:
    """(B, L) the number of the run of True that each column belongs to, through the batch; 0 elsewhere."""
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return ((starts.flatten().cumsum(0) - 1).view_as(mask) * mask).clamp(min=0)


def counted_along(number: Tensor, visual: Tensor) -> Tensor:
    """Numbers of groups in the order in which they come along each row."""
    groups = torch.zeros_like(number)
    for row, mask, numbers in zip(groups, visual, number, strict=True):
        mine = numbers[mask]
        changes = torch.cat([mine.new_zeros(1), (mine[1:] != mine[:-1]).long()])[: len(mine)]
        row[mask] = changes.cumsum(0)
    return groups
