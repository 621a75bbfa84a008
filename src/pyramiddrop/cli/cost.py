"""The verb `cost`: the cost of methods by every measure, side by side, and the paper's figures beside ours."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli.options import OUTPUT, AsJson, MethodOptions, Methods, SizeOptions, with_groups
from pyramiddrop.cli.terminal import stderr, stdout

if TYPE_CHECKING:
    from pyramiddrop.inference.sizes import MethodCost, Sizes


@with_groups
def cost(
    *,
    size_options: SizeOptions,
    method: Methods = None,
    method_options: MethodOptions,
    paper: Annotated[
        bool, typer.Option("--paper", help="Every FLOPs figure of the paper beside ours.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Count what dropping saves: FLOPs, KV cache and tokens, without a model or a download.

    Three ways to count FLOPs: `full` is all that a prefill multiplies and adds, 2 for each; `paper` and `fastv` are
    what those papers print: visual tokens alone, 1 for each. Without --method: pyramiddrop and fastv as published.
    """
    if paper:
        _show_paper(as_json)
        return
    from pyramiddrop.inference.sizes import method_costs, published_costs

    sizes, shared = size_options.sizes(), method_options.given
    if method:
        found, left_out = method_costs(method, shared, sizes), list[str]()
    else:
        found, left_out = published_costs(_published(shared), shared, sizes)
    if as_json:
        print(json.dumps(_as_dict(sizes, found), indent=2))
    else:
        _show(sizes, found)
    for reason in left_out:
        stderr().print(reason, soft_wrap=True)


def _published(shared: dict[str, str]) -> list[str]:
    """The methods to show if none is named: those that have the given options."""
    if "layer" in shared:
        return ["fastv"]
    return ["pyramiddrop"] if shared else ["pyramiddrop", "fastv"]


def _show_paper(as_json: bool) -> None:
    from pyramiddrop.evaluation.paper import paper_figures
    from pyramiddrop.report.tables.cost import paper_summary, paper_table

    figures = paper_figures()
    if as_json:
        print(json.dumps({"figures": [figure.as_dict() for figure in figures]}, indent=2))
        return
    stdout().print(paper_table(figures))
    stdout().print(f"\n{paper_summary(figures)}", soft_wrap=True)


def _show(sizes: Sizes, found: list[MethodCost]) -> None:
    from pyramiddrop.report.tables.cost import cost_table

    console = stdout()
    console.print(f"{sizes.about}\n", soft_wrap=True)
    console.print(cost_table([(one.label, one.cost) for one in found]))
    if sizes.remark:
        console.print(f"\n{sizes.remark}", soft_wrap=True)


def _as_dict(sizes: Sizes, found: list[MethodCost]) -> dict[str, Any]:
    return {
        "name": sizes.name,
        "shape": asdict(sizes.shape),
        "prompt": asdict(sizes.prompt),
        "methods": [{"method": one.label, **one.cost.as_dict()} for one in found],
    }
