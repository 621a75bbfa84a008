"""Who shares a quota, on rows short enough to number by hand. i: image, v: video, a dot: text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pyramiddrop.hf.images import frames_of_beams, group_tokens, video_frames


def groups(
    grouping: str,
    rows: Sequence[str],
    lengths: Sequence[int] | None = None,
    frames: Sequence[int] | None = None,
    encoded: Sequence[int] | None = None,
) -> list[str]:
    """The group of each token of rows as "..iivv.", a dot at text."""
    visual, video = (torch.tensor([[token in kinds for token in row] for row in rows]) for kinds in ("iv", "v"))
    found = group_tokens(grouping, visual, video, lengths, frames, encoded)
    assert found.dtype == torch.long
    assert bool((found[~visual] == 0).all())
    return [
        "".join(str(int(number)) if eye else "." for number, eye in zip(row, eyes, strict=True))
        for row, eyes in zip(found, visual, strict=True)
    ]


def test_a_sample_is_one_group() -> None:
    assert groups("sample", [".ii.vv.i"], [2, 1], [2]) == [".00.00.0"]


# --- One quota an image ---------------------------------------------------------------------------------------------


def test_runs_are_images_where_no_lengths_are_known() -> None:
    assert groups("image", [".ii.iii.i."]) == [".00.111.2."]


def test_images_that_touch_are_told_apart_by_their_lengths() -> None:
    assert groups("image", [".iiiii.i."], [2, 3, 1]) == [".00111.2."]


def test_an_image_in_several_runs_is_one() -> None:
    assert groups("image", [".ii.ii.ii."], [4, 2]) == [".00.00.11."]


def test_lengths_that_do_not_fit_are_not_believed() -> None:
    assert groups("image", [".ii.iii."], [2, 2]) == [".00.111."]


def test_lengths_go_on_through_the_batch_and_groups_start_anew_in_each_row() -> None:
    assert groups("image", [".iiii..", "..iii.i"], [2, 2, 3, 1]) == [".0011..", "..000.1"]


def test_a_run_ends_with_its_row() -> None:
    assert groups("image", ["..ii", "ii.i"]) == ["..00", "00.1"]
    assert groups("frame", ["..vv", "vv.v"], None, [1, 1, 1]) == ["..00", "00.1"]


def test_a_video_is_a_group_though_timestamps_stand_between_its_frames() -> None:
    assert groups("image", [".vv.vv.vv.vv.vv."], None, [3, 2]) == [".00.00.00.11.11."]


def test_a_video_without_gaps_is_a_group() -> None:
    assert groups("image", [".vvvvvv.vvvv."], None, [3, 2]) == [".000000.1111."]


def test_images_and_videos_side_by_side_are_told_apart() -> None:
    assert groups("image", [".iivviiii."], [2, 1, 3], [1]) == [".00112333."]


def test_runs_of_a_video_of_unknown_frames_are_groups() -> None:
    assert groups("image", [".vv.vv."]) == [".00.11."]


# --- One quota a frame ----------------------------------------------------------------------------------------------


def test_with_timestamps_between_a_run_is_a_frame() -> None:
    assert groups("frame", [".vv.vv.vvv."], None, [3]) == [".00.11.222."]


def test_a_video_without_gaps_is_cut_evenly() -> None:
    assert groups("frame", [".vvvvvv."], None, [3]) == [".001122."]


def test_a_newline_behind_the_last_frame_belongs_to_it() -> None:
    assert groups("frame", [".vvvvvvv."], None, [3]) == [".0011222."]


def test_a_video_of_one_frame() -> None:
    assert groups("frame", [".vvv.vv."], None, [1, 1]) == [".000.11."]
    assert groups("frame", [".vv.vvvv."], None, [1, 2]) == [".00.1122."]


def test_videos_of_one_frame_that_are_encoded_already() -> None:
    """Their lengths alone are known: a run may be one frame or several without a gap."""
    assert groups("image", [".vvv.vv."], None, [1, 1]) == [".000.11."]
    assert groups("image", [".vvv.vv."], encoded=[3, 2]) == [".000.11."]
    assert groups("image", [".vv.vv.vvv."], encoded=[4, 3]) == [".00.00.111."]
    assert groups("frame", [".vv.vv.vvv.vvv."], encoded=[4, 6]) == [".00.11.222.333."]
    for lengths in ([3, 2], [3]):
        rows = [".vvv.vv."] if len(lengths) > 1 else [".vvv."]
        with pytest.raises(ValueError, match="do not tell where its frames"):
            groups("frame", rows, encoded=lengths)


def test_frames_of_beams_of_videos_of_one_frame() -> None:
    """Row by row, each repeated: two videos of one frame, then one of one."""
    video = torch.tensor([[token == "v" for token in row] for row in (".vv.vv.", ".vv.vv.", "...vv..", "...vv..")])
    assert frames_of_beams([1, 1, 1], video, 2) == [1, 1, 1, 1, 1, 1]
    assert frames_of_beams([1, 2, 1], video, 2) == [1, 2, 1, 2, 1, 1]
    assert frames_of_beams([2, 1], video, 2) == [2, 2, 1, 1]
    assert frames_of_beams([2, 1, 1], video, 2) == [2, 1, 2, 1, 1, 1]


def test_videos_of_a_batch_without_gaps() -> None:
    assert groups("frame", [".vvvv..", ".vvvvvv"], None, [2, 3]) == [".0011..", ".001122"]


def test_images_and_videos_mixed_in_a_batch() -> None:
    rows = [".ii.vv.vv..", "vv.vv.iii.i", "...........", "...i......."]
    assert groups("frame", rows, [2, 3, 1, 1], [2, 2]) == [".00.11.22..", "00.11.222.3", "...........", "...0......."]


def test_images_in_frames_mode_keep_their_lengths() -> None:
    assert groups("frame", [".iiii.vvvv."], [2, 2], [2]) == [".0011.2233."]


@pytest.mark.parametrize("frames", [None, [2], [4, 5]])
def test_frames_that_cannot_be_told_apart_are_refused(frames: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"per_frame=True: this call's 3 runs of video tokens .* use per_image=True"):
        groups("frame", [".vv.vv.vv."], None, frames)


def test_a_video_that_cannot_be_cut_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="per_frame=True: 8 tokens of a video of 3 frames"):
        groups("frame", [".vvvvvvvv."], None, [3])


def test_images_alone_need_no_frames() -> None:
    assert groups("frame", [".ii.i."]) == [".00.1."]
    assert groups("frame", ["...."]) == ["...."]


# --- What a call tells ----------------------------------------------------------------------------------------------


def pixels(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.zeros(shape)}


def test_frames_are_in_the_grid_or_in_the_pixels() -> None:
    assert video_frames({"video_grid_thw": torch.tensor([[3, 4, 4], [2, 4, 6]])}) == [3, 2]
    assert video_frames({"video_grid_thw": torch.tensor([[3, 4, 4]])} | pixels(48, 1176)) == [3]
    assert video_frames(pixels(2, 5, 3, 8, 8)) == [5, 5]
    assert video_frames({"num_frames_per_video": torch.tensor([4, 1])}) == [4, 1]
    assert video_frames(pixels(48, 1176)) is None
    assert video_frames({}) is None


def test_frames_that_the_model_merges_are_at_least_one() -> None:
    assert video_frames({"video_grid_thw": torch.tensor([[1, 4, 4], [5, 4, 4], [2, 4, 4]])}, merged=2) == [1, 2, 1]
