"""The verb `generate`: answer a question about pictures with any supported checkpoint under any method."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

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
from pyramiddrop.cli.terminal import remarks, results, waiting

if TYPE_CHECKING:
    from pyramiddrop.inference.request import PreparedRequest, Run


class SeveralImages(TyperCommand):
    """Lets `--image a.png b.png` mean `--image a.png --image b.png`, as a shell's `--image *.png` writes it."""

    SPREAD: tuple[str, ...] = ("--image",)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        spread: list[str] = []
        for word in args:
            option = spread[-2] if len(spread) >= 2 and spread[-2] in self.SPREAD else None
            spread += [option, word] if option and not word.startswith("-") else [word]
        return super().parse_args(ctx, spread)


def generate(
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="One or more pictures.", metavar="FILE...")] = None,
    video: Video = None,
    frames: Frames = 8,
    model: Model = None,
    method: Annotated[str | None, typer.Option(help="pyramiddrop, fastv, random, uniform or vanilla.")] = None,
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
    compare: Annotated[bool, typer.Option("--compare", help="Answer without dropping too, and time both.")] = False,
    as_json: AsJson = False,
    overlay: Annotated[Path | None, typer.Option(help="Draw the kept tokens over the picture into this file.")] = None,
) -> None:
    """Answer a question about pictures, and say what it cost.

    Without any option of a method: the one saved beside the checkpoint (pyramiddrop.json), or the paper's PyramidDrop.
    """
    from pyramiddrop.inference.choice import MethodOptions
    from pyramiddrop.inference.request import Request, prepare

    if overlay:
        _check_overlay(overlay, method)
    options = MethodOptions(method, lam, stages, layers, layer, keep, positions, score, reserve, random_from, merge)
    with waiting(f"loading {model or 'the bundled model'}"):
        ready = prepare(Request(prompt, tuple(image or ()), model, options, device, dtype, video, frames))
    for remark in ready.remarks:
        remarks().print(f"warning: {remark}", soft_wrap=True)
    stream = sys.stdout.isatty() and not compare and not as_json
    done = _answer(ready, max_new_tokens, compare, stream)
    if overlay:
        _draw(done, overlay)
    if as_json:
        print(json.dumps({**done.as_dict(), "overlay": str(overlay) if overlay else None}, indent=2))
    else:
        _show(done, streamed=stream)


def _check_overlay(path: Path, method: str | None) -> None:
    from pyramiddrop.inference.errors import user_input
    from pyramiddrop.report.pictures.visual import check_drawn_method, check_picture_path

    with user_input("--overlay"):
        check_drawn_method(method)
        check_picture_path(path)


def _answer(ready: PreparedRequest, max_new_tokens: int, compare: bool, stream: bool) -> Run:
    from transformers import TextStreamer

    from pyramiddrop.inference.request import run, run_compared

    if compare:
        with waiting("answering without and with dropping, and timing both"):
            return run_compared(ready, max_new_tokens)
    tokenizer = ready.checkpoint.processor.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    return run(ready, max_new_tokens, streamer)


def _draw(done: Run, path: Path) -> None:
    from pyramiddrop.inference.errors import user_input
    from pyramiddrop.report.pictures.visual import run_visual

    with user_input(f"cannot draw {path}", (OSError, ValueError)):
        visual = run_visual(done)
        visual.save(path)
    remarks().print(f"overlay: {path}{f' ({visual.note})' if visual.note else ''}", soft_wrap=True)


def _show(done: Run, streamed: bool) -> None:
    from pyramiddrop.report.tables.runs import comparison_table, usage_line

    if done.comparison:
        results().print(comparison_table(done.comparison, done.method))
        return
    if not streamed:
        print(done.answer)
    remarks().print(usage_line(done.usage, done.vanilla), style="dim", soft_wrap=True)
