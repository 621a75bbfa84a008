"""Videos as frames: which ones are taken, what a processor is told of them, and one line for what cannot be read."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest
from PIL import Image

from pyramiddrop.inference import InputError
from pyramiddrop.inference import video as film
from pyramiddrop.inference.video import check_video, default_metadata, open_video


def frame(number: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, (20 * number, 0, 0))


def reds(frames: list[Image.Image]) -> list[int]:
    """The frames' numbers, by their colours."""
    return [round(one.getpixel((0, 0))[0] / 20) for one in frames]  # type: ignore[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "frames"
    path.mkdir()
    for number in (3, 1, 0, 4, 2):
        frame(number).save(path / f"frame-{number}.png")
    (path / "notes.txt").write_text("no frame")
    return path


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_moving_picture_tells_its_time(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    frame(0).save(path, save_all=True, append_images=[frame(number) for number in range(1, 10)], duration=250)
    found = open_video(path, 4)
    assert reds(found.frames) == [0, 3, 6, 9]
    assert found.metadata == {"total_num_frames": 10, "fps": 4.0, "frames_indices": [0, 3, 6, 9], "duration": 2.5}


def test_a_folders_frames_come_by_their_names(folder: Path) -> None:
    found = open_video(folder, 3)
    assert reds(found.frames) == [0, 2, 4]
    assert found.metadata == {"total_num_frames": 5, "fps": 1.0, "frames_indices": [0, 2, 4], "duration": 5.0}


def test_a_short_video_is_taken_whole(folder: Path) -> None:
    assert reds(open_video(folder, 99).frames) == [0, 1, 2, 3, 4]
    assert reds(open_video(folder, 1).frames) == [0]


def test_frames_without_times_count_as_one_a_second() -> None:
    assert default_metadata(3) == {"total_num_frames": 3, "fps": 1.0, "frames_indices": [0, 1, 2], "duration": 3.0}


def test_what_is_no_video_says_so_in_one_line(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still, film_file, empty = tmp_path / "still.png", tmp_path / "film.mp4", tmp_path / "empty"
    frame(0).save(still)
    film_file.write_bytes(b"no film")
    empty.mkdir()
    frame(5, (9, 6)).save(folder / "frame-5.png")
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    for path, message in (
        (tmp_path / "gone.mp4", "no such video"),
        (empty, "no pictures in the folder"),
        (still, "does not move; give it as --image"),
        (folder, "have 2 sizes, 8x6 for one"),
        (film_file, r"no decoder is installed \(pip install av\)"),
    ):
        with pytest.raises(InputError, match=message):
            open_video(path, 8)


def test_a_family_of_images_and_a_machine_without_torchvision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film, "is_torchvision_available", lambda: False)
    with pytest.raises(InputError, match="model family 'llava' of here takes no videos"):
        check_video("llava", "here")
    with pytest.raises(InputError, match=r"needs torchvision for videos.*pip install torchvision"):
        check_video("qwen2_vl", "here")
    monkeypatch.setattr(film, "is_torchvision_available", lambda: True)
    check_video("qwen2_vl", "here")
