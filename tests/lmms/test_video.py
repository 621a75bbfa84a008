"""`--video`, as a user types it: what is drawn is what the model saw, frame by frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pyramiddrop.cli.main import app
from qwen_checkpoints import CHAT_TEMPLATE, save_qwen

PROMPT = ["--prompt", "w7 w8 w9", "--max-new-tokens", "4", "--layers", "2,4", "--keep", "0.5,0.25"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("checkpoints") / "qwen", "qwen2_vl", CHAT_TEMPLATE)


def frame(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (56, 84, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GIF of 12 frames, five a second."""
    path = tmp_path_factory.mktemp("clips") / "clip.gif"
    frame(0).save(path, save_all=True, append_images=[frame(number) for number in range(1, 12)], duration=200)
    return path


@pytest.fixture(scope="module")
def film(clip: Path) -> Path:
    """A video file of 12 frames, four a second."""
    path = clip.with_name("film.mp4")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 4, (84, 56))
    for number in range(12):
        writer.write(np.asarray(frame(number)))
    writer.release()
    return path


def run_json(verb: str, *arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, [verb, *map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return dict(json.loads(result.stdout))


def test_what_is_drawn_of_a_video_is_what_the_trace_kept(qwen: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.png", tmp_path / "kept.gif", tmp_path / "kept.html"
    found = run_json("visualize", "--video", clip, "--frames", "6", "--model", qwen, *PROMPT, "--output", *out)
    assert found["video"] == {"path": str(clip), "frames": [0, 2, 4, 7, 9, 11]}
    assert [view["name"] for view in found["views"]] == ["frames 1-2", "frames 3-4", "frames 5-6"]
    counts = [found["visual_tokens"], *(stage["tokens"] for stage in found["stages"])]
    assert [sum(stage["placed"].values()) for stage in found["kept"]] == counts
    assert counts[0] > counts[1] > counts[2]
    assert all(path.stat().st_size for path in out)
    with Image.open(out[1]) as gif:
        assert gif.n_frames == 3  # type: ignore[attr-defined]


def test_images_stand_before_the_video(qwen: Path, clip: Path, tmp_path: Path) -> None:
    frame(20).save(tmp_path / "still.png")
    asked = ["--image", tmp_path / "still.png", "--video", clip, "--frames", "2", "--model", qwen, *PROMPT]
    found = run_json("visualize", *asked, "--output", tmp_path / "kept.png")
    assert [view["name"] for view in found["views"]] == ["picture", "frames 1-2"]
    assert sum(view["tokens"] for view in found["views"]) == found["visual_tokens"]


def test_generate_takes_a_video_file_and_a_folder_of_frames(qwen: Path, film: Path, tmp_path: Path) -> None:
    found = run_json("generate", "--video", film, "--frames", "4", "--model", qwen, *PROMPT)
    assert found["video"]["frames"] == [0, 4, 7, 11]
    assert found["answer"]
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(4):
        frame(number).save(folder / f"{number:02}.png")
    of_folder = run_json("generate", "--video", folder, "--frames", "4", "--model", qwen, *PROMPT)
    assert of_folder["visual_tokens"] == found["visual_tokens"]
    assert of_folder["images"] == []
    more = run_json("generate", "--video", film, "--model", qwen, *PROMPT)  # eight frames
    assert more["visual_tokens"] == 2 * found["visual_tokens"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_ways_to_write_a_video(tmp_path: Path, clip: Path, family: str) -> None:
    model = save_qwen(tmp_path / family, family, CHAT_TEMPLATE, patch=16 if family == "qwen3_vl" else 14)
    found = run_json(
        "visualize", "--video", clip, "--frames", "3", "--model", model, *PROMPT, "--output", tmp_path / "x.png"
    )
    assert [view["name"] for view in found["views"]] == ["frames 1-2", "frame 3"]
    assert sum(view["tokens"] for view in found["views"]) == found["visual_tokens"]


def test_a_file_that_is_no_video_is_one_line(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no film")
    result = CliRunner().invoke(app, ["generate", "--video", str(tmp_path / "film.mp4"), "--model", str(qwen), *PROMPT])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: cannot read the video {tmp_path / 'film.mp4'}: ")
    assert result.stderr.count("\n") == 1
