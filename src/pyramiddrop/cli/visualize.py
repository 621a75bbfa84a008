"""The verb `visualize`: draw what each drop kept of the pictures and how it scored them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyramiddrop.cli.options import OUTPUT, WHAT, AsJson, MethodOptions, OneMethod, RequestOptions, with_groups
from pyramiddrop.cli.terminal import spinner, stderr, stdout

if TYPE_CHECKING:
    from pyramiddrop.inference.request import Run
    from pyramiddrop.report import Visual


@with_groups
def visualize(
    *,
    prompt: Annotated[
        str | None, typer.Option(help="The question. (default: one of the bundled picture's)", rich_help_panel=WHAT)
    ] = None,
    method: OneMethod = None,
    options: MethodOptions,
    request: RequestOptions,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            help="html, png, svg, pdf or gif by suffix. (default: kept.html kept.png)",
            metavar="FILE...",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Draw a heat map of each stage's scores into this file.", metavar="FILE", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw over the pictures which visual tokens each stage keeps.

    Without any option: the bundled model, one of its pictures, and a question about it.
    """
    from pyramiddrop.inference.request import run

    outputs, spec = output or [Path("kept.html"), Path("kept.png")], options.spec(method)
    _check(outputs, scores, prompt, bool(request.image or request.video), spec)
    prompt, image = _asked(prompt, request.image, request.video)
    ready = replace(request, image=image).prepare(prompt, spec)
    with spinner("answering"):
        done = run(ready, request.max_new_tokens)
    visual = _draw(done, outputs, scores)
    written = [str(path) for path in [*outputs, *([scores] if scores else [])]]
    if as_json:
        print(json.dumps({**done.as_dict(), **visual.as_dict(), "files": written}, indent=2))
    else:
        _show(visual, done, written)


def _check(outputs: list[Path], scores: Path | None, prompt: str | None, shown: bool, spec: str | None) -> None:
    from pyramiddrop.inference import InputError, user_input
    from pyramiddrop.report.pictures.visual import check_drawn_method, check_picture_path

    if shown and prompt is None:
        raise InputError("--image and --video need a question about it (--prompt)")
    with user_input():
        if spec is not None:
            check_drawn_method(spec)
        for path in outputs:
            check_picture_path(path)
        if scores:
            check_picture_path(scores, scores=True)


def _asked(prompt: str | None, image: list[Path] | None, video: Path | None) -> tuple[str, list[Path]]:
    """The user's question, or the first question of the bundled picture."""
    from pyramiddrop.assets import demo_images, demo_questions

    pictures = image or ([] if video else demo_images()[:1])
    return prompt if prompt is not None else demo_questions()[pictures[0].name][0]["question"], pictures


def _draw(done: Run, outputs: list[Path], scores: Path | None) -> Visual:
    from pyramiddrop.inference import user_input
    from pyramiddrop.report.pictures.visual import run_visual

    with user_input("cannot draw", (OSError, ValueError)):
        visual = run_visual(done)
        for path in outputs:
            visual.save(path)
        if scores:
            visual.save(scores, scores=True)
    return visual


def _show(visual: Visual, done: Run, written: list[str]) -> None:
    from pyramiddrop.report.tables import new_table

    table = new_table("layers", "visual tokens")
    for stage in visual.stages:
        table.add_row(stage.layers, str(stage.tokens))
    stdout().print(table)
    print(done.answer)
    if visual.note:
        stderr().print(visual.note, soft_wrap=True)
    for path in written:
        print(path)
