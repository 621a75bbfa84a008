"""The verb `visualize`: draw what each drop kept of the pictures and how it scored them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyramiddrop.cli.asking import AsJson, Device, Dtype, Frames, MaxNewTokens, Model, Video
from pyramiddrop.cli.dropping import (
    Keep,
    Lam,
    Layer,
    Layers,
    Merge,
    Positions,
    RandomFrom,
    Reserve,
    Score,
    Stages,
)
from pyramiddrop.cli.generate import SeveralImages
from pyramiddrop.cli.terminal import remarks, results, waiting

if TYPE_CHECKING:
    from pyramiddrop.inference.request import Run
    from pyramiddrop.report import Visual


class SeveralFiles(SeveralImages):
    """Takes several files after `--image` and after `--output`."""

    SPREAD = ("--image", "--output")


def visualize(
    prompt: Annotated[str | None, typer.Option(help="The question. (default: one of the bundled picture's)")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="One or more pictures. (default: a bundled one)", metavar="FILE...")
    ] = None,
    video: Video = None,
    frames: Frames = 8,
    model: Model = None,
    method: Annotated[str | None, typer.Option(help="pyramiddrop, fastv, random or uniform.")] = None,
    lam: Lam = None,
    stages: Stages = None,
    layers: Layers = None,
    layer: Layer = None,
    keep: Keep = None,
    positions: Positions = None,
    score: Score = None,
    reserve: Reserve = None,
    random_from: RandomFrom = None,
    merge: Merge = None,
    max_new_tokens: MaxNewTokens = 128,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(help="html, png, svg, pdf or gif by suffix. (default: kept.html kept.png)", metavar="FILE..."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Draw a heat map of each stage's scores into this file.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw which visual tokens each stage keeps over the pictures.

    Without any option: the bundled model, one of its pictures, and a question about it.
    """
    from pyramiddrop.inference.choice import MethodOptions
    from pyramiddrop.inference.request import Request, prepare, run

    outputs = output or [Path("kept.html"), Path("kept.png")]
    _check(outputs, scores, prompt, bool(image or video), method)
    prompt, image = _asked(prompt, image, video)
    options = MethodOptions(method, lam, stages, layers, layer, keep, positions, score, reserve, random_from, merge)
    with waiting(f"loading {model or 'the bundled model'}"):
        ready = prepare(Request(prompt, tuple(image), model, options, device, dtype, video, frames))
    for remark in ready.remarks:
        remarks().print(f"warning: {remark}", soft_wrap=True)
    with waiting("answering"):
        done = run(ready, max_new_tokens)
    visual = _draw(done, outputs, scores)
    written = [str(path) for path in [*outputs, *([scores] if scores else [])]]
    if as_json:
        print(json.dumps({**done.as_dict(), **visual.as_dict(), "files": written}, indent=2))
    else:
        _show(visual, done, written)


def _check(outputs: list[Path], scores: Path | None, prompt: str | None, shown: bool, method: str | None) -> None:
    from pyramiddrop.inference.errors import InputError, user_input
    from pyramiddrop.report.pictures.visual import check_drawn_method, check_picture_path

    if shown and prompt is None:
        raise InputError("--image and --video need a question about it (--prompt)")
    with user_input():
        check_drawn_method(method)
        for path in outputs:
            check_picture_path(path)
        if scores:
            check_picture_path(scores, scores=True)


def _asked(prompt: str | None, image: list[Path] | None, video: Path | None) -> tuple[str, list[Path]]:
    """What the user asked, or what the bundled picture's first question asks."""
    from pyramiddrop.assets import demo_images, demo_questions

    pictures = image or ([] if video else demo_images()[:1])
    return prompt if prompt is not None else demo_questions()[pictures[0].name][0]["question"], pictures


def _draw(done: Run, outputs: list[Path], scores: Path | None) -> Visual:
    from pyramiddrop.inference.errors import user_input
    from pyramiddrop.report.pictures.visual import run_visual

    with user_input("cannot draw", (OSError, ValueError)):
        visual = run_visual(done)
        for path in outputs:
            visual.save(path)
        if scores:
            visual.save(scores, scores=True)
    return visual


def _show(visual: Visual, done: Run, written: list[str]) -> None:
    from pyramiddrop.report.tables.style import new_table

    table = new_table("layers", "visual tokens")
    for span in visual.spans:
        table.add_row(span.layers, str(span.tokens))
    results().print(table)
    print(done.answer)
    if visual.note:
        remarks().print(visual.note, soft_wrap=True)
    for path in written:
        print(path)
