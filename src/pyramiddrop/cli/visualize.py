"""The verb `visualize`: draw what each drop kept of the pictures and how it scored them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pyramiddrop.cli.options import OUTPUT, WHAT, AsJson, MethodOptions, OneMethod, RequestOptions, with_groups
from pyramiddrop.cli.terminal import print_json, say, spinner, stdout
from pyramiddrop.inference import InputError, user_input


@with_groups
def visualize(
    *,
    prompt: Annotated[str | None, WHAT(help="The question. (default: one of the bundled picture's)")] = None,
    method: OneMethod = None,
    options: MethodOptions,
    request: RequestOptions,
    output: Annotated[
        list[Path] | None,
        OUTPUT(help="html, png, svg, pdf or gif by suffix. (default: kept.html kept.png)", metavar="FILE..."),
    ] = None,
    scores: Annotated[
        Path | None, OUTPUT(help="Draw a heat map of each stage's scores into this file.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw over the pictures which visual tokens each stage keeps.

    Without any option: the bundled model, one of its pictures, and a question about it.
    """
    from pyramiddrop.assets import demo_images, demo_questions
    from pyramiddrop.inference.request import run
    from pyramiddrop.report.pictures.visual import check_drawn_method, check_picture_path, run_visual
    from pyramiddrop.report.tables import new_table

    outputs, spec = output or [Path("kept.html"), Path("kept.png")], options.spec(method)
    if prompt is None and (request.image or request.video):
        raise InputError("--image and --video need a question about it (--prompt)")
    with user_input():
        if spec is not None:
            check_drawn_method(spec)
        for path in outputs:
            check_picture_path(path)
        if scores:
            check_picture_path(scores, scores=True)
    image = request.image or ([] if request.video else demo_images()[:1])
    if prompt is None:
        prompt = demo_questions()[image[0].name][0]["question"]
    ready = replace(request, image=image).prepare(prompt, spec)
    with spinner("answering"):
        done = run(ready, request.max_new_tokens)
    with user_input("cannot draw", (OSError, ValueError)):
        visual = run_visual(done)
        for path in outputs:
            visual.save(path)
        if scores:
            visual.save(scores, scores=True)
    written = [str(path) for path in [*outputs, *([scores] if scores else [])]]
    if as_json:
        print_json({**done.as_dict(), **visual.as_dict(), "files": written})
        return
    rows = [(stage.layers, str(stage.tokens)) for stage in visual.stages]
    stdout().print(new_table("layers", "visual tokens", rows=rows))
    print(done.answer)
    if visual.note:
        say(visual.note)
    print(*written, sep="\n")
