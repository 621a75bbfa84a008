"""Options that choose the model and the answer, shared by `generate` and `visualize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Video = Annotated[
    Path | None, typer.Option(help="A video file, an animated GIF or WebP, or a folder of frames.", metavar="PATH")
]
Frames = Annotated[int, typer.Option(min=1, help="How many evenly spaced frames of the video.")]
Model = Annotated[str | None, typer.Option(help="Folder or hub name of a checkpoint. (default: the bundled one)")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. (default: the best there is)")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16, bfloat16, auto. (default: fits the device)")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
