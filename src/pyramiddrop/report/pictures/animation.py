"""GIFs: the stages of still pictures one after another, or a video with all stages side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pyramiddrop.report.pictures.figure_grid import Stage

#: Milliseconds for which a GIF shows a stage of stills, and a frame of a video.
STEP, FRAME = 900, 400
#: Pixels: the gap between pictures, the height of a heading, and its font size.
GAP, HEAD, LETTERS = 6, 24, 15


def step_through(stages: Sequence[Stage], path: Path) -> None:
    """Write one frame for each stage, with its pictures one below another."""
    _save([_headed(stage.head, _stacked(stage.panels)) for stage in stages], STEP, path)


def play(stages: Sequence[Stage], moments: Sequence[int | None], path: Path) -> None:
    """Write one frame for each moment of the video, with all stages side by side and still pictures below."""
    frames = []
    for moment in sorted({moment for moment in moments if moment is not None}):
        shown = [place for place, own in enumerate(moments) if own in (moment, None)]
        parts = [_headed(stage.head, _stacked([stage.panels[place] for place in shown])) for stage in stages]
        turned = _stacked([part.transpose(Image.Transpose.TRANSPOSE) for part in parts])
        frames.append(turned.transpose(Image.Transpose.TRANSPOSE))
    _save(frames, FRAME, path)


def _save(frames: Sequence[Image.Image], duration: int, path: Path) -> None:
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def _headed(head: str, pixels: Image.Image) -> Image.Image:
    font = ImageFont.load_default(LETTERS)
    width = max(pixels.width, int(font.getlength(head)) + 2 * GAP)
    whole = Image.new("RGB", (width, pixels.height + HEAD), "white")
    ImageDraw.Draw(whole).text((GAP, 3), head, fill="#333333", font=font)
    whole.paste(pixels, (0, HEAD))
    return whole


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    width, height = max(part.width for part in parts), sum(part.height + GAP for part in parts) - GAP
    whole, top = Image.new("RGB", (width, height), "white"), 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height + GAP
    return whole
