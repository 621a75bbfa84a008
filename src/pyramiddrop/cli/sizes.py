"""Options for the sizes of a model and of a prompt, shared by `cost` and `plan`."""

from __future__ import annotations

from typing import Annotated

import typer

SIZES, PROMPT = "Sizes of the model (one source)", "The prompt"

Shape = Annotated[
    str | None,
    typer.Option("--shape", "--preset", help="A named shape. (default: llava-1.5-7b)", rich_help_panel=SIZES),
]
Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of a checkpoint; only its config.json is read.", rich_help_panel=SIZES),
]
Layers = Annotated[int | None, typer.Option(help="Decoder layers.", rich_help_panel=SIZES)]
Hidden = Annotated[int | None, typer.Option(help="Width of the hidden states.", rich_help_panel=SIZES)]
Intermediate = Annotated[int | None, typer.Option(help="Width of the gated MLP.", rich_help_panel=SIZES)]
Heads = Annotated[int | None, typer.Option(help="Query heads. (default: 128 wide)", rich_help_panel=SIZES)]
KvHeads = Annotated[
    int | None, typer.Option(help="Key and value heads. (default: as many as heads)", rich_help_panel=SIZES)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of the KV cache. (default: the checkpoint's, or bfloat16)", rich_help_panel=SIZES),
]
VisualTokens = Annotated[int | None, typer.Option(help="Visual tokens. (default: the shape's)", rich_help_panel=PROMPT)]
TextTokens = Annotated[int | None, typer.Option(help="All other tokens. (default: 64)", rich_help_panel=PROMPT)]
Crops = Annotated[
    int | None,
    typer.Option(help="What the vision tower sees. (default: as the tokens need)", rich_help_panel=PROMPT),
]
