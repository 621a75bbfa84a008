"""The verb `demo`: ask the bundled model about bundled pictures, with and without dropping."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyramiddrop.cli.options import AsJson
from pyramiddrop.cli.terminal import make_folder, print_json, print_parts, spinner, stdout
from pyramiddrop.inference import user_input


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the page and the overlays.")] = Path("demo"),
    questions: Annotated[int, typer.Option(min=1, help="How many of the bundled questions to ask.")] = 6,
    as_json: AsJson = False,
) -> None:
    """See PyramidDrop answer questions about pictures: offline, in about a minute, nothing to download.

    Writes a page (index.html) and an overlay for each question: which patches of the picture are still there, stage by
    stage.
    """
    from pyramiddrop.inference.demo import run_demo
    from pyramiddrop.report.demo_page import write_demo
    from pyramiddrop.report.tables.runs import OWN_MODEL, costs_table, failures, questions_table, summary

    make_folder(output)
    with spinner("starting") as progress:
        done = run_demo(questions, progress)
        progress("drawing")
        with user_input(f"cannot write into {output}", (OSError,)):
            page, overlays = write_demo(done, output)
    if as_json:
        print_json({**done.as_dict(), "page": str(page), "overlays": list(map(str, overlays))})
        return
    print_parts([questions_table(done), costs_table(done), *summary(done), *failures(done)])
    stdout().print(f"page:     {page}\noverlays: {output}/*.png\nyour own: {OWN_MODEL}", soft_wrap=True)
