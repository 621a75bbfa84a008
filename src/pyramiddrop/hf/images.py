"""Find the tokens of each image, video and frame, and the groups of tokens that share a quota.

A call that does not tell its images apart is refused in `ModelInfo.image_lengths`, a model without frames of its own in
`model_info.check_grouping`, and frames that cannot be told apart here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

#: (configuration, call, (B, L) bool visual tokens of images in it) -> tokens of each image in order, or None where it
#: cannot tell.
ImageLengths = Callable[[PretrainedConfig, Mapping[str, Any], Tensor], Sequence[int] | None]


def encoded_lengths(call: Mapping[str, Any], modality: str) -> list[int] | None:
    """Tokens of each "image" or "video" from features that `generate` has already encoded.

    Transformers 5.2x passes the features to the forward, without the pixels and grids that they were made of.
    """
    encoded = (call.get("mm_encoder_outputs") or {}).get(modality)
    features = getattr(encoded, "pooler_output", None)
    return None if features is None else [len(each) for each in features]


def _by_argument(name: str, rule: Callable[[PretrainedConfig, Any, Tensor], Sequence[int] | None]) -> ImageLengths:
    """The lengths of encoded features; else those by a rule that reads the argument `name` of the call."""

    def lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
        encoded, value = encoded_lengths(call, "image"), call.get(name)
        return encoded if encoded is not None or value is None else rule(config, value, image)

    return lengths


def _equal(config: PretrainedConfig, pixels: Tensor, image: Tensor) -> list[int] | None:
    """Every image has the same number of tokens."""
    tokens, rest = divmod(int(image.sum()), len(pixels))
    return None if rest else [tokens] * len(pixels)


def _in_proportion(patches: Tensor, image: Tensor) -> list[int] | None:
    """Tokens of each image if all tokens stand for the same number of `patches`; None if that does not fit."""
    counts = patches.tolist()
    merged, rest = divmod(sum(counts), max(1, int(image.sum())))
    return None if rest or any(count % merged for count in counts) else [count // merged for count in counts]


_MERGES = ("spatial_merge_size", "merge_kernel_size", "merge_size")  # patches on a side of one token


def _grid(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """Qwen-VL and relatives: one token for a square of patches, with the grids in the call."""
    if not any(hasattr(getattr(config, "vision_config", None), name) for name in _MERGES):
        return None
    encoded, grids = encoded_lengths(call, "image"), call.get("image_grid_thw")
    return encoded if encoded is not None or grids is None else _in_proportion(grids.prod(-1), image)


def _pooled(config: PretrainedConfig, places: Tensor, image: Tensor) -> list[int] | None:
    """Gemma 4: one token for a square of patches, with the position of each patch in the call (-1: padding)."""
    return _in_proportion((places >= 0).all(-1).sum(-1), image)


def _anyres(config: PretrainedConfig, sizes: Any, image: Tensor) -> list[int]:
    """LLaVA-NeXT: the base crop, and the unpadded grid with one newline token a row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    vision, found = config.vision_config, []
    side = vision.image_size // vision.patch_size
    base = side * side + (config.vision_feature_select_strategy == "full")  # with the class token
    for size in sizes:
        height, width = map(int, size)
        tiles = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, vision.image_size)
        _, _, rows, columns = unpadded(tiles[0] * side, tiles[1] * side, height, width)
        found.append(base + rows * (columns + 1))
    return found


def _pixtral(config: PretrainedConfig, sizes: Any, image: Tensor) -> list[int]:
    """Mistral 3: a token for each square of merged patches; their rows are separated."""
    side = config.vision_config.patch_size * config.spatial_merge_size
    return [(int(height) // side) * (int(width) // side) for height, width in sizes]


def _molmo(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
    """Molmo 2: the whole image and its crops, as two grids of separated rows; or a video's frames."""
    encoded, images, videos = encoded_lengths(call, "image"), call.get("image_grids"), call.get("video_grids")
    if encoded is not None:
        return encoded
    if images is not None:
        return [int(high * wide + rows * columns) for high, wide, rows, columns in images]
    if videos is not None:
        return [int(frames * rows * columns) for frames, rows, columns in videos]
    return encoded_lengths(call, "video")


def _step(config: PretrainedConfig, counts: Any, image: Tensor) -> list[int]:
    """Step 3.7: local views, whose number is in the call, and the whole image."""
    counts = [int(count) for count in counts]
    whole = (config.vision_config.image_size // config.vision_config.patch_size // 4) ** 2
    local = (int(image.sum()) - whole * len(counts)) // max(sum(counts), 1)
    return [whole + local * count for count in counts]


def unpadded(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The part (top, left, rows, columns) of a padded `rows` x `columns` grid that shows a `height` x `width` picture.

    It follows Transformers' `unpad_image` with its rounding, because the number of tokens depends on it.
    """
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return padding, 0, rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, padding, rows, columns - 2 * padding


#: (ids of a row, its runs of visual tokens) -> whether an image begins at each run, or None where that is not known.
Beginnings = Callable[[Sequence[int], Sequence[range]], list[bool] | None]

_INSIDE = 2  # the most tokens that a processor writes between two parts, for rules with an end token


def tile_lengths(beginnings: Beginnings) -> ImageLengths:
    """The number of visual tokens of each image of a call, by a rule for the runs of one row."""

    def lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
        ids, found = call.get("input_ids"), list[int]()
        if ids is None:
            return None
        for row, mask in zip(ids.tolist(), image, strict=True):
            runs = _runs(mask)
            begins = [True] * len(runs) if len(runs) < 2 else beginnings(row, runs)
            if begins is None:
                return None
            for run, new in zip(runs, begins, strict=True):
                found += [0] * new
                found[-1] += len(run)
        return found

    return lengths


def one_between(ids: Sequence[int], runs: Sequence[range]) -> list[bool]:
    """One token separates two parts of an image (a line break, a separator), and more separate two images."""
    return [True, *(after.start - before.stop > 1 for before, after in pairwise(runs))]


def end_behind(ids: Sequence[int], runs: Sequence[range]) -> list[bool] | None:
    """A token that follows no other part ends each image; it also follows the row's last run."""
    if runs[-1].stop == len(ids):
        return None
    behind = [ids[run.stop] for run in runs]
    ends = [token == behind[-1] for token in behind]
    gaps = [after.start - before.stop for before, after in pairwise(runs)]
    if any(gap > _INSIDE and not ended for gap, ended in zip(gaps, ends, strict=False)):
        return None
    return [True, *ends[:-1]]


def whole_last(ids: Sequence[int], runs: Sequence[range]) -> list[bool] | None:
    """The same token precedes each part, followed by the part's name; the last part is the whole image, with a name of
    its own and the same token after it (Idefics3)."""
    frame = _frame(ids, runs)
    if frame is None or runs[-1].stop == len(ids):
        return None
    names = [ids[run.start - 1] for run in runs]
    ends = [name == names[-1] for name in names]
    if any(ended and ids[run.stop] != frame for run, ended in zip(runs, ends, strict=True)):
        return None
    return [True, *ends[:-1]]


def tile_first(ids: Sequence[int], runs: Sequence[range]) -> list[bool] | None:
    """The same token precedes each part, followed by the part's name; each image begins with a part of the same name
    (Granite Docling)."""
    if _frame(ids, runs) is None:
        return None
    names = [ids[run.start - 1] for run in runs]
    return [name == names[0] for name in names]


def _frame(ids: Sequence[int], runs: Sequence[range]) -> int | None:
    """The token two before every part; None if it is not always the same one."""
    if runs[0].start < 2:
        return None
    found = {ids[run.start - 2] for run in runs}
    return found.pop() if len(found) == 1 else None


def _runs(mask: Tensor) -> list[range]:
    """The runs of True in (L,) `mask`."""
    columns = mask.nonzero()[:, 0].tolist()
    breaks = [0, *(place for place, (left, right) in enumerate(pairwise(columns), 1) if right > left + 1), len(columns)]
    return [range(columns[first], columns[last - 1] + 1) for first, last in pairwise(breaks) if last > first]


#: The rules that find the tokens of each image of a call, by their name in `families.py`.
IMAGE_LENGTHS: dict[str, ImageLengths] = {
    "": _grid,
    "equal": _by_argument("pixel_values", _equal),
    "anyres": _by_argument("image_sizes", _anyres),
    "pooled patches": _by_argument("image_position_ids", _pooled),
    "rows of patches": _by_argument("image_sizes", _pixtral),
    "two grids": _molmo,
    "local views": _by_argument("num_local_patches", _step),
    "separators": tile_lengths(one_between),
    "end token": tile_lengths(end_behind),
    "whole image last": tile_lengths(whole_last),
    "named tiles": tile_lengths(tile_first),
}


def video_frames(call: Mapping[str, Any], merged: int = 1) -> list[int] | None:
    """The number of frames of each video of a call, as the language model counts them; None if the call does not tell.

    The model merges `merged` frames into one (ERNIE 4.5 VL: 2).
    """
    grids, pixels, counts = map(call.get, ("video_grid_thw", "pixel_values_videos", "num_frames_per_video"))
    if counts is not None:
        return [int(frames) for frames in counts]
    if grids is not None:
        return [max(1, int(frames) // merged) for frames in grids[:, 0]]
    if pixels is not None and pixels.dim() >= 4:
        return [pixels.shape[1]] * len(pixels)
    return None


def frames_of_beams(frames: Sequence[int], video: Tensor, beams: int) -> list[int]:
    """Repeat `frames` of each video for a batch whose rows, with tokens `video` (B, L), are repeated `beams` times."""
    starts = video & ~torch.nn.functional.pad(video, (1, 0))[:, :-1]
    runs = starts.sum(1).tolist()[::beams]
    alone = sum(runs) == len(frames)  # each video is one run of tokens; otherwise each frame is one
    given, repeated = iter(frames), list[int]()
    for count in runs:
        mine: list[int] = []
        while (len(mine) if alone else sum(mine)) < count and (of_video := next(given, None)) is not None:
            mine.append(of_video)
        repeated += mine * beams
    return repeated


def group_tokens(
    grouping: str,
    visual: Tensor,
    video: Tensor,
    image_lengths: Sequence[int] | None,
    frames: Sequence[int] | None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The group of each visual token, numbered from 0 in each sample and ascending along the row.

    Args:
        grouping: "sample", "image" (each image and each video is a group) or "frame" (each image and each frame is).
        visual, video: (B, L) bool, the visual tokens, and those of videos.
        image_lengths: tokens of each image of the batch in order. If None, or if they do not fit, each run of tokens is
            an image.
        frames: number of frames of each video of the batch in order; None if unknown.
        lengths: tokens of each video of the batch in order; None if unknown. Lengths that do not fit are ignored.

    Returns:
        (B, L) long, 0 at text.
    """
    if grouping == "sample":
        return torch.zeros_like(visual, dtype=torch.long)
    video = video & visual
    number = _images(visual & ~video, image_lengths)
    number = torch.where(video, number.max() + 1 + _videos(video, frames, lengths, grouping == "frame"), number)
    return counted_along(number, visual)


def _images(image: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """(B, L) the number of each token's image, counted through the batch."""
    if lengths is None or sum(lengths) != int(image.sum()):
        return _run_numbers(image)
    numbers = torch.zeros_like(image, dtype=torch.long)
    numbers[image] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    return numbers


def _videos(video: Tensor, frames: Sequence[int] | None, lengths: Sequence[int] | None, by_frame: bool) -> Tensor:
    """(B, L) the number of each token's video, or frame, counted through the batch."""
    runs = _run_numbers(video)
    count = int(runs.max()) + 1 if video.any() else 0
    if frames is None and lengths is not None and sum(lengths) == int(video.sum()):
        if not by_frame:
            return _images(video, lengths)
        if _apart(video, runs, lengths):
            return runs
    if not count or (not by_frame and (frames is None or count != sum(frames))):
        return runs
    if frames is not None and count == sum(frames):  # a run is a frame, with timestamps between frames
        return runs if by_frame else torch.repeat_interleave(torch.arange(len(frames)), torch.tensor(frames))[runs]
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
    """True if each video of so many tokens consists of several runs of equal length: frames with timestamps between."""
    owner, of_run = _images(video, lengths)[video].tolist(), runs[video].tolist()
    sizes = [Counter(run for run, whose in zip(of_run, owner, strict=True) if whose == mine) for mine in set(owner)]
    return all(len(each) > 1 and len(set(each.values())) == 1 for each in sizes)


def _even(tokens: int, frames: int) -> Tensor:
    """(tokens,) the frame of each token of a contiguous video, which a newline may end."""
    size, rest = divmod(tokens, frames)
    if rest > 1 or not size:
        raise ValueError(
            f"per_frame=True: {tokens} tokens of a video of {frames} frames cannot be told apart; use per_image=True"
        )
    return (torch.arange(tokens) // size).clamp(max=frames - 1)


def _run_numbers(mask: Tensor) -> Tensor:
    """(B, L) the number of each column's run of True, counted through the batch; 0 elsewhere."""
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return ((starts.flatten().cumsum(0) - 1).view_as(mask) * mask).clamp(min=0)


def counted_along(number: Tensor, visual: Tensor) -> Tensor:
    """Renumber groups in the order in which they occur along each row."""
    groups = torch.zeros_like(number)
    for row, mask, numbers in zip(groups, visual, number, strict=True):
        row[mask] = torch.unique_consecutive(numbers[mask], return_inverse=True)[1]
    return groups
