"""The verb `generate`: answer a question about pictures with any supported checkpoint under any method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pyramiddrop.cli.options import OUTPUT, WHAT, AsJson, MethodOptions, OneMethod, RequestOptions, with_groups
from pyramiddrop.cli.terminal import print_json, say, spinner, stdout
from pyramiddrop.inference import user_input

if TYPE_CHECKING:
    from pyramiddrop.inference.request import PreparedRequest, Run


@with_groups
def generate(
    *,
    prompt: Annotated[str, WHAT(help="The question.")],
    method: OneMethod = None,
    options: MethodOptions,
    request: RequestOptions,
    compare: Annotated[bool, OUTPUT("--compare", help="Answer without dropping too, and time both.")] = False,
    as_json: AsJson = False,
    overlay: Annotated[Path | None, OUTPUT(help="Draw the kept tokens over the picture into this file.")] = None,
) -> None:
    """Answer a question about pictures, and say what it cost.

    Without any option of a method: the one saved beside the checkpoint (pyramiddrop.json), or the paper's PyramidDrop.
    """
    from pyramiddrop.report.tables.runs import comparison_table, usage_line

    spec = options.spec(method)
    if overlay:
        from pyramiddrop.report.pictures.visual import check_drawn_method, check_picture_path, run_visual

        with user_input("--overlay"):
            if spec is not None:
                check_drawn_method(spec)
            check_picture_path(overlay)
    ready = request.prepare(prompt, spec)
    stream = sys.stdout.isatty() and not compare and not as_json
    done = _answer(ready, request.max_new_tokens, compare, stream)
    if overlay:
        with user_input(f"cannot draw {overlay}", (OSError, ValueError)):
            visual = run_visual(done)
            visual.save(overlay)
        say(f"overlay: {overlay}{f' ({visual.note})' if visual.note else ''}")
    if as_json:
        print_json({**done.as_dict(), "overlay": str(overlay) if overlay else None})
    elif done.comparison:
        stdout().print(comparison_table(done.comparison, done.method))
    else:
        if not stream:
            print(done.answer)
        say(usage_line(done.usage, done.vanilla), style="dim")


def _answer(ready: PreparedRequest, max_new_tokens: int, compare: bool, stream: bool) -> Run:
    from transformers import TextStreamer

    from pyramiddrop.inference.request import run, run_compared

    if compare:
        with spinner("answering without and with dropping, and timing both"):
            return run_compared(ready, max_new_tokens)
    tokenizer = ready.checkpoint.processor.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    return run(ready, max_new_tokens, streamer)
