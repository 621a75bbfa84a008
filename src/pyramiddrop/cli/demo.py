"""The verb `demo`: ask the bundled model about bundled pictures, with and without dropping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyramiddrop.cli.options import AsJson
from pyramiddrop.cli.terminal import spinner, stdout


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the page and the overlays.")] = Path("demo"),
    questions: Annotated[int, typer.Option(min=1, help="How many of the bundled questions to ask.")] = 6,
    as_json: AsJson = False,
) -> None:
    """See PyramidDrop answer questions about pictures: offline, in about a minute, nothing to download.

    Writes a page (index.html) and an overlay for each question: which patches of the picture are still there, stage by
    stage.
    """
    from pyramiddrop.inference import user_input
    from pyramiddrop.inference.demo import run_demo
    from pyramiddrop.report.demo import write_demo
    from pyramiddrop.report.tables.runs import OWN_MODEL, costs_table, failures, questions_table, summary

    with user_input(f"cannot write into {output}", (OSError,)):
        output.mkdir(parents=True, exist_ok=True)
    with spinner("starting") as progress:
        done = run_demo(questions, progress)
        progress("drawing")
        with user_input(f"cannot write into {output}", (OSError,)):
            written = write_demo(done, output)
    if as_json:
        print(
            json.dumps(
                {**done.as_dict(), "page": str(written.page), "overlays": [str(path) for path in written.overlays]},
                indent=2,
            )
        )
        return
    console = stdout()
    for part in (questions_table(done), costs_table(done), *summary(done), *failures(done)):
        console.print(part)
        console.print()
    console.print(f"page:     {written.page}\noverlays: {output}/*.png\nyour own: {OWN_MODEL}", soft_wrap=True)
