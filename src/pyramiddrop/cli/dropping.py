"""Options of a method, shared by `generate`, `visualize` and `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

Lam = Annotated[float | None, typer.Option(help="λ: the share that each drop leaves of what was there.")]
Stages = Annotated[int | None, typer.Option(help="Cut the model's layers into so many equal stages.")]
Layers = Annotated[str | None, typer.Option(help="Drop before these layers, e.g. 8,16,24.")]
Layer = Annotated[int | None, typer.Option(help="fastv: drop before this layer.")]
Score = Annotated[
    str | None, typer.Option(help="What ranks: attention, rope_free, diversity, ...; pyramiddrop methods lists them.")
]
Reserve = Annotated[float | None, typer.Option(help="Share of what stays that is evenly spaced over the picture.")]
RandomFrom = Annotated[int | None, typer.Option(help="Chance chooses at drops before this layer and later ones.")]
Merge = Annotated[bool | None, typer.Option("--merge", help="Average what goes into what stays and is most like it.")]
Positions = Annotated[str | None, typer.Option(help="original, or compact: renumber after a drop.")]
Keep = Annotated[str | None, typer.Option(help="Shares of the original tokens to keep, e.g. 0.5,0.25,0.125.")]
