"""The verb `cost`: the cost of methods by every measure, side by side, and the paper's figures beside ours."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli import sizes as words
from pyramiddrop.cli.terminal import remarks, results

if TYPE_CHECKING:
    from pyramiddrop.inference.choice import MethodOptions
    from pyramiddrop.inference.side_by_side import Column
    from pyramiddrop.inference.sizes import Sizes

METHODS = "Methods"


def cost(
    shape: words.Shape = None,
    model: words.Model = None,
    layers: words.Layers = None,
    hidden: words.Hidden = None,
    intermediate: words.Intermediate = None,
    heads: words.Heads = None,
    kv_heads: words.KvHeads = None,
    visual_tokens: words.VisualTokens = None,
    text_tokens: words.TextTokens = None,
    crops: words.Crops = None,
    dtype: words.Dtype = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="pyramiddrop, fastv, random or uniform; several side by side, each with options of its own: "
            "fastv:layer=3,keep=0.25. (default: pyramiddrop, and fastv as published)",
            rich_help_panel=METHODS,
        ),
    ] = None,
    lam: Annotated[float | None, typer.Option(help="λ, of all methods that have it.", rich_help_panel=METHODS)] = None,
    stages: Annotated[int | None, typer.Option(help="Equal stages.", rich_help_panel=METHODS)] = None,
    layers_at: Annotated[
        str | None, typer.Option(help="Drop before these layers, e.g. 8,16,24.", rich_help_panel=METHODS)
    ] = None,
    layer: Annotated[int | None, typer.Option(help="fastv: drop before this layer.", rich_help_panel=METHODS)] = None,
    keep: Annotated[
        str | None, typer.Option(help="Shares of the original tokens to keep.", rich_help_panel=METHODS)
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Every FLOPs figure of the paper beside ours.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Count what dropping saves: FLOPs, KV cache and tokens, without a model or a download.

    Three ways to count FLOPs: `full` is all that a prefill multiplies and adds, 2 for each; `paper` and `fastv` are
    what those papers print: visual tokens alone, 1 for each.
    """
    if paper:
        _show_paper(as_json)
        return
    from pyramiddrop.inference.choice import MethodOptions
    from pyramiddrop.inference.side_by_side import published, side_by_side
    from pyramiddrop.inference.sizes import SizeOptions, choose_sizes

    sizes = choose_sizes(
        SizeOptions(
            shape, model, layers, hidden, intermediate, heads, kv_heads, visual_tokens, text_tokens, crops, dtype
        )
    )
    shared = MethodOptions(lam=lam, stages=stages, layers=layers_at, layer=layer, keep=keep)
    if method:
        columns, left_out = side_by_side(method, shared, sizes), list[str]()
    else:
        columns, left_out = published(_usual(shared), shared, sizes)
    if as_json:
        print(json.dumps(_as_dict(sizes, columns), indent=2))
    else:
        _show(sizes, columns)
    for reason in left_out:
        remarks().print(reason, soft_wrap=True)


def _usual(shared: MethodOptions) -> list[str]:
    """The methods to show where none is named: those that the options are about."""
    if shared.layer is not None:
        return ["fastv"]
    return ["pyramiddrop"] if shared.given else ["pyramiddrop", "fastv"]


def _show_paper(as_json: bool) -> None:
    from pyramiddrop.evaluation.paper import paper_figures
    from pyramiddrop.report.tables.cost import paper_summary, paper_table

    figures = paper_figures()
    if as_json:
        print(json.dumps({"figures": [figure.as_dict() for figure in figures]}, indent=2))
        return
    results().print(paper_table(figures))
    results().print(f"\n{paper_summary(figures)}", soft_wrap=True)


def _show(sizes: Sizes, columns: list[Column]) -> None:
    from pyramiddrop.report.tables.cost import account_table

    console = results()
    console.print(f"{sizes.about}\n", soft_wrap=True)
    console.print(account_table([(column.label, column.cost) for column in columns]))
    if sizes.remark:
        console.print(f"\n{sizes.remark}", soft_wrap=True)


def _as_dict(sizes: Sizes, columns: list[Column]) -> dict[str, Any]:
    return {
        "name": sizes.name,
        "shape": asdict(sizes.shape),
        "prompt": asdict(sizes.prompt),
        "methods": [{"method": column.label, **column.cost.as_dict()} for column in columns],
    }
