"""Options that all studies share: questions, models, and the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHAT, HOW, OUTPUT = "What is asked", "How", "Output"

Output = Annotated[
    Path,
    typer.Option(
        help="Folder for the page, the figures and the numbers. A study that was stopped goes on there.",
        rich_help_panel=OUTPUT,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT)]
Tasks = Annotated[
    str | None, typer.Option(help="A bundled benchmark: digits or reader. (default: digits)", rich_help_panel=WHAT)
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Questions of your own: JSON or JSON lines. (default: a bundled benchmark)", rich_help_panel=WHAT
    ),
]
Images = Annotated[
    Path | None, typer.Option(help="Folder of the pictures of --data. (default: its own)", rich_help_panel=WHAT)
]
Metric = Annotated[str | None, typer.Option(help="Of --data: exact or vqa. (default: exact)", rich_help_panel=WHAT)]
Split = Annotated[
    str | None, typer.Option(help="Of --tasks: test, val or train. (default: test)", rich_help_panel=WHAT)
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the pictures of --tasks. (default: 0)", rich_help_panel=WHAT)]
Limit = Annotated[int | None, typer.Option(help="Ask so many questions at most.", rich_help_panel=WHAT)]
Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of a checkpoint. (default: the bundled one)", rich_help_panel=WHAT),
]
Batch = Annotated[int, typer.Option(min=1, help="Questions of one forward.", rich_help_panel=HOW)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=HOW)]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. (default: the best there is)", rich_help_panel=HOW)]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16, bfloat16, auto. (default: fits the device)", rich_help_panel=HOW),
]
