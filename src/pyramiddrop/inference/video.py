"""Read a video as evenly spaced frames, from a video file, an animated picture or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers.utils import is_torchvision_available

from pyramiddrop.families import FAMILIES
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.prompt import Video, open_picture, to_rgb

#: Decoders of video files that Transformers can call, in the order of trial: their name there, and their module.
DECODERS = {"pyav": "av", "torchcodec": "torchcodec", "decord": "decord", "opencv": "cv2"}
#: Frames a second, if a video does not tell.
UNTOLD = 1.0


def open_video(path: Path, count: int) -> Video:
    """Read `count` evenly spaced frames of a video, or all if it has fewer. Raises InputError if the path does not
    exist or cannot be read, no decoder for it is installed, or frames differ in size.

    Args:
        path: a video file, an animated picture (GIF, WebP, PNG), or a folder of frames in the order of their names.
        count: at least 1.
    """
    if not path.exists():
        raise InputError(f"no such video: {path}")
    video = _folder(path, count) if path.is_dir() else _moving_picture(path, count) or _video_file(path, count)
    sizes = {frame.size for frame in video.frames}
    if len(sizes) > 1:
        width, height = sorted(sizes)[0]
        raise InputError(f"the frames of {path} have {len(sizes)} sizes, {width}x{height} for one; a video has one")
    return video


def check_video(family: str, source: str | Path) -> None:
    """Raise InputError if the model `source` does not take videos, or cannot on this machine."""
    if family in FAMILIES and "video" not in FAMILIES[family].modalities:
        raise InputError(f"model family {family!r} of {source} takes no videos; give it frames as --image")
    if not is_torchvision_available():
        raise InputError("Transformers needs torchvision for videos, and it is not installed (pip install torchvision)")


def default_metadata(count: int) -> dict[str, Any]:
    """The `video_metadata` of so many frames without timestamps."""
    return _metadata(count, range(count), UNTOLD)


def _metadata(total: int, taken: Sequence[int], rate: float) -> dict[str, Any]:
    return {"total_num_frames": total, "fps": rate, "frames_indices": list(taken), "duration": total / rate}


def _spaced(total: int, count: int) -> list[int]:
    return [int(place) for place in np.linspace(0, total - 1, min(count, total)).round()]


def _folder(path: Path, count: int) -> Video:
    known = Image.registered_extensions()
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
    if not files:
        raise InputError(f"no pictures in the folder {path}")
    taken = _spaced(len(files), count)
    return Video([open_picture(files[place]) for place in taken], _metadata(len(files), taken, UNTOLD))


def _moving_picture(path: Path, count: int) -> Video | None:
    """None for a file that is no picture."""
    try:
        picture = Image.open(path)
    except UnidentifiedImageError:
        return None
    with picture, user_input(f"cannot read the video {path}", (OSError, SyntaxError, ValueError)):
        total = getattr(picture, "n_frames", 1)
        if total == 1:
            raise InputError(f"{path} is a picture that does not move; give it as --image")
        frames, milliseconds = {}, 0.0
        taken = _spaced(total, count)
        for place in range(total):
            picture.seek(place)
            picture.load()  # WebP gives a frame's duration only after loading it
            milliseconds += picture.info.get("duration", 0)
            if place in taken:
                frames[place] = to_rgb(picture)
    rate = 1000 * total / milliseconds if milliseconds else UNTOLD
    return Video([frames[place] for place in taken], _metadata(total, taken, rate))


def _video_file(path: Path, count: int) -> Video:
    from importlib.util import find_spec

    from transformers.video_utils import load_video

    decoder = next((name for name, module in DECODERS.items() if find_spec(module) is not None), None)
    if decoder is None:
        raise InputError(
            f"cannot read the video {path}: no decoder is installed (pip install av); "
            "an animated GIF or WebP or a folder of frames needs none"
        )

    def places(metadata: Any, **_: Any) -> list[int]:
        return _spaced(metadata.total_num_frames, count)

    with user_input(f"cannot read the video {path}", (Exception,)):  # each decoder raises its own errors
        pixels, told = load_video(str(path), backend=decoder, sample_indices_fn=places)
        if not len(pixels):
            raise InputError(f"there is no frame in {path}")
        taken = [int(place) for place in told.frames_indices]
        metadata = _metadata(int(told.total_num_frames), taken, float(told.fps or UNTOLD))
        return Video([Image.fromarray(np.asarray(frame)) for frame in pixels], metadata)
