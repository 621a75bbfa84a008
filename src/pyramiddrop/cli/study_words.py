"""Owns the options that all studies share: what is asked of which model, how, and where the results go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WHAT, _HOW, _OUT = "What is asked", "How", "Output"

Output = Annotated[
    Path,
    typer.Option(
        help="Folder for the page, the figures and the numbers. A study that was stopped goes on there.",
        rich_help_panel=_OUT,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=_OUT)]
Data = Annotated[
    Path | None,
    typer.Option(help="JSON or JSONL file of questions about pictures. (default: digits)", rich_help_panel=_WHAT),
]
Images = Annotated[Path | None, typer.Option(help="Folder of the pictures of --data.", rich_help_panel=_WHAT)]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many samples.", rich_help_panel=_WHAT)]
Split = Annotated[str | None, typer.Option(help="Of the digits: test or val. (default: test)", rich_help_panel=_WHAT)]
Scenes = Annotated[
    int | None,
    typer.Option(min=1, help="Of the digits: pictures, with 16 questions each. (default: 40)", rich_help_panel=_WHAT),
]
Seed = Annotated[int | None, typer.Option(help="Of the digits' scenes. (default: 0)", rich_help_panel=_WHAT)]
Match = Annotated[
    str, typer.Option(help="When an answer is right: exact, same (to the letter) or vqa.", rich_help_panel=_HOW)
]
Batch = Annotated[int, typer.Option(min=1, help="Samples of one forward.", rich_help_panel=_HOW)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=_HOW)]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu. (default: the best there is)", rich_help_panel=_HOW)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16, bfloat16, auto. (default: fits the device)", rich_help_panel=_HOW),
]
